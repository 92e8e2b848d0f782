"""Labelling pixels, against the plain way: upsample all classes, average, resize, argmax.

Logits of a trained network are the demo model's, on real pictures. Where more classes are wanted than it has,
weak ones stand beside them: independent normal noise of deviation 1, at every token, three below its mean of 0,
where the model's best class lies near 5. Random logits are the worst case: noise for every class.
"""

import argparse
import resource
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops.checkpoint import load_segmenter
from mpm_ops.labels import label_map
from mpm_ops.segmenter import Segmenter
from mpm_ops.windows import InferenceConfig, WindowPlan, cut_windows, plan_windows

from . import model_shapes, percentile_ms, read_images, time_in_turn, write_report

NEAR_TIE = 1e-5
WEAK_MEAN = -3.0
PANORAMA = (40, 2540)  # 64 windows


@torch.inference_mode()
def plain_way(logits: Tensor, plan: WindowPlan, patch_size: int) -> Tensor:
    """[K, H, W] logits of the picture, as Segmenter computes them."""
    size = plan.window_size
    side = logits.shape[2] * patch_size
    pixels = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)[:, :, :size, :size]
    if plan.num_windows == 1 and plan.original_size == (size, size):
        return pixels[0]
    total = torch.zeros(logits.shape[1], *plan.frame_size)
    count = torch.zeros(plan.frame_size)
    for window, (top, left) in zip(pixels, product(plan.tops, plan.lefts), strict=True):
        total[:, top : top + size, left : left + size] += window
        count[top : top + size, left : left + size] += 1
    return F.interpolate((total / count)[None], plan.original_size, mode="bilinear", align_corners=False)[0]


def check_labels(found: np.ndarray, logits: Tensor) -> float:
    """The share of pixels where two classes are nearly equal; elsewhere the labels must be the plain way's.

    Raises:
        RuntimeError: they are not.
    """
    best = logits.topk(2, dim=0)
    tied = (best.values[0] - best.values[1] <= NEAR_TIE).numpy()
    wrong = int(((found != best.indices[0].numpy()) & ~tied).sum())
    if wrong:
        raise RuntimeError(
            f"parity: {wrong} of {found.size} labels differ from the plain way's; no figures are reported"
        )
    return float(tied.mean())


def cases(model: Segmenter, images: Sequence[np.ndarray]) -> list[tuple[str, WindowPlan, Tensor]]:
    """Name, plan and contiguous logits of everything that is timed."""
    generator = torch.Generator().manual_seed(0)
    side = model.inference.window_size
    square = cv2.resize(images[0], (side, side))
    found = []
    for i, image in enumerate([square, *images]):
        plan = plan_windows(image.shape[0], image.shape[1], model.inference)
        trained = model.window_logits(cut_windows(image, plan, model.inference)).contiguous()
        found.append((f"picture {i}, {image.shape[1]}x{image.shape[0]}, {trained.shape[1]} classes", plan, trained))
        weak = torch.randn(len(trained), 150 - trained.shape[1], *trained.shape[2:], generator=generator) + WEAK_MEAN
        both = torch.cat([trained, weak], dim=1)
        found.append((f"picture {i}, {image.shape[1]}x{image.shape[0]}, 150 classes", plan, both))
    grid = -(-side // model.config.patch_size)
    for height, width in ((side, side), (side * 15 // 16, side * 5 // 4)):
        plan = plan_windows(height, width, _square(model.inference))
        random = torch.randn(plan.num_windows, 150, grid, grid, generator=generator)
        found.append((f"random logits, {width}x{height}, 150 classes", plan, random))
    return found


def _square(inference: InferenceConfig) -> InferenceConfig:
    side = inference.window_size
    return InferenceConfig(
        im_size=side, max_ratio=4, window_size=side, window_stride=side, normalization=inference.normalization
    )


def bench_labels(model: Segmenter, images: Sequence[np.ndarray], repeats: int) -> list[dict[str, Any]]:
    """Parity first, then both ways in turn; medians."""
    patch_size = model.config.patch_size
    results = []
    for name, plan, logits in cases(model, images):
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda logits=logits, plan=plan: plain_way(logits, plan, patch_size).argmax(dim=0),  # type: ignore[misc]
            "cells": lambda logits=logits, plan=plan: label_map(logits, plan, patch_size),  # type: ignore[misc]
        }
        tied = check_labels(label_map(logits, plan, patch_size).labels, plain_way(logits, plan, patch_size))
        samples = time_in_turn(ways, repeats=repeats)
        ms = {way: percentile_ms(seconds) for way, seconds in samples.items()}
        ratio = statistics.median(p / c for p, c in zip(samples["plain"], samples["cells"], strict=True))
        results.append({"case": name, "near_ties": tied, "median_ms": ms, "speedup": round(ratio, 2)})
    return results


def bench_panorama(model: Segmenter, repeats: int) -> dict[str, Any]:
    """64 windows of weak noise and one strong class each, by tiles and by cells, and the memory that cells take.

    The plain way would hold 150 x 512 x 31,744 numbers; the labels by tiles stand in for it.

    Raises:
        RuntimeError: the two disagree on more than near-ties explain.
    """
    inference, patch_size = _square(model.inference), model.config.patch_size
    plan = plan_windows(*PANORAMA, inference)
    grid = -(-plan.window_size // patch_size)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(plan.num_windows, 150, grid, grid, generator=generator) + WEAK_MEAN
    logits[torch.arange(plan.num_windows), torch.arange(plan.num_windows)] += 8
    label_map(logits[:1], plan_windows(*(2 * (plan.window_size,)), inference), patch_size)  # compile
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cells = label_map(logits, plan, patch_size)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tiles = label_map(logits, plan, patch_size, confidence=True)
    differ = float((cells.labels != tiles.labels).mean())
    if differ > 1e-4:
        raise RuntimeError(f"parity: {differ:.1e} of a panorama's labels differ by tiles and by cells")
    samples = time_in_turn(
        {
            "tiles": lambda: label_map(logits, plan, patch_size, confidence=True),
            "cells": lambda: label_map(logits, plan, patch_size),
        },
        repeats=repeats,
    )
    return {
        "case": f"panorama {PANORAMA[1]}x{PANORAMA[0]}, {plan.num_windows} windows, 150 classes",
        "differ": differ,
        "median_ms": {way: percentile_ms(seconds) for way, seconds in samples.items()},
        "logits_bytes": logits.numel() * 4,
        "peak_growth_bytes": grown * 1024,
    }


def add_command(commands: Any) -> None:
    """Add `labels` to the commands of `python -m mpm_ops.bench`."""
    command = commands.add_parser("labels", help="labelling pixels, against the plain way")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument("--most", type=int, default=8, help="pictures of a folder, evenly chosen")
    command.add_argument("--repeats", type=int, default=9)
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images, arguments.most)
    model = load_segmenter(arguments.checkpoint, ())
    panorama = bench_panorama(model, min(arguments.repeats, 3))  # first, while no other case has taken memory
    results = bench_labels(model, images, arguments.repeats)
    for result in results:
        ms = result["median_ms"]
        print(
            f"{result['case']:<40} plain {ms['plain']:9.2f} ms  ours {ms['cells']:7.2f} ms  "
            f"{result['speedup']:7.1f}x  near ties {result['near_ties']:.1e}"
        )
    ms = panorama["median_ms"]
    print(
        f"{panorama['case']}: by tiles {ms['tiles']:.0f} ms  ours {ms['cells']:.1f} ms  memory "
        f"+ {panorama['peak_growth_bytes'] / 1e6:.0f} MB beside {panorama['logits_bytes'] / 1e6:.0f} MB of logits"
    )
    fields = {"repeats": arguments.repeats, "results": [*results, panorama]}
    write_report(arguments.out, fields, shapes=model_shapes(model))
    return 0
