"""Mutual Pair Merging on the CPU: the pairs of `merge_tokens` for half the arithmetic or less, no N x N in memory."""

import numpy as np
import torch
from torch import Tensor

from ._cosines import nearest_rows
from ._jit import jit
from .merge import check_choice, num_kept

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_NORM = np.float32(1e-12)


def can_merge_on_cpu(x: Tensor) -> bool:
    """Whether `merge_tokens_cpu` takes these tokens; gradients and float64 need `merge_tokens`."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not (x.requires_grad and torch.is_grad_enabled())


def merge_tokens_cpu(
    x: Tensor, *, align: int = 1, keep: float = 1, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `merge_tokens` does, and choose the same pairs wherever its cosines differ by more than their rounding.

    The answer depends on the arguments alone, on processors with the same vectors: neither the number of threads nor
    who else is computing changes a bit.

    Args:
        x: [N, D] tokens that `can_merge_on_cpu`, special tokens excluded.
        align, keep, sizes: see `merge_tokens`.

    Returns:
        merged [M, D] and merge_map [N] int64, as `merge_tokens`.

    Raises:
        ValueError: x is not such a matrix, or as `merge_tokens`.

    Source: MPM, Algorithm 1 (arXiv 2604.05718).
    """
    if x.ndim != 2 or not can_merge_on_cpu(x):
        raise ValueError(
            f"x: expected a matrix [N, D] of float32, bfloat16 or float16 on the CPU without gradient, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    check_choice(x, align, keep, sizes)
    rows = x.detach().float().contiguous().numpy()
    best, nearest = _nearest(rows)

    index = np.arange(len(rows), dtype=np.int32)
    first = np.flatnonzero((nearest[nearest] == index) & (index < nearest))
    num_pairs = num_kept(len(first), keep)
    if align > 1:
        num_pairs = max(len(rows) - -(-(len(rows) - num_pairs) // align) * align, 0)
    if num_pairs < len(first):
        first = first[np.argsort(-best[first], kind="stable")[:num_pairs]]

    second = nearest[first]
    share = np.full(len(first), np.float32(0.5))
    if sizes is not None:
        counts = sizes.float().numpy()
        share = counts[first] / (counts[first] + counts[second])
    merged = np.empty((len(rows) - len(first), rows.shape[1]), np.float32)
    merge_map = np.empty(len(rows), np.int64)
    _average(rows, first, second, share, merged, merge_map)
    return torch.from_numpy(merged).to(x.dtype), torch.from_numpy(merge_map)


def _nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine with, and index of, the most similar other row; a row that may not merge is its own nearest."""
    unit = np.empty_like(rows)
    usable = np.empty(len(rows), np.bool_)
    if _normalize(rows, unit, usable) == len(rows):
        return nearest_rows(unit)
    tokens = np.flatnonzero(usable)
    best, nearest = np.full(len(rows), -np.inf, np.float32), np.arange(len(rows), dtype=np.int32)
    best[tokens], found = nearest_rows(unit[tokens])
    nearest[tokens] = tokens[found]
    return best, nearest


@jit(fastmath=frozenset({"reassoc"}))
def _normalize(rows: np.ndarray, unit: np.ndarray, usable: np.ndarray) -> int:
    """Scale rows to length 1 as torch's `normalize` does; rows that are not finite become zeros, not usable."""
    num_usable = 0
    for i in range(len(rows)):
        row, scaled = rows[i], unit[i]
        square = np.float32(0)
        for d in range(len(row)):
            square += row[d] * row[d]
        usable[i] = np.isfinite(square) or np.isfinite(row).all()  # finite values may have an infinite square
        num_usable += usable[i]
        norm = max(np.sqrt(square), _SMALLEST_NORM) if usable[i] else np.float32(np.inf)
        for d in range(len(row)):
            scaled[d] = row[d] / norm if usable[i] else np.float32(0)
    return num_usable


@jit
def _average(
    rows: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    share: np.ndarray,
    merged: np.ndarray,
    merge_map: np.ndarray,
) -> None:
    """Write the mean of each pair in the place of its first token, which has this share; all others as they are."""
    pair = np.full(len(rows), -1)
    merge_map[:] = -1
    for k in range(len(first)):
        pair[first[k]] = k
    length = 0
    for i in range(len(rows)):
        if merge_map[i] >= 0:
            continue
        merge_map[i] = length
        if pair[i] < 0:
            merged[length] = rows[i]
        else:
            partner, weight = second[pair[i]], share[pair[i]]
            merge_map[partner] = length
            one, other, mean = rows[i], rows[partner], merged[length]
            for d in range(len(mean)):
                mean[d] = weight * one[d] + (np.float32(1) - weight) * other[d]
        length += 1
