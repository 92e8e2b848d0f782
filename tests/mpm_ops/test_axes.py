"""Pixels as mixtures of tokens, against torch's own interpolation of unit vectors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpm_ops.axes import _axis, axes
from mpm_ops.windows import WindowPlan

# origins, tokens of a window, patch size, window, frame, pixels
AXES = {
    "one window": ((0,), 4, 16, 64, 64, 64),
    "overlapping, enlarged": ((0, 48, 91), 4, 16, 64, 155, 401),
    "overlapping, reduced": ((0, 48, 91), 4, 16, 64, 155, 37),
    "gapless": ((0, 64), 4, 16, 64, 128, 128),
    "window is no multiple of the patch": ((0, 40, 70), 8, 8, 60, 130, 131),
    "many over a pixel": (tuple(range(0, 40, 5)), 4, 16, 64, 99, 60),
    "one token": ((0, 3), 1, 8, 8, 11, 5),
    "one pixel": ((0,), 4, 16, 64, 64, 1),
}


def by_torch(origins: tuple[int, ...], grid: int, patch_size: int, window: int, frame: int, pixels: int) -> np.ndarray:
    """[pixels, tokens of all windows] weights."""
    units = torch.eye(grid, dtype=torch.float64)[None]
    upsampled = F.interpolate(units, size=grid * patch_size, mode="linear", align_corners=False)[0, :, :window]
    total = torch.zeros(len(origins) * grid, frame, dtype=torch.float64)
    count = torch.zeros(frame, dtype=torch.float64)
    for i, origin in enumerate(origins):
        total[i * grid : (i + 1) * grid, origin : origin + window] = upsampled
        count[origin : origin + window] += 1
    return F.interpolate((total / count)[None], size=pixels, mode="linear", align_corners=False)[0].T.numpy()


@pytest.mark.parametrize("name", AXES)
def test_weights_and_their_zeros_are_those_of_interpolating(name: str) -> None:
    axis = _axis(*AXES[name])
    expected = by_torch(*AXES[name])
    for cell, (start, stop) in enumerate(zip(axis.starts[:-1], axis.starts[1:], strict=True)):
        tokens = axis.tokens[cell, : axis.counts[cell]]
        assert (np.diff(tokens) > 0).all()
        weights = axis.weights[start:stop]
        assert (weights[:, : len(tokens)] > 0).all()
        assert (weights[:, len(tokens) :] == 0).all()
        np.testing.assert_allclose(weights[:, : len(tokens)], expected[start:stop, tokens], rtol=1e-6)
        assert (np.delete(expected[start:stop], tokens, axis=1) == 0).all()


@pytest.mark.parametrize("name", AXES)
def test_cells_are_as_long_as_they_can_be(name: str) -> None:
    axis = _axis(*AXES[name])
    assert (axis.starts[0], axis.starts[-1]) == (0, AXES[name][-1])
    used = [tuple(axis.tokens[i, : axis.counts[i]]) for i in range(len(axis.counts))]
    assert all(a != b for a, b in pairwise(used))


@pytest.mark.parametrize("name", AXES)
def test_matrix_of_some_pixels(name: str) -> None:
    axis, expected = _axis(*AXES[name]), by_torch(*AXES[name])
    for start, stop in ((0, 1), (0, 50), (30, 62), (len(expected) - 1, len(expected) + 9)):
        if start >= len(expected):
            continue
        tokens, weights = axis.matrix(start, stop)
        np.testing.assert_allclose(weights, expected[start:stop][:, tokens], rtol=1e-6)
        assert (weights > 0).any(axis=0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_rows_and_columns_of_a_plan() -> None:
    plan = WindowPlan((20, 30), (64, 96), (64, 96), 64, (0,), (0, 32))
    rows, columns = axes(plan, (4, 4), 16)
    np.testing.assert_array_equal(rows.weights, _axis((0,), 4, 16, 64, 64, 20).weights)
    np.testing.assert_array_equal(columns.weights, _axis((0, 32), 4, 16, 64, 96, 30).weights)
