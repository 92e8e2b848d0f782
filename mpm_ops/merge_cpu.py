"""Mutual Pair Merging on the CPU: the pairs of `merge_tokens` for half the arithmetic or less, no N x N in memory."""

import numpy as np
import torch
from torch import Tensor

from ._cosines import nearest_rows
from ._jit import jit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_NORM = np.float32(1e-12)


def can_merge_on_cpu(x: Tensor) -> bool:
    """Whether `merge_tokens_cpu` takes these tokens; gradients and float64 need `merge_tokens`."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not (x.requires_grad and torch.is_grad_enabled())


def merge_tokens_cpu(x: Tensor, *, align: int = 1) -> tuple[Tensor, Tensor]:
    """Do what `merge_tokens` does, and choose the same pairs wherever its cosines differ by more than their rounding.

    The answer depends on x and align alone, on processors with the same vectors: neither the number of threads nor
    who else is computing changes a bit.

    Args:
        x: [N, D] tokens that `can_merge_on_cpu`, special tokens excluded.
        align: see `merge_tokens`.

    Returns:
        merged [M, D] and merge_map [N] int64, as `merge_tokens`.

    Raises:
        ValueError: x is not such a matrix, or align < 1.

    Source: MPM, Algorithm 1 (arXiv 2604.05718).
    """
    if x.ndim != 2 or not can_merge_on_cpu(x):
        raise ValueError(
            f"x: expected a matrix [N, D] of float32, bfloat16 or float16 on the CPU without gradient, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if align < 1:
        raise ValueError(f"align: expected an integer >= 1, got {align}")
    rows = x.detach().float().contiguous().numpy()
    best, nearest = _nearest(rows)

    index = np.arange(len(rows), dtype=np.int32)
    first = np.flatnonzero((nearest[nearest] == index) & (index < nearest))
    if align > 1:
        aligned_length = -(-(len(rows) - len(first)) // align) * align
        strongest = np.argsort(-best[first], kind="stable")[: max(len(rows) - aligned_length, 0)]
        first = first[strongest]

    merged = np.empty((len(rows) - len(first), rows.shape[1]), np.float32)
    merge_map = np.empty(len(rows), np.int64)
    _average(rows, first, nearest[first], merged, merge_map)
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
    rows: np.ndarray, first: np.ndarray, second: np.ndarray, merged: np.ndarray, merge_map: np.ndarray
) -> None:
    """Write the mean of each pair in the place of its first token, and every other token as it is."""
    partner = np.full(len(rows), -1)
    merge_map[:] = -1
    for k in range(len(first)):
        partner[first[k]] = second[k]
    length = 0
    for i in range(len(rows)):
        if merge_map[i] >= 0:
            continue
        merge_map[i] = length
        if partner[i] < 0:
            merged[length] = rows[i]
        else:
            merge_map[partner[i]] = length
            one, other, mean = rows[i], rows[partner[i]], merged[length]
            for d in range(len(mean)):
                mean[d] = np.float32(0.5) * one[d] + np.float32(0.5) * other[d]
        length += 1
