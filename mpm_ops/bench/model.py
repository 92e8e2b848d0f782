"""One window from pixels to labels: our way beside the plain one, other runtimes and other ways to merge.

Ti has the demo model's encoder and its 11 classes, with random ones beside them up to K. S and B have random weights;
how many tokens those would merge means nothing, so lengths after the merges are injected: 765 and 604, plus or minus
20, as trained weights have them, and ALGM, which merges by a threshold, is left out. Labels are decoded from the demo
model's logits on the picture, with weak noise classes beside them as in `bench labels`: so every way decodes the same.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mpm_ops import Segmenter, SegmenterConfig, load_segmenter
from mpm_ops.labels import label_map
from mpm_ops.merge import reconstruct
from mpm_ops.windows import WindowPlan, cut_windows, plan_windows

from . import model_shapes, percentile_ms, read_images, time_in_turn, write_report
from .contestants import Injected, Steps, Way, contestants
from .labels import WEAK_MEAN, plain_way

DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo" / "checkpoint.pth"
SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}  # width and heads
MOST_DIFFERENT = 1e-3  # of logits between runtimes in fp32; they are standardised over the classes
LEAST_AGREEMENT = 0.999  # of labels where a near-tie may have merged another pair


def build(size: str, demo: Segmenter, num_classes: int) -> Segmenter:
    """A network of 12 blocks with so many classes; the demo model's weights wherever they fit."""
    width, heads = SIZES[size]
    config = dataclasses.asdict(demo.config) | {"d_model": width, "n_heads": heads, "n_cls": num_classes}
    generator = torch.Generator().manual_seed(0)
    model = Segmenter(SegmenterConfig(**config), demo.inference).eval()
    own = model.state_dict()
    for value in own.values():
        if value.ndim > 1:
            value.normal_(std=0.02 if value.shape[0] == 1 else value.shape[-1] ** -0.5, generator=generator)
    if width == demo.config.d_model:
        for name, value in demo.state_dict().items():
            part = own[name][:, : value.shape[1]] if name == "decoder.cls_emb" else own[name][: len(value)]
            part.copy_(value)
    return model


def bench_size(
    size: str, demo: Segmenter, image: np.ndarray, num_classes: int, precision: str, repeats: int
) -> list[dict[str, Any]]:
    """Every way, in turn, on one window; medians, and ratios to the plain way and to the best unmerged one."""
    side = demo.inference.window_size
    square = cv2.resize(image, (side, side))
    plan = plan_windows(side, side, demo.inference)
    window = cut_windows(square, plan, demo.inference)[:1]
    logits = _labelled_logits(demo, window, num_classes)
    model = build(size, demo, num_classes)
    with torch.inference_mode():
        ways = contestants(model, precision, None if size == "Ti" else Injected())
        check_parity(ways, window)
        samples: list[list[Steps]] = [[] for _ in ways]
        for _ in range(repeats):
            for way, steps in zip(ways, samples, strict=True):
                steps.append(_time(way, window, logits, plan, demo.config.patch_size))
    return [
        {
            "size": size,
            "precision": precision,
            "way": way.name,
            "runtime": way.runtime,
            "median_ms": {step: percentile_ms([s[step] for s in steps]) for step in steps[0]},
        }
        for way, steps in zip(ways, samples, strict=True)
    ]


def check_parity(ways: Sequence[Way], window: Tensor) -> None:
    """Every way that has a reference must give its logits, or where it merges, its labels.

    Raises:
        RuntimeError: it does not; figures would compare different work.
    """
    found = {(way.name, way.runtime): way.run(window)[0].clone() for way in ways}
    for way in ways:
        if way.reference is None or way.reference not in found:
            continue
        mine, theirs = found[way.name, way.runtime], found[way.reference]
        difference = float((mine - theirs).abs().max())
        agreement = float((mine.argmax(1) == theirs.argmax(1)).float().mean())
        tied = "unmerged" not in way.name and agreement >= LEAST_AGREEMENT
        if difference > MOST_DIFFERENT and not tied:
            raise RuntimeError(
                f"parity: {way.name} on {way.runtime} differs from {' on '.join(way.reference)} by {difference:.1e} "
                f"in logits and in {1 - agreement:.2%} of labels; no figures are reported"
            )


def _time(way: Way, window: Tensor, logits: Tensor, plan: WindowPlan, patch_size: int) -> Steps:
    _, steps = way.run(window)
    start = perf_counter()
    if way.plain_labels:
        plain_way(logits, plan, patch_size).argmax(dim=0)
    else:
        label_map(logits, plan, patch_size)
    labels = perf_counter() - start
    return {**steps, "labels": labels, "total": sum(steps.values()) + labels}


def _labelled_logits(demo: Segmenter, window: Tensor, num_classes: int) -> Tensor:
    """[1, K, Gh, Gw]: the demo model's classes and weak noise beside them."""
    trained = demo.window_logits(window)
    noise = torch.Generator().manual_seed(0)
    shape = (1, max(0, num_classes - trained.shape[1]), *trained.shape[2:])
    return torch.cat([trained, torch.randn(shape, generator=noise) + WEAK_MEAN], dim=1)[:, :num_classes].contiguous()


def time_gather(num_classes: int, repeats: int = 50) -> float:
    """Milliseconds to copy the logits of 604 tokens back to 1024 patches; part of `network` above."""
    merged, merge_map = torch.randn(604, num_classes), torch.arange(1024) * 604 // 1024
    samples = time_in_turn({"gather": lambda: reconstruct(merged, merge_map)}, repeats=repeats)
    return percentile_ms(samples["gather"])


def add_command(commands: Any) -> None:
    command = commands.add_parser("model", help="one window: ours beside everybody else's")
    command.add_argument("--checkpoint", type=Path, default=DEMO, help="a Ti whose weights and classes are used")
    command.add_argument("--image", type=Path, required=True)
    command.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    command.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    command.add_argument("--classes", type=int, default=150)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.add_argument("--plot", type=Path, help="draw them; needs matplotlib")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    image = read_images(arguments.image, 1)[0]
    demo = load_segmenter(arguments.checkpoint)
    for size in arguments.sizes:
        for precision in arguments.precisions:
            rows = bench_size(size, demo, image, arguments.classes, precision, arguments.repeats)
            results += rows
            print_table(rows)
    gather = time_gather(arguments.classes)
    print(f"of the network, copying logits back to their patches: {gather} ms")
    fields = {"classes": arguments.classes, "gather_ms": gather, "results": results}
    report = write_report(arguments.out, fields, shapes=model_shapes(demo) | {"sizes": SIZES})
    if arguments.plot:
        from .plots import plot_models

        plot_models(report, arguments.plot)
    return 0


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds by step, and how many times faster than the plain way and than the best unmerged rival."""
    plain = rows[0]["median_ms"]["total"]
    unmerged = min(row["median_ms"]["total"] for row in rows if row["way"] == "whole, unmerged")
    print(f"{rows[0]['size']}, {rows[0]['precision']}")
    for row in rows:
        ms = row["median_ms"]
        steps = "".join(f"{ms[step]:9.1f}" for step in ("network", "merge", "labels", "total"))
        print(
            f"  {row['way']:<16} {row['runtime']:<12} ms:{steps}   {plain / ms['total']:5.2f}x the first, "
            f"{unmerged / ms['total']:5.2f}x the best unmerged rival"
        )
