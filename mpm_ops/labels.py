"""From window logits to a label map, without class x height x width in memory.

Every pixel is a weighted mean of a few tokens (see `axes`). On the CPU only the classes that can win in a cell
of pixels are compared; on a GPU one kernel compares all in registers. Where there is no triton, and where the
probability is asked for too, the logits of a tile of pixels are two small matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .axes import Axis, axes
from .kernels import has_triton
from .transfers import fetch
from .windows import WindowPlan

TILE = 128  # pixels; a tile's logits for 150 classes take 10 MB


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
    rows, columns = axes(plan, (grid_height, grid_width), patch_size)
    windows = logits.float().unflatten(0, (len(plan.tops), len(plan.lefts)))
    labels = np.empty(plan.original_size, np.uint8 if num_classes <= 256 else np.uint16)
    if can_label_on_gpu(logits) and not confidence:
        return LabelMap(label_maps([logits], plan, patch_size)[0], None)
    if confidence or logits.device.type != "cpu":
        tokens = windows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)  # [K, tokens down, tokens across]
        return label_tiles(tokens, rows, columns, labels, confidence=confidence)

    from ._label_cells import label_cells  # the compiler takes a moment to import; devices do without

    tokens = windows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [tokens down, tokens across, K]
    label_cells(tokens.contiguous().numpy(), rows, columns, labels)
    return LabelMap(labels, None)


@torch.inference_mode()
def label_maps(logits: Sequence[Tensor], plan: WindowPlan, patch_size: int) -> list[np.ndarray]:
    """`label_map` for pictures of one plan; on a GPU in one launch and one copy, for which only this thread waits.

    Args:
        logits: of each picture, [num_windows, K, Gh, Gw], best as [num_windows, Gh, Gw, K] in memory.
        plan: where the windows of each picture lie.
        patch_size: pixels of a window per token.

    Returns:
        The labels of each picture, [H, W], the same bytes as `label_map` gives.

    Raises:
        ValueError: logits do not fit the plan.
    """
    if not can_label_on_gpu(logits[0]):
        return [label_map(picture, plan, patch_size).labels for picture in logits]
    from .kernels.labels import label_pixels

    by_token = [picture.float().movedim(1, -1).unflatten(0, (len(plan.tops), len(plan.lefts))) for picture in logits]
    together = torch.stack(by_token) if len(by_token) > 1 else by_token[0][None].contiguous()
    grid = (together.shape[3], together.shape[4])
    labels = fetch(label_pixels(together, *_axes_on(plan, grid, patch_size, together.device)))().numpy()
    return list(labels if labels.dtype == np.uint8 else labels.view(np.uint16))


def can_label_on_gpu(logits: Tensor) -> bool:
    """Whether the kernel labels these."""
    return logits.is_cuda and has_triton()


@lru_cache(maxsize=128)  # some 100 kB each
def _axes_on(
    plan: WindowPlan, grid: tuple[int, int], patch_size: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor], int]:
    """The axes as `label_pixels` wants them."""
    rows, columns = axes(plan, grid, patch_size)
    cells = np.searchsorted(rows.starts, np.arange(len(rows.weights)), side="right") - 1
    with torch.inference_mode(False):
        placed = [
            [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
            for arrays in (
                (np.int32(cells), np.int32(rows.tokens), np.int32(rows.counts), rows.weights),
                (np.int32(columns.starts), np.int32(columns.tokens), np.int32(columns.counts), columns.weights),
            )
        ]
    return placed[0], placed[1], int(np.diff(columns.starts).max())


def label_tiles(tokens: Tensor, rows: Axis, columns: Axis, labels: np.ndarray, *, confidence: bool) -> LabelMap:
    """Fill in labels tile by tile, from [K, tokens down, tokens across]: what the kernel is held against."""
    height, width = labels.shape
    probability = np.empty((height, width), np.float32) if confidence else None
    for top in range(0, height, TILE):
        row_tokens, row_weights = _on(tokens.device, rows.matrix(top, top + TILE))
        for left in range(0, width, TILE):
            column_tokens, column_weights = _on(tokens.device, columns.matrix(left, left + TILE))
            across = torch.matmul(row_weights, tokens[:, row_tokens[:, None], column_tokens])
            tile = torch.matmul(across, column_weights.T)  # [K, tile, tile]
            best, label = tile.max(dim=0)
            labels[top : top + TILE, left : left + TILE] = label.cpu().numpy()
            if probability is not None:
                sure = (best - tile.logsumexp(dim=0)).exp()
                probability[top : top + TILE, left : left + TILE] = sure.cpu().numpy()
    return LabelMap(labels, probability)


def _on(device: torch.device, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(arrays[0]).to(device), torch.from_numpy(arrays[1]).to(device)
