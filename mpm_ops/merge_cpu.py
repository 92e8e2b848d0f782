"""Mutual Pair Merging on the CPU: the pairs of `merge_tokens` at half the arithmetic and without N x N in memory.

Similarity is symmetric, so only tiles on and above the diagonal are computed, each into the same buffer. While it is
in the cache, one pass brings the maxima of its rows and of its columns up to date. A token meets its candidates in
ascending order, so that ties go to the lowest index by keeping what was found first.
"""

import numpy as np
import torch
from torch import Tensor

from ._jit import jit
from .merge import check_choice, num_kept

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_ROWS, TILE_COLUMNS = 128, 1024  # 512 KB of similarities, the second-level cache of small cores
_SMALLEST_NORM = np.float32(1e-12)


def can_merge_on_cpu(x: Tensor) -> bool:
    """Whether `merge_tokens_cpu` takes these tokens; gradients and float64 need `merge_tokens`."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not (x.requires_grad and torch.is_grad_enabled())


def merge_tokens_cpu(
    x: Tensor, *, align: int = 1, keep: float = 1, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `merge_tokens` does, and choose the same pairs wherever its cosines differ by more than their rounding.

    The answer depends on the arguments and the number of torch threads alone, never on who else is computing.
    Another number of threads may round cosines otherwise, and so decide near-ties (closer than 1e-6) otherwise.

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
    num_usable = _normalize(rows, unit, usable)
    if num_usable == len(rows) and not _has_equal_rows(unit):
        return _nearest_of_distinct(unit)

    # A GEMM may round the products of equal rows by their position, so each distinct row takes part once.
    tokens = np.flatnonzero(usable)
    distinct, inverse = torch.from_numpy(unit[tokens]).unique(dim=0, return_inverse=True)
    first, second = _first_two(tokens, inverse.numpy(), len(distinct))
    order = np.argsort(first)  # by first occurrence: the lowest row is then the lowest token
    first, second, distinct = first[order], second[order], distinct.numpy()[order]
    row_best, row_nearest = _nearest_of_distinct(distinct)
    best, nearest = np.full(len(rows), -np.inf, np.float32), np.arange(len(rows), dtype=np.int32)
    best[first], nearest[first] = row_best, first[row_nearest]

    twin_cosine = np.einsum("nd,nd->n", distinct, distinct)
    twin_wins = (twin_cosine > row_best) | ((twin_cosine == row_best) & (second < first[row_nearest]))
    twins = np.flatnonzero((second >= 0) & (twin_wins | (row_best == -np.inf)))
    best[first[twins]], nearest[first[twins]] = twin_cosine[twins], second[twins]
    nearest[second[twins]] = first[twins]
    return best, nearest


def _has_equal_rows(unit: np.ndarray) -> bool:
    """Compare rows whose first values are equal: among a thousand, some are by chance."""
    leading = np.sort(unit[:, 0]) if unit.size else np.empty(0, np.float32)
    if not (leading[1:] == leading[:-1]).any():
        return False
    return bool(_equal_among(unit, np.argsort(unit[:, 0], kind="stable")))


def _nearest_of_distinct(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_rows = len(unit)
    best, nearest = np.full(num_rows, -np.inf, np.float32), np.arange(num_rows, dtype=np.int32)
    matrix = torch.from_numpy(unit)
    buffer = torch.empty(TILE_ROWS * TILE_COLUMNS)
    with torch.autocast("cpu", enabled=False):  # it would multiply in half precision
        for top in range(0, num_rows, TILE_ROWS):
            tile_rows = matrix[top : top + TILE_ROWS]
            for left in range(top, num_rows, TILE_COLUMNS):
                tile_columns = matrix[left : left + TILE_COLUMNS]
                height, width = -(-len(tile_rows) // 4) * 4, len(tile_columns)
                tile = buffer[: height * width].view(height, width)
                torch.mm(tile_rows, tile_columns.T, out=tile[: len(tile_rows)])
                _update(tile.numpy(), top, left, len(tile_rows), best, nearest)
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


@jit(fastmath=frozenset({"reassoc", "nnan", "nsz"}))
def _update(tile: np.ndarray, top: int, left: int, num_rows: int, best: np.ndarray, nearest: np.ndarray) -> None:
    """Let tokens top.. and left.. know each other by their cosines.

    Rows of the tile beyond num_rows are free, to make it a multiple of four: that many rows are compared with
    what the columns have before that is written back.
    """
    width = tile.shape[1]
    for r in range(num_rows):
        if left == top:
            tile[r, : r + 1] = -np.inf  # oneself, and pairs seen from the other side
    tile[num_rows:] = -np.inf
    column_best, column_nearest = best[left : left + width], nearest[left : left + width]
    for r in range(0, num_rows, 4):
        i = np.int32(top + r)
        row0, row1, row2, row3 = tile[r], tile[r + 1], tile[r + 2], tile[r + 3]
        for c in range(width):
            value, token = column_best[c], column_nearest[c]
            closer = row0[c] > value
            value, token = row0[c] if closer else value, i if closer else token
            closer = row1[c] > value
            value, token = row1[c] if closer else value, i + np.int32(1) if closer else token
            closer = row2[c] > value
            value, token = row2[c] if closer else value, i + np.int32(2) if closer else token
            closer = row3[c] > value
            value, token = row3[c] if closer else value, i + np.int32(3) if closer else token
            column_best[c], column_nearest[c] = value, token
        for k in range(r, min(r + 4, num_rows)):
            row = tile[k]
            largest = np.float32(-np.inf)
            for c in range(width):
                largest = max(largest, row[c])
            if largest > best[top + k]:
                at = np.int32(width)
                for c in range(width):
                    at = min(at, np.int32(c) if row[c] == largest else np.int32(width))
                best[top + k], nearest[top + k] = largest, left + at


@jit
def _equal_among(unit: np.ndarray, order: np.ndarray) -> bool:
    for k in range(len(order)):
        for other in range(k + 1, len(order)):
            a, b = unit[order[k]], unit[order[other]]
            if a[0] != b[0]:
                break
            d = 1
            while d < len(a) and a[d] == b[d]:
                d += 1
            if d == len(a):
                return True
    return False


@jit
def _first_two(tokens: np.ndarray, inverse: np.ndarray, num_distinct: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest two tokens of each distinct row; -1 where there is no second."""
    first, second = np.full(num_distinct, -1), np.full(num_distinct, -1)
    for k in range(len(tokens)):
        row = inverse[k]
        if first[row] < 0:
            first[row] = tokens[k]
        elif second[row] < 0:
            second[row] = tokens[k]
    return first, second


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
