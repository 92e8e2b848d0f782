"""Labels on the device at hand: our kernel, tiles of matrix products, and upsampling every class."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops.axes import axes
from mpm_ops.labels import label_map
from mpm_ops.labels import label_tiles as tiles
from mpm_ops.windows import WindowPlan, plan_windows

from .gpu_networks import Scale, whole_windows
from .timing import Timer, Work, in_turn

LEAST_AGREEMENT = 0.9999


@torch.inference_mode()
def time_labels(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Milliseconds from logits on the device to labels on the host, one picture of one window and a wide one.

    Raises:
        RuntimeError: ways differ in more than near-ties.
    """
    timer, rows = Timer(device), []
    for width in (scale.side, 5 * scale.side // 2):
        plan = plan_of(scale, width)
        grid = scale.side // scale.patch
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(plan.num_windows, scale.classes, grid, grid, generator=generator).to(device)
        ways: dict[str, Callable[[], Any]] = {
            "ours": partial(label_by_us, logits, plan, scale.patch),
            "tiles": partial(label_tiles, logits, plan, scale.patch),
        }
        if plan.num_windows == 1:
            ways["plain"] = partial(label_plainly, logits, scale.side)
        found = {name: torch.as_tensor(way()) for name, way in ways.items()}
        agreement = {name: float((found["ours"] == labels).float().mean()) for name, labels in found.items()}
        if min(agreement.values()) < LEAST_AGREEMENT:
            raise RuntimeError(f"parity: labels agree by {agreement}; no figures are reported")
        times = in_turn({name: _work(way) for name, way in ways.items()}, timer, repeats=scale.repeats)
        ms = {name: laps["total"] for name, laps in times.items()}
        rows.append({"windows": plan.num_windows, "pixels": list(plan.original_size), "median_ms": ms})
    return {"classes": scale.classes, "pictures": rows}


def plan_of(scale: Scale, width: int) -> WindowPlan:
    """A picture as high as a window."""
    return plan_windows(scale.side, width, whole_windows(scale))


def _work(way: Callable[[], Any]) -> Work:
    return lambda laps: way()


def label_by_us(logits: Tensor, plan: WindowPlan, patch_size: int) -> np.ndarray:
    return label_map(logits, plan, patch_size).labels


def label_tiles(logits: Tensor, plan: WindowPlan, patch_size: int) -> Any:
    """Labels as they were made without a kernel of our own."""
    rows, columns = axes(plan, (logits.shape[2], logits.shape[3]), patch_size)
    windows = logits.unflatten(0, (len(plan.tops), len(plan.lefts)))
    tokens = windows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
    return tiles(tokens, rows, columns, np.empty(plan.original_size, np.uint8), confidence=False).labels


def label_plainly(logits: Tensor, side: int) -> Tensor:
    """Upsample every class, then take the largest, as Segmenter does."""
    pixels = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
    return pixels[0].argmax(0).byte().cpu()
