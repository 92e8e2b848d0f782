"""The demo model's recipe: a convolutional teacher learns CamVid, and Segmenter-Ti/16 learns from both.

python -m model_store.demo.train --data CAMVID --out DIR --minutes 8.5 --device cuda
"""

import argparse
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpm_ops import Segmenter
from mpm_ops.evaluate import DATASETS, find_pairs

from .held_out import HeldOut, hold_out
from .losses import distillation_loss, segmentation_loss
from .networks import Student, Teacher, build_segmenter
from .pictures import Augmentation, Pictures, num_cores
from .scene import CLASSES

VARIANT = Path(__file__).with_name("variant.yml")
SAVE_EVERY_SECONDS = 60
REPORT_EVERY_SECONDS = 20
AVERAGE_DECAY = 0.998
FINISH = 0.8  # from here on, crops are windows as inference cuts them

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What `python -m model_store.demo.train --help` explains."""

    data: Path
    out: Path
    init: Path | None
    steps: int | None
    minutes: float | None
    teacher_share: float
    held_out: int
    scenes: int
    crop: int
    batch: int
    learning_rate: float
    teacher_batch: int
    teacher_learning_rate: float
    weight_decay: float
    warmup: int
    device: str
    seed: int


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = parse_recipe()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    train(recipe, stop)


def train(recipe: Recipe, stop: threading.Event | None = None) -> None:
    """Follow the recipe; `checkpoint.pth` under `recipe.out` is renewed every minute and at the end.

    Args:
        stop: ends the run early when it is set; what was learned until then is saved.
    """
    start, stop = time.monotonic(), stop or threading.Event()
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    pairs, held_out_pairs = hold_out(find_pairs(recipe.data, "train", DATASETS["camvid"]), recipe.held_out)
    workers = max(1, num_cores() - 2)
    pictures = Pictures(pairs, num_scenes=recipe.scenes, num_workers=workers, device=recipe.device, seed=recipe.seed)
    segmenter = build_segmenter(recipe.init)
    held_out = HeldOut(held_out_pairs, segmenter.inference, recipe.device)
    log.info("%d pictures, %d held out", len(pairs), len(held_out_pairs))
    try:
        teacher = None
        if recipe.teacher_share > 0:
            budget = Budget(recipe.steps, recipe.minutes, start, recipe.teacher_share, stop)
            teacher = train_teacher(recipe, pictures, held_out, budget)
        budget = Budget(recipe.steps, recipe.minutes, start, 1, stop)
        train_student(recipe, segmenter, teacher, pictures, held_out, budget)
    finally:
        pictures.close()


class Budget:
    """Progress of one network's training: by steps if they are given, otherwise by minutes.

    Attributes:
        minutes: of the whole run; this network trains from now until `share` of them is gone.
    """

    def __init__(
        self, steps: int | None, minutes: float | None, start: float, share: float, stop: threading.Event
    ) -> None:
        self.steps, self.stop = steps, stop
        self.begin, self.end = time.monotonic(), start + 60 * share * (minutes or 0)

    def __iter__(self) -> Iterator[float]:
        """How much is gone, before each step."""
        step = 0
        while not self.stop.is_set():
            gone, whole = (time.monotonic() - self.begin, self.end - self.begin)
            if self.steps is not None:
                gone, whole = step, self.steps
            if gone >= whole:
                return
            yield gone / whole
            step += 1


def train_teacher(recipe: Recipe, pictures: Pictures, held_out: HeldOut, budget: Budget) -> nn.Module:
    """Teach a `Teacher` the labels; returns it in evaluation mode."""
    # Twice as fast on a GPU; on CPUs, torch 2.13's convolutions crash in it.
    layout = torch.channels_last if torch.device(recipe.device).type == "cuda" else torch.contiguous_format
    teacher = Teacher().to(recipe.device)
    teacher.to(memory_format=layout)  # type: ignore[call-overload]

    def loss_of(windows: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(infer(teacher, windows), labels, pictures.class_weights)

    def crops(progress: float) -> tuple[Tensor, Tensor]:
        return pictures.batch(recipe.teacher_batch, recipe.crop, augmentation(progress, blended=0))

    rate = recipe.teacher_learning_rate
    average = fit("teacher", teacher, crops, loss_of, rate, recipe, budget, report=held_out.score)
    return average.requires_grad_(False)


def train_student(
    recipe: Recipe,
    segmenter: Segmenter,
    teacher: nn.Module | None,
    pictures: Pictures,
    held_out: HeldOut,
    budget: Budget,
) -> None:
    """Teach the Segmenter the labels and the teacher's answers, on blends of pictures these alone."""
    student = Student(segmenter).to(recipe.device)

    def loss_of(windows: Tensor, labels: Tensor) -> Tensor:
        logits = infer(student, windows)
        loss = segmentation_loss(logits, labels, pictures.class_weights)
        if teacher is None:
            return loss
        with torch.no_grad():
            answers = infer(teacher, windows)
        return loss + distillation_loss(logits, answers)

    def crops(progress: float) -> tuple[Tensor, Tensor]:
        blended = 0.4 if teacher is not None else 0.0
        return pictures.batch(recipe.batch, recipe.crop, augmentation(progress, blended=blended))

    def report(average: nn.Module) -> float:
        assert isinstance(average, Student)
        save_checkpoint(average.segmenter, recipe.out)
        return held_out.score(average)

    fit("student", student, crops, loss_of, recipe.learning_rate, recipe, budget, report=report)


def augmentation(progress: float, *, blended: float) -> Augmentation:
    """Anything at first; in the end what inference sees."""
    if progress < FINISH:
        painted = 0.25 * (1 - progress)
        return Augmentation(zoom=2.0, squeeze=1.2, turn=0.1, painted=painted, pasted=0.6, blended=blended)
    return Augmentation(zoom=1.25, squeeze=1.06, turn=0.03, painted=0.05, pasted=0.3, blended=0)


def infer(network: nn.Module, windows: Tensor) -> Tensor:
    """Float32 logits, by way of bfloat16 on a GPU."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits: Tensor = network(windows)
    return logits.float()


def fit(
    name: str,
    network: nn.Module,
    crops: Callable[[float], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    peak_rate: float,
    recipe: Recipe,
    budget: Budget,
    *,
    report: Callable[[nn.Module], float],
) -> nn.Module:
    """Train a network for its budget.

    Args:
        crops: windows and labels for a step, by the progress so far.
        report: told the averaged weights every minute and at the end; returns the held-out mean IoU.

    Returns:
        The network with averaged weights, in evaluation mode.
    """
    network.train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True).eval()
    optimizer = make_optimizer(network, recipe.weight_decay)
    begin = reported = saved = time.monotonic()
    total, counted = torch.zeros((), device=recipe.device), 0
    step = 0
    for step, progress in enumerate(budget, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak_rate, recipe.warmup, step, progress)
        loss = loss_of(*crops(progress))
        optimizer.zero_grad()
        loss.backward()
        take_step(network, optimizer)
        average.update_parameters(network)
        total, counted = total + loss.detach(), counted + 1  # nothing here waits for the device
        now = time.monotonic()
        if now - reported > REPORT_EVERY_SECONDS or step == 10:
            pace = (now - begin) / step
            log.info(f"{name} {progress:.1%}, step {step}, loss {total.item() / counted:.4f}, {pace:.3f} s/step")
            reported, total, counted = now, torch.zeros_like(total), 0
        if now - saved > SAVE_EVERY_SECONDS:
            log.info(f"{name} {progress:.1%}, held-out mean IoU {report(average.module):.4f}")
            saved = time.monotonic()
    if step:
        log.info(f"{name} done after {step} steps, held-out mean IoU {report(average.module):.4f}")
    module: nn.Module = average.module
    return module


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip and apply the gradients; numbers that overflowed count as none."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def learning_rate(peak: float, warmup: int, step: int, progress: float) -> float:
    """A short linear warm-up, then half a cosine to zero."""
    return peak * min(1, step / warmup) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(network: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in network.parameters() if p.ndim in (2, 4)]
    others = [p for p in network.parameters() if p.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def save_checkpoint(model: Segmenter, out: Path) -> None:
    """Write `checkpoint.pth` with variant.yml beside it, so that a reader sees the old file or the new one."""
    out.mkdir(parents=True, exist_ok=True)
    for beside in (VARIANT, VARIANT.with_name("classes.csv")):
        (out / beside.name).write_bytes(beside.read_bytes())
    half = {key: value.detach().half().cpu() for key, value in model.state_dict().items()}
    partial = out / "checkpoint.pth.partial"
    torch.save({"model": half, "n_cls": len(CLASSES)}, partial)
    partial.replace(out / "checkpoint.pth")


def parse_recipe(arguments: Sequence[str] | None = None) -> Recipe:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m model_store.demo.train", description="Train the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/images and train/labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pth, variant.yml, classes.csv")
    parser.add_argument("--init", type=Path, help="checkpoint or state_dict to start from; fresh weights without it")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in steps of each network")
    budget.add_argument("--minutes", type=float, help="length of the run in wall-clock minutes")
    parser.add_argument("--teacher-share", type=float, default=0.38, help="of the minutes; 0 for no teacher")
    parser.add_argument("--held-out", type=int, default=8, help="pictures of each sequence that only score")
    parser.add_argument("--scenes", type=int, default=3000, help="painted scenes beside the pictures")
    parser.add_argument("--crop", type=int, default=512, help="side of the training windows in pixels")
    parser.add_argument("--batch", type=int, default=64, help="crops per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak, after the warm-up")
    parser.add_argument("--teacher-batch", type=int, default=32, help="crops per step of the teacher")
    parser.add_argument("--teacher-learning-rate", type=float, default=2e-3, help="the teacher's peak")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument("--seed", type=int, default=0)
    return Recipe(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
