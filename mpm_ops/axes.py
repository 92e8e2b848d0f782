"""How the tokens of all windows mix into the pixels of a picture, along one axis.

Upsampling a window, averaging overlapping windows and resizing to the picture are all bilinear and work on
rows and columns apart: along each axis a pixel is a weighted mean of a few tokens, with positive weights.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .windows import WindowPlan

Taps = tuple[np.ndarray, np.ndarray]  # indices and weights


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """Cells of pixels along one axis; the pixels of a cell mix the same tokens, in other proportions.

    Attributes:
        starts: [cells + 1] int64, the first pixel of each cell, and the number of pixels.
        tokens: [cells, most] int64, tokens of a cell in rising order; beyond its count meaningless.
        counts: [cells] int64, how many tokens a cell has.
        weights: [pixels, most] float32, of the tokens of the pixel's cell; 0 beyond its count.
    """

    starts: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    def matrix(self, start: int, stop: int) -> Taps:
        """The tokens [n] that pixels start to stop mix, and their weights, float32 [stop - start, n]."""
        weights = self.weights[start:stop]
        cells = np.searchsorted(self.starts, np.arange(start, start + len(weights)), side="right") - 1
        tokens = self.tokens[cells]
        used = np.unique(tokens[weights > 0])
        dense = np.zeros((len(weights), len(used)), np.float32)
        pixel, tap = np.nonzero(weights)
        dense[pixel, np.searchsorted(used, tokens[pixel, tap])] = weights[pixel, tap]
        return used, dense


def axes(plan: WindowPlan, grid: tuple[int, int], patch_size: int) -> tuple[Axis, Axis]:
    """Rows and columns of a picture, for windows of grid[0] x grid[1] tokens.

    Tokens are numbered window by window along the axis.
    """
    return tuple(  # type: ignore[return-value]
        _axis(origins, tokens, patch_size, plan.window_size, frame, pixels)
        for origins, tokens, frame, pixels in zip(
            (plan.tops, plan.lefts), grid, plan.frame_size, plan.original_size, strict=True
        )
    )


@lru_cache(maxsize=128)  # pictures of one source tend to have one size; a long axis takes some 100 kB
def _axis(origins: tuple[int, ...], grid: int, patch_size: int, window: int, frame: int, pixels: int) -> Axis:
    frame_index, frame_weights = _resize_taps(frame, pixels)
    token_index, token_weights = _frame_taps(origins, grid, patch_size, window, frame)
    return _cells(
        token_index[frame_index].reshape(pixels, -1),
        (frame_weights[..., None] * token_weights[frame_index]).reshape(pixels, -1),
    )


def _resize_taps(source: int, target: int) -> Taps:
    """Bilinear resizing as torch does it with align_corners=False: two indices and weights a pixel."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    first = np.minimum(position.astype(np.int64), source - 1)
    share = position - first
    return np.stack([first, np.minimum(first + 1, source - 1)], axis=1), np.stack([1 - share, share], axis=1)


def _frame_taps(origins: tuple[int, ...], grid: int, patch_size: int, window: int, frame: int) -> Taps:
    """Each window upsampled to its pixels, the mean taken where windows overlap."""
    index, weights = _resize_taps(grid, grid * patch_size)
    if frame < window:
        index = np.minimum(index, (frame - 1) // patch_size)  # what lies in the padding mixes into no pixel
    start = np.array(origins)
    position = np.arange(frame)
    past = np.searchsorted(start, position, side="right")  # one past the last window that covers each pixel
    first = np.searchsorted(start, position - window, side="right")
    slots = first[:, None] + np.arange((past - first).max())  # [frame, most windows over a pixel]
    covers = slots < past[:, None]
    slots = np.where(covers, slots, first[:, None])
    inside = position[:, None] - start[slots]
    shares = np.where(covers, 1 / (past - first)[:, None], 0)
    tokens = slots[..., None] * grid + index[inside]
    return tokens.reshape(frame, -1), (shares[..., None] * weights[inside]).reshape(frame, -1)


def _cells(index: np.ndarray, weights: np.ndarray) -> Axis:
    """Add up the taps that are one token, drop those without weight, and gather neighbours with the same tokens."""
    pixels = len(index)
    width = int(index.max()) + 1
    keys, inverse = np.unique(np.arange(pixels)[:, None] * width + index, return_inverse=True)
    total = np.bincount(inverse.ravel(), weights.ravel())
    keys, total = keys[total > 0], total[total > 0]
    pixel, token = keys // width, keys % width
    counts = np.bincount(pixel, minlength=pixels)
    most = int(counts.max())
    place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[pixel]
    tokens = np.full((pixels, most), -1)
    dense = np.zeros((pixels, most), np.float32)
    tokens[pixel, place], dense[pixel, place] = token, total
    starts = np.flatnonzero(np.r_[True, (tokens[1:] != tokens[:-1]).any(axis=1)])
    return Axis(np.r_[starts, pixels], np.maximum(tokens[starts], 0), counts[starts], dense)
