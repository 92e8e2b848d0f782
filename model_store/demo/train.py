"""The demo model's recipe: Segmenter-Ti/16 on CamVid and painted scenes, in plain PyTorch.

python -m model_store.demo.train --data DIR --out DIR --minutes 90
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig

from .losses import segmentation_loss
from .pictures import Pictures
from .scene import CLASSES

VARIANT = Path(__file__).with_name("variant.yml")
SAVE_EVERY_SECONDS = 600
REPORT_EVERY_STEPS = 50
AVERAGE_DECAY = 0.998

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What `python -m model_store.demo.train --help` explains."""

    data: Path
    out: Path
    init: Path | None
    steps: int | None
    minutes: float | None
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: int
    painted: float
    device: str
    bf16: bool
    seed: int


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse_recipe())


def train(recipe: Recipe) -> None:
    """Follow the recipe; `checkpoint.pth` under `recipe.out` is renewed every ten minutes and at the end."""
    torch.manual_seed(recipe.seed)
    pictures = Pictures(recipe.data / "train", np.random.default_rng(recipe.seed), painted=recipe.painted)
    class_weights = pictures.class_weights().to(recipe.device)
    model = build_model(recipe.init).to(recipe.device).train()
    average = AveragedModel(model, avg_fn=moving_average)
    optimizer = make_optimizer(model, recipe)
    log.info("%d pictures, class weights %s", len(pictures.images), [round(w, 2) for w in class_weights.tolist()])

    saved = reported = time.monotonic()
    losses: list[float] = []
    for step, progress in enumerate(progress_of(recipe), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, progress)
        crop, batch = crop_and_batch(recipe.batch, progress)
        windows, labels = (part.to(recipe.device) for part in pictures.batch(batch, crop))
        with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bf16):
            logits = model(windows)
        loss = segmentation_loss(logits.float(), labels, class_weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)

        losses.append(loss.item())
        now = time.monotonic()
        if step % REPORT_EVERY_STEPS == 0:
            rate = optimizer.param_groups[0]["lr"]
            pace = (now - reported) / REPORT_EVERY_STEPS
            loss_mean = np.mean(losses)
            log.info(
                f"step {step}, {progress:.1%}, loss {loss_mean:.4f}, lr {rate:.2e}, crop {crop}, {pace:.2f} s/step"
            )
            reported, losses = now, []
        if now - saved > SAVE_EVERY_SECONDS:
            save_checkpoint(average.module, recipe.out)
            saved = now
    save_checkpoint(average.module, recipe.out)


def progress_of(recipe: Recipe) -> Iterator[float]:
    """How much of the budget is gone, before each step: steps if they are given, otherwise minutes."""
    if recipe.steps is not None:
        yield from (step / recipe.steps for step in range(recipe.steps))
        return
    assert recipe.minutes is not None
    start, seconds = time.monotonic(), 60 * recipe.minutes
    while (elapsed := time.monotonic() - start) < seconds:
        yield elapsed / seconds


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """A short linear warm-up, then half a cosine to zero."""
    return recipe.learning_rate * min(1, step / recipe.warmup) * (1 + math.cos(math.pi * progress)) / 2


def crop_and_batch(batch: int, progress: float) -> tuple[int, int]:
    """Smaller crops first, for many of them; the last part sees windows as inference cuts them."""
    if progress < 0.6:
        return 384, batch
    return 512, max(1, round(batch * (384 / 512) ** 2))


def build_model(init: Path | None) -> Segmenter:
    """The network of variant.yml, with the weights of an earlier run or fresh ones."""
    config = SegmenterConfig(
        image_size=(512, 512),
        patch_size=16,
        d_model=192,
        n_heads=3,
        n_layers=12,
        n_cls=len(CLASSES),
        drop_path_rate=0.1,
    )
    inference = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
    model = Segmenter(config, inference)
    if init is not None:
        weights = torch.load(init, map_location="cpu", weights_only=True)
        model.load_state_dict(weights.get("model", weights))
        return model
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def moving_average(average: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
    """An exponential moving average in which the weights before the first step have no share."""
    share = (1 - AVERAGE_DECAY) / (1 - AVERAGE_DECAY ** (num_averaged + 1))
    return average + (current - average) * share


def save_checkpoint(model: nn.Module, out: Path) -> None:
    """Write `checkpoint.pth` with variant.yml beside it, so that a reader sees the old file or the new one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / VARIANT.name).write_bytes(VARIANT.read_bytes())
    half = {key: value.detach().half().cpu() for key, value in model.state_dict().items()}
    partial = out / "checkpoint.pth.partial"
    torch.save({"model": half, "n_cls": len(CLASSES)}, partial)
    partial.replace(out / "checkpoint.pth")


def parse_recipe(arguments: Sequence[str] | None = None) -> Recipe:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m model_store.demo.train", description="Train the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/images and train/labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pth and variant.yml")
    parser.add_argument("--init", type=Path, help="checkpoint or state_dict to start from; fresh weights without it")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in steps")
    budget.add_argument("--minutes", type=float, help="length of the run in wall-clock minutes")
    parser.add_argument("--batch", type=int, default=6, help="crops per step at 384 pixels; fewer at 512")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="peak, after the warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices")
    parser.add_argument("--warmup", type=int, default=60, help="steps of linear warm-up")
    parser.add_argument("--painted", type=float, default=0.15, help="share of painted scenes")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, where the device is fast at it")
    parser.add_argument("--seed", type=int, default=0)
    return Recipe(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
