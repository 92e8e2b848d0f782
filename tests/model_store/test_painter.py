"""The painter of sample scenes: seeded, of any size, exactly labelled, more varied the more clutter."""

from typing import Any

import numpy as np
import pytest

from model_store.demo.painter import CLASSES, paint_scene

SIZES = [(16, 16), (16, 300), (300, 16), (40, 1000), (1000, 40), (63, 111), (360, 480)]


def busy_patches(image: np.ndarray, size: int = 16) -> float:
    """The share of patches whose brightness varies by more than texture and noise."""
    height, width = (side // size * size for side in image.shape[:2])
    grey = image[:height, :width].astype(np.float32).mean(axis=2)
    patches = grey.reshape(height // size, size, width // size, size)
    return float((patches.std(axis=(1, 3)) > 12).mean())


def test_same_arguments_give_the_same_scene() -> None:
    first, second = (paint_scene(90, 120, clutter=0.7, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_seeds_give_different_scenes() -> None:
    first, second = (paint_scene(90, 120, clutter=0.7, seed=seed) for seed in (3, 4))
    assert (first[1] != second[1]).mean() > 0.05


@pytest.mark.parametrize("clutter", [0, 1])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_size(height: int, width: int, clutter: float) -> None:
    image, labels = paint_scene(height, width, clutter=clutter, seed=5)
    assert (image.dtype, image.shape) == (np.uint8, (height, width, 3))
    assert (labels.dtype, labels.shape) == (np.uint8, (height, width))
    assert labels.max() < len(CLASSES)
    assert image.std() > 5


def test_crowded_scenes_show_every_class() -> None:
    seen = {int(k) for seed in range(4) for k in np.unique(paint_scene(180, 240, clutter=1, seed=seed)[1])}
    assert seen == set(range(len(CLASSES)))


def test_empty_scenes_have_no_street_life() -> None:
    for seed in range(5):
        shown = {CLASSES[k] for k in np.unique(paint_scene(120, 160, clutter=0, seed=seed)[1])}
        assert {"sky", "road"} <= shown
        assert not shown & {"pole", "sign symbol", "car", "pedestrian", "bicyclist"}


def test_clutter_makes_patches_busy() -> None:
    empty, half, crowded = (
        np.mean([busy_patches(paint_scene(144, 192, clutter=clutter, seed=seed)[0]) for seed in range(4)])
        for clutter in (0.0, 0.5, 1.0)
    )
    assert empty < half < crowded
    assert crowded > 2 * empty


def test_labels_follow_the_edges_of_the_picture() -> None:
    """Neighbouring pixels differ more across a label boundary than within a region."""
    image, labels = paint_scene(240, 320, clutter=0.6, seed=1)
    step = np.abs(np.diff(image.astype(np.float32), axis=1)).mean(axis=2)
    boundary = np.diff(labels.astype(np.int64), axis=1) != 0
    assert step[boundary].mean() > 4 * step[~boundary].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 15}, "height: expected at least 16 pixels, got 15"),
        ({"width": 0}, "width: expected at least 16 pixels, got 0"),
        ({"clutter": 1.5}, r"clutter: expected a number within 0\.\.1, got 1\.5"),
        ({"clutter": float("nan")}, "clutter: .* got nan"),
        ({"seed": -1}, "seed: expected a non-negative integer, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paint_scene(**{"height": 32, "width": 32, "clutter": 0.5, "seed": 0, **arguments})
