"""The labels of a picture on the CPU, cell by cell, comparing only classes that can win there.

The pixels of a cell are convex combinations of the cell's tokens, all weights positive. So a class wins the
whole cell if it wins at each of its tokens, as in most cells of a real picture; and a class that lies nowhere
above some other class at these tokens wins none of its pixels. What is left is two or three classes along borders.
"""

import numpy as np

from ._jit import jit
from .axes import Axis

Arrays = tuple[np.ndarray, ...]  # of an Axis: starts, tokens, counts, weights

_MAX_RIVALS = 8  # winning classes of a cell that others are compared with; more only prune random logits further


def label_cells(tokens: np.ndarray, rows: Axis, columns: Axis, labels: np.ndarray) -> None:
    """Write the class that is largest at every pixel (ties: the lowest id).

    Args:
        tokens: float32 [tokens down, tokens across, K], contiguous.
        rows, columns: how tokens mix into pixels.
        labels: uint8 or uint16 [H, W], filled.
    """
    num_classes = tokens.shape[2]
    most_rows, most_columns = rows.tokens.shape[1], columns.tokens.shape[1]
    widest = int(np.diff(columns.starts).max())
    _label_cells(
        tokens,
        tokens.argmax(axis=2),
        (rows.starts, rows.tokens, rows.counts, rows.weights),
        (columns.starts, columns.tokens, columns.counts, np.ascontiguousarray(columns.weights.T)),
        labels,
        np.empty(num_classes, np.bool_),
        np.empty(num_classes, np.bool_),
        np.empty(num_classes, np.int64),
        np.empty((most_rows, most_columns, num_classes), np.float32),
        np.empty((most_columns, num_classes), np.float32),
        np.empty((2, widest), np.float32),
        np.empty(widest, np.int32),
    )


@jit
def _label_cells(
    tokens: np.ndarray,  # [tokens down, tokens across, K]
    winners: np.ndarray,  # [tokens down, tokens across]
    rows: Arrays,
    columns: Arrays,  # its weights [most, pixels]
    labels: np.ndarray,
    # scratch
    alive: np.ndarray,
    beaten: np.ndarray,
    candidates: np.ndarray,
    corners: np.ndarray,
    line: np.ndarray,
    values: np.ndarray,
    found: np.ndarray,
) -> None:
    row_starts, row_tokens, row_counts, row_weights = rows
    column_starts, column_tokens, column_counts, column_weights = columns
    for i in range(len(row_counts)):
        top, bottom = row_starts[i], row_starts[i + 1]
        down = row_tokens[i, : row_counts[i]]
        for j in range(len(column_counts)):
            left, right = column_starts[j], column_starts[j + 1]
            across = column_tokens[j, : column_counts[j]]
            num_candidates = _candidates(tokens, winners, down, across, alive, beaten, candidates)
            if num_candidates == 1:
                labels[top:bottom, left:right] = candidates[0]
                continue
            for r in range(len(down)):
                for c in range(len(across)):
                    logits, corner = tokens[down[r], across[c]], corners[r, c]
                    for n in range(num_candidates):
                        corner[n] = logits[candidates[n]]
            for y in range(top, bottom):
                for c in range(len(across)):
                    mixed = line[c]
                    mixed[:num_candidates] = 0
                    for r in range(len(down)):
                        share, corner = row_weights[y, r], corners[r, c]
                        for n in range(num_candidates):
                            mixed[n] += share * corner[n]
                _label_line(line, column_weights, left, right, len(across), candidates, num_candidates, values, found)
                for x in range(right - left):
                    labels[y, left + x] = found[x]


@jit
def _candidates(
    tokens: np.ndarray,
    winners: np.ndarray,
    down: np.ndarray,
    across: np.ndarray,
    alive: np.ndarray,
    beaten: np.ndarray,
    candidates: np.ndarray,
) -> int:
    """Fill in the classes that may win somewhere in the cell, in rising order, and return their number."""
    first = winners[down[0], across[0]]
    candidates[0] = first
    num_rivals = 1
    for r in down:
        for c in across:
            winner = winners[r, c]
            known = False
            for n in range(num_rivals):
                known |= candidates[n] == winner
            if not known and num_rivals < min(_MAX_RIVALS, len(candidates)):
                candidates[num_rivals] = winner
                num_rivals += 1
    if num_rivals == 1:
        return 1
    alive[:] = True
    for n in range(num_rivals):
        rival = candidates[n]
        beaten[:] = True
        for r in down:
            for c in across:
                logits = tokens[r, c]
                level = logits[rival]
                for k in range(len(alive)):
                    beaten[k] &= logits[k] <= level
        beaten[rival] = False
        # The rival is the lowest of equals at the token it wins: what it ties with everywhere has a higher id.
        for k in range(len(alive)):
            alive[k] &= not beaten[k]
    count = 0
    for k in range(len(alive)):
        if alive[k]:
            candidates[count] = k
            count += 1
    return count


@jit
def _label_line(
    line: np.ndarray,
    weights: np.ndarray,
    left: int,
    right: int,
    num_tokens: int,
    candidates: np.ndarray,
    num_candidates: int,
    values: np.ndarray,
    found: np.ndarray,
) -> None:
    """The best candidate at each pixel of a row of a cell."""
    width = right - left
    best, value, label = values[0, :width], values[1, :width], found[:width]
    best[:] = -np.inf
    label[:] = candidates[0]
    if num_tokens == 2:
        first, second = weights[0, left:right], weights[1, left:right]
        for n in range(num_candidates):
            k, a, b = np.int32(candidates[n]), line[0, n], line[1, n]
            for x in range(width):
                v = first[x] * a + second[x] * b
                better = v > best[x]
                best[x] = v if better else best[x]
                label[x] = k if better else label[x]
        return
    for n in range(num_candidates):
        value[:] = 0
        for c in range(num_tokens):
            a, share = line[c, n], weights[c, left:right]
            for x in range(width):
                value[x] += share[x] * a
        k = np.int32(candidates[n])
        for x in range(width):
            better = value[x] > best[x]
            best[x] = value[x] if better else best[x]
            label[x] = k if better else label[x]
