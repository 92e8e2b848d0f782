"""Pictures for people."""

import tracemalloc
from itertools import product

import numpy as np
import pytest

from handlers.api.formats import views
from handlers.api.formats.views import confidence_view, overlay_view, tokens_view
from mpm_ops import InferenceConfig
from mpm_ops.classes import Classes, default_colors
from mpm_ops.windows import WindowPlan, plan_windows

PATCH = 16
GRID = 4
INFERENCE = InferenceConfig(im_size=64, max_ratio=8, window_size=64, window_stride=48, normalization="vit")
CLASSES = Classes(("sky", "road", "a class with a rather long name"), default_colors(3))
SIZES = [(1, 1), (1, 7), (7, 1), (3, 24), (64, 64), (48, 300), (300, 48), (250, 250), (210, 900), (900, 210), (61, 67)]


@pytest.fixture(params=[views._STRIP_PIXELS, 500], ids=["whole", "in strips"], autouse=True)
def _strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are drawn as a whole, and a few rows at a time."""
    monkeypatch.setattr(views, "_STRIP_PIXELS", request.param)


def test_strips_are_no_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_windows(250, 320, INFERENCE)
    maps = [np.arange(GRID * GRID) // 3 for _ in range(plan.num_windows)]
    labels = np.random.default_rng(0).integers(0, 3, (5, 8)).astype(np.uint8).repeat(50, axis=0).repeat(40, axis=1)

    def draw() -> list[np.ndarray]:
        return [
            tokens_view(photo(250, 320), plan, maps, PATCH, (16, 6)),
            overlay_view(photo(250, 320), labels, CLASSES),
            confidence_view(np.linspace(0, 1, 250 * 320, dtype=np.float32).reshape(250, 320)),
        ]

    drawn = draw()
    monkeypatch.setattr(views, "_STRIP_PIXELS", 10**9)
    for strips, whole in zip(drawn, draw(), strict=True):
        np.testing.assert_array_equal(strips, whole)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pixels of a large picture hardly more than the token of each, and what is shown."""
    monkeypatch.setattr(views, "_STRIP_PIXELS", 2**14)
    side = 1500
    plan = plan_windows(side, side, INFERENCE)
    image, maps = photo(side, side), [np.arange(GRID * GRID) // 3 for _ in range(plan.num_windows)]
    tracemalloc.start()
    tokens_view(image, plan, maps, PATCH, (16, 6))
    peak = tracemalloc.get_traced_memory()[1] / side**2
    tracemalloc.stop()
    assert peak < 10


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)


def unmerged(plan: WindowPlan) -> list[np.ndarray]:
    return [np.arange(GRID * GRID) for _ in range(plan.num_windows)]


@pytest.mark.parametrize(("height", "width"), SIZES)
class TestAnySize:
    def test_overlay(self, height: int, width: int) -> None:
        labels = np.random.default_rng(0).integers(0, 3, (height, width)).astype(np.uint8)
        assert_picture(overlay_view(photo(height, width), labels, CLASSES), height, width)

    def test_confidence(self, height: int, width: int) -> None:
        probability = np.random.default_rng(0).random((height, width), dtype=np.float32)
        assert_picture(confidence_view(probability), height, width)

    def test_tokens(self, height: int, width: int) -> None:
        plan = plan_windows(height, width, INFERENCE)
        maps = [np.arange(GRID * GRID) // 2 for _ in range(plan.num_windows)]
        shown = tokens_view(photo(height, width), plan, maps, PATCH, (16 * plan.num_windows, 8 * plan.num_windows))
        assert_picture(shown, height, width)


def assert_picture(shown: np.ndarray, height: int, width: int) -> None:
    assert shown.shape == (height, width, 3)
    assert shown.dtype == np.uint8


def test_inputs_are_left_alone() -> None:
    image, labels = photo(300, 300), np.zeros((300, 300), np.uint8)
    for array in (image, labels):
        array.setflags(write=False)
    overlay_view(image, labels, CLASSES)
    plan = plan_windows(300, 300, INFERENCE)
    tokens_view(image, plan, unmerged(plan), PATCH, (16,))


class TestOverlay:
    def test_regions_show_their_class(self) -> None:
        labels = np.zeros((60, 60), np.uint8)
        labels[:, 30:] = 1
        shown = overlay_view(np.full((60, 60, 3), 100, np.uint8), labels, CLASSES)
        for column, label in ((10, 0), (50, 1)):
            expected = 0.45 * 100 + 0.55 * CLASSES.colors[label]
            np.testing.assert_allclose(shown[10, column], expected, atol=1)
        assert (shown[10, 29] > shown[10, 10]).all()  # the outline

    def test_legend_names_at_most_what_fits(self) -> None:
        classes = Classes(tuple(f"class {i}" for i in range(40)), default_colors(40))
        labels = (np.arange(240)[None] % 40).repeat(240, axis=0).astype(np.uint8)
        bare = overlay_view(np.zeros((240, 240, 3), np.uint8), labels, classes)[:100]
        np.testing.assert_array_equal(bare, bare[:1].repeat(100, axis=0))  # no plate in the upper part

    def test_small_pictures_have_no_legend(self) -> None:
        labels = np.zeros((150, 150), np.uint8)
        shown = overlay_view(np.zeros((150, 150, 3), np.uint8), labels, CLASSES)
        assert (shown == shown[0, 0]).all()


class TestConfidence:
    def test_surer_is_brighter(self) -> None:
        shown = confidence_view(np.linspace(0, 1, 50, dtype=np.float32)[None].repeat(50, axis=0))
        brightness = shown[0].astype(int).sum(axis=1)
        assert (np.diff(brightness) >= -3).all()
        assert brightness[-1] > brightness[0] + 200

    @pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 1.0001])
    def test_rounding_beyond_the_range(self, value: float) -> None:
        within = confidence_view(np.full((2, 2), np.clip(value, 0, 1), np.float32))
        np.testing.assert_array_equal(confidence_view(np.full((2, 2), value, np.float32)), within)


class TestTokens:
    def test_nothing_merged_is_the_picture(self) -> None:
        image = photo(64, 64)
        plan = plan_windows(64, 64, INFERENCE)
        np.testing.assert_array_equal(tokens_view(image, plan, unmerged(plan), PATCH, (16, 16)), image)

    def test_merged_patches_are_flat_and_the_rest_is_untouched(self) -> None:
        image = photo(64, 64)
        merge_map = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 5])  # 0 and 1; 6 and 15
        shown = tokens_view(image, plan_windows(64, 64, INFERENCE), [merge_map], PATCH, (16, 14))

        for patch in range(16):
            top, left = PATCH * (patch // GRID), PATCH * (patch % GRID)
            inner = np.s_[top + 2 : top + PATCH - 2, left + 2 : left + PATCH - 2]
            if patch in (0, 1, 6, 15):
                assert (shown[inner] == shown[inner][0, 0]).all(), patch
            else:
                np.testing.assert_array_equal(shown[inner], image[inner])
        np.testing.assert_array_equal(shown[8, 8], shown[8, 24])
        np.testing.assert_array_equal(shown[24, 40], shown[56, 56])
        assert (shown[8, 15] == shown[8, 8]).all()  # no outline between patches of one token
        assert (shown[15, 8] > shown[8, 8]).all()  # but around them

    def test_tint_tells_how_many_patches(self) -> None:
        image = np.full((64, 64, 3), 100, np.uint8)
        merge_map = np.array([0, 0, 1, 2, 3, 3, 3, 4, 5, 5, 5, 5, 6, 6, 6, 6])
        merge_map[12:] = 5  # eight patches
        shown = tokens_view(image, plan_windows(64, 64, INFERENCE), [merge_map], PATCH, (16, 6))
        two, one, three, eight = shown[8, 8], shown[8, 40], shown[24, 8], shown[40, 8]
        assert one.tolist() == [100, 100, 100]
        assert len({tuple(color) for color in (one, two, three, eight)}) == 4

    @pytest.mark.parametrize(("height", "width"), [(64, 200), (200, 64), (97, 131), (33, 250), (2, 9)])
    def test_overlapping_windows(self, height: int, width: int) -> None:
        """Each pixel belongs to the window whose middle is nearest, as a plain loop over pixels finds it."""
        plan = plan_windows(height, width, INFERENCE)
        assert plan.num_windows > 1
        random = np.random.default_rng(0)
        maps = [
            np.unique(random.integers(0, 10, GRID * GRID), return_inverse=True)[1] for _ in range(plan.num_windows)
        ]
        shown = tokens_view(np.zeros((height, width, 3), np.uint8), plan, maps, PATCH, (1, 1))

        origins = list(product(plan.tops, plan.lefts))
        owner = np.full((height, width), -1)
        merged = np.zeros((height, width), bool)
        for row, column in product(range(height), range(width)):
            y = (row + 0.5) * plan.frame_size[0] / height
            x = (column + 0.5) * plan.frame_size[1] / width
            distances = [(abs(y - top - 32), abs(x - left - 32)) for top, left in origins]
            nearest = [i for i, d in enumerate(distances) if d == min(distances, key=sum)]
            if len(nearest) == 1:
                (window,) = nearest
                patch = int((y - origins[window][0]) // PATCH) * GRID + int((x - origins[window][1]) // PATCH)
                owner[row, column] = window * GRID * GRID + patch
                merged[row, column] = (maps[window] == maps[window][patch]).sum() > 1
        inner = owner >= 0  # away from outlines
        inner[:, :-1] &= owner[:, :-1] == owner[:, 1:]
        inner[:-1] &= owner[:-1] == owner[1:]
        np.testing.assert_array_equal(shown.any(axis=2)[inner], merged[inner])

    def test_caption_tells_the_counts(self) -> None:
        image = np.zeros((300, 300, 3), np.uint8)
        plan = plan_windows(300, 300, INFERENCE)
        captions = [
            tokens_view(image, plan, unmerged(plan), PATCH, counts)
            for counts in [(16,), (16, 9), (16, 12, 9), (16, 8)]
        ]
        assert all(caption[200:].any() for caption in captions)
        assert len({caption.tobytes() for caption in captions}) == len(captions)
