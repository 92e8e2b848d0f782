"""From window logits to a label map, without class x height x width in memory.

Upsampling a window, averaging overlapping windows and resizing to the picture are all linear and work
on rows and columns apart. So for each axis there is one matrix from the tokens of all windows to the
pixels of the picture, and the logits of a tile of pixels are two small matrix products.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import WindowPlan

TILE = 128  # pixels; a tile's logits for 150 classes take 10 MB, and a row of tiles 2.5 MB per window across


@dataclass(frozen=True, slots=True)
class LabelMap:
    """labels: [H, W] class ids; confidence: [H, W] float32 softmax probability of the label, or None."""

    labels: np.ndarray
    confidence: np.ndarray | None


@torch.inference_mode()
def label_map(logits: Tensor, plan: WindowPlan, patch_size: int, *, confidence: bool = False) -> LabelMap:
    """Give every pixel its most likely class (ties: the lowest id).

    The same as upsampling each window's logits to its pixels, averaging them where windows overlap,
    resizing to the picture (all bilinear, align_corners=False), softmax and argmax, up to rounding.

    Args:
        logits: [num_windows, K, Gh, Gw], in the order of the plan.
        plan: where the windows lie.
        patch_size: pixels of a window per token.
        confidence: also return the probability of the label.

    Raises:
        ValueError: logits do not fit the plan.

    Source: rstrudel/segmenter@20d1bfad, `segm/model/utils.py` (merge_windows).
    """
    if logits.ndim != 4 or len(logits) != plan.num_windows:
        raise ValueError(f"logits: expected [{plan.num_windows}, K, Gh, Gw], got {list(logits.shape)}")
    num_classes, grid_height, grid_width = logits.shape[1:]
    rows = _axis_weights(plan.tops, grid_height, patch_size, plan, axis=0).to(logits.device)
    columns = _axis_weights(plan.lefts, grid_width, patch_size, plan, axis=1).to(logits.device)
    tokens = (  # [K, tokens down, tokens across] over all windows
        logits.float()
        .unflatten(0, (len(plan.tops), len(plan.lefts)))
        .permute(2, 0, 3, 1, 4)
        .reshape(num_classes, len(plan.tops) * grid_height, len(plan.lefts) * grid_width)
    )

    height, width = plan.original_size
    labels = torch.empty(height, width, dtype=torch.uint8 if num_classes <= 256 else torch.uint16)
    probability = torch.empty(height, width) if confidence else None
    for top in range(0, height, TILE):
        row_tokens, row_weights = _touched(rows[top : top + TILE])
        across = torch.matmul(row_weights, tokens[:, row_tokens])  # [K, tile, tokens across]
        for left in range(0, width, TILE):
            column_tokens, column_weights = _touched(columns[left : left + TILE])
            tile = torch.matmul(across[:, :, column_tokens], column_weights.T)  # [K, tile, tile]
            best, label = tile.max(dim=0)
            labels[top : top + TILE, left : left + TILE] = label
            if probability is not None:
                probability[top : top + TILE, left : left + TILE] = (best - tile.logsumexp(dim=0)).exp()
    return LabelMap(labels.numpy(), None if probability is None else probability.numpy())


def _axis_weights(origins: tuple[int, ...], grid: int, patch_size: int, plan: WindowPlan, *, axis: int) -> Tensor:
    """[pixels of the picture, windows x grid] along one axis: torch's own interpolation of unit vectors."""
    window, frame, pixels = plan.window_size, plan.frame_size[axis], plan.original_size[axis]
    units = torch.eye(grid, dtype=torch.float64)[None]
    upsampled = F.interpolate(units, size=grid * patch_size, mode="linear", align_corners=False)[0, :, :window]
    in_frame = torch.zeros(len(origins) * grid, frame, dtype=torch.float64)
    count = torch.zeros(frame, dtype=torch.float64)
    for i, origin in enumerate(origins):
        in_frame[i * grid : (i + 1) * grid, origin : origin + window] = upsampled
        count[origin : origin + window] += 1
    averaged = in_frame / count
    return F.interpolate(averaged[None], size=pixels, mode="linear", align_corners=False)[0].T.float()


def _touched(weights: Tensor) -> tuple[slice, Tensor]:
    """The span of tokens that some pixel of a tile uses, and the weights within it."""
    used = weights.any(dim=0).nonzero()
    span = slice(int(used[0]), int(used[-1]) + 1)
    return span, weights[:, span]
