"""Label maps against the plain way: upsample, average, resize, softmax, argmax."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpm_ops import InferenceConfig
from mpm_ops.axes import _axis
from mpm_ops.labels import label_map
from mpm_ops.windows import WindowPlan, plan_windows

NEAR_TIE = 1e-5

# Name: picture (height, width), im_size, max_ratio, window, stride, patch size.
PLANS = {
    "one window": ((64, 64), 64, 4, 64, 64, 16),
    "enlarged": ((130, 131), 64, 4, 64, 64, 16),
    "reduced": ((23, 19), 64, 4, 64, 64, 16),
    "one pixel": ((1, 1), 64, 4, 64, 64, 16),
    "two tokens": ((2, 1), 32, 4, 32, 32, 32),
    "tile borders": ((256, 129), 128, 4, 128, 96, 16),
    "overlap both ways": ((97, 141), 100, 4, 64, 48, 16),
    "nearly all overlap": ((60, 90), 70, 4, 64, 5, 16),
    "tall": ((301, 37), 64, 4, 64, 40, 8),
    "wide": ((29, 450), 64, 4, 64, 64, 16),
    "window is no multiple of the patch": ((75, 130), 65, 8, 60, 40, 8),
}


def make_plan(name: str) -> tuple[WindowPlan, int]:
    size, im_size, max_ratio, window, stride, patch_size = PLANS[name]
    inference = InferenceConfig(
        im_size=im_size, max_ratio=max_ratio, window_size=window, window_stride=stride, normalization="vit"
    )
    return plan_windows(*size, inference), patch_size


def make_logits(plan: WindowPlan, patch_size: int, num_classes: int, *, smooth: bool) -> Tensor:
    grid = -(-plan.window_size // patch_size)
    generator = torch.Generator().manual_seed(num_classes)
    if not smooth:
        return 3 * torch.randn(plan.num_windows, num_classes, grid, grid, generator=generator)
    coarse = 6 * torch.randn(plan.num_windows, num_classes, 2, 2, generator=generator)
    return F.interpolate(coarse, (grid, grid), mode="bilinear", align_corners=True)


def plain_way(logits: Tensor, plan: WindowPlan, patch_size: int) -> Tensor:
    """[K, H, W] logits of the picture in float64, class by height by width."""
    height, width = plan.frame_size
    total = torch.zeros(logits.shape[1], height, width, dtype=torch.float64)
    count = torch.zeros(height, width)
    size = plan.window_size
    origins = [(top, left) for top in plan.tops for left in plan.lefts]
    for (top, left), window in zip(origins, logits.double(), strict=True):
        padded = [side * patch_size for side in window.shape[1:]]
        pixels = F.interpolate(window[None], padded, mode="bilinear", align_corners=False)[0, :, :size, :size]
        total[:, top : top + size, left : left + size] += pixels
        count[top : top + size, left : left + size] += 1
    return F.interpolate((total / count)[None], plan.original_size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("smooth", [False, True], ids=["random", "smooth"])
@pytest.mark.parametrize("num_classes", [1, 2, 11, 150])
@pytest.mark.parametrize("name", PLANS)
def test_labels_and_confidence_of_the_plain_way(name: str, num_classes: int, smooth: bool) -> None:
    plan, patch_size = make_plan(name)
    logits = make_logits(plan, patch_size, num_classes, smooth=smooth)
    expected = plain_way(logits, plan, patch_size)
    top = expected.topk(min(2, num_classes), dim=0).values
    decided = (top[0] - top[-1] > NEAR_TIE).numpy() | (num_classes == 1)
    assert decided.mean() > 0.99

    for confidence in (False, True):  # two ways to the same labels
        found = label_map(logits, plan, patch_size, confidence=confidence)
        assert found.labels.shape == plan.original_size
        np.testing.assert_array_equal(found.labels[decided], expected.argmax(dim=0).numpy()[decided])
    assert found.confidence is not None
    assert found.confidence.dtype == np.float32
    np.testing.assert_allclose(found.confidence, expected.softmax(dim=0).amax(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, np.uint8), (257, np.uint16), (300, np.uint16)])
def test_ids_take_two_bytes_beyond_256_classes(num_classes: int, dtype: type) -> None:
    plan, patch_size = make_plan("overlap both ways")
    logits = make_logits(plan, patch_size, num_classes, smooth=False)
    logits[:, -1, :2] = 20  # the last class wins somewhere
    found = label_map(logits, plan, patch_size)
    assert found.labels.dtype == dtype
    assert found.labels.max() == num_classes - 1
    expected = plain_way(logits, plan, patch_size).argmax(dim=0).numpy()
    assert (found.labels == expected).mean() > 0.999
    assert found.confidence is None


@pytest.mark.parametrize("name", PLANS)
def test_a_few_strong_classes_among_many_weak_ones(name: str) -> None:
    """As a trained network's: regions of one class, borders of two or three, and classes that never win."""
    plan, patch_size = make_plan(name)
    logits = torch.cat(
        [make_logits(plan, patch_size, 4, smooth=True), make_logits(plan, patch_size, 60, smooth=False) - 9], 1
    )
    logits = logits[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    logits = logits[:, :, torch.arange(logits.shape[2]) // 2 * 2]  # merged patches share their logits
    expected = plain_way(logits, plan, patch_size)
    top = expected.topk(2, dim=0).values
    decided = (top[0] - top[1] > NEAR_TIE).numpy()
    assert decided.mean() > 0.99
    found = label_map(logits, plan, patch_size).labels
    np.testing.assert_array_equal(found[decided], expected.argmax(dim=0).numpy()[decided])


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("name", ["one window", "overlap both ways", "tile borders"])
def test_of_equal_classes_the_lowest_id_wins(name: str, confidence: bool) -> None:
    plan, patch_size = make_plan(name)
    logits = make_logits(plan, patch_size, 3, smooth=False)[:, [2, 0, 1, 2, 0, 1, 0]]
    assert label_map(logits, plan, patch_size, confidence=confidence).labels.max() <= 2


def test_a_class_that_wins_nowhere_at_the_tokens_may_win_between_them() -> None:
    """Second best at both of two neighbours, and best halfway."""
    plan, patch_size = make_plan("one window")
    logits = torch.full((1, 3, 4, 4), -9.0)
    logits[0, 0, :, :2], logits[0, 0, :, 2:] = 5, -5
    logits[0, 2, :, :2], logits[0, 2, :, 2:] = -5, 5
    logits[0, 1] = 3
    labels = label_map(logits, plan, patch_size).labels
    np.testing.assert_array_equal(labels[:, [0, 31, 32, 63]], np.broadcast_to([0, 1, 1, 2], (64, 4)))


def test_no_number_at_all_is_still_a_class() -> None:
    plan, patch_size = make_plan("overlap both ways")
    for fraction in (0.1, 1.0):
        logits = make_logits(plan, patch_size, 5, smooth=False)
        logits[torch.rand(logits.shape) < fraction] = torch.nan
        assert label_map(logits, plan, patch_size).labels.max() < 5


def test_several_threads_at_once() -> None:
    plan, patch_size = make_plan("overlap both ways")
    many = [make_logits(plan, patch_size, num_classes, smooth=False) for num_classes in (2, 11, 150) * 8]
    expected = [label_map(logits, plan, patch_size).labels for logits in many]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda logits: label_map(logits, plan, patch_size).labels, many))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_half_precision_logits_are_labelled_in_float32() -> None:
    plan, patch_size = make_plan("enlarged")
    logits = make_logits(plan, patch_size, 11, smooth=True).bfloat16()
    expected = label_map(logits.float(), plan, patch_size).labels
    np.testing.assert_array_equal(label_map(logits, plan, patch_size).labels, expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("size", [(900, 700), (300, 2000), (40, 2540)], ids=str)
def test_nothing_of_class_by_height_by_width_is_ever_held(size: tuple[int, int], confidence: bool) -> None:
    """The last one is a panorama of 64 windows."""
    inference = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
    plan = plan_windows(*size, inference)
    logits = make_logits(plan, 16, 60, smooth=True)
    label_map(logits, plan, 16)  # compile
    _axis.cache_clear()
    tracemalloc.start()
    with LargestTensor() as largest:
        found = label_map(logits, plan, 16, confidence=confidence)
    peak_bytes = tracemalloc.get_traced_memory()[1]  # of arrays: torch's memory is its own
    tracemalloc.stop()
    tile = 128 * min(128, size[0]) * 60
    assert largest.numel <= max(logits.numel(), tile)
    assert not confidence or largest.numel >= tile
    kept = found.labels.nbytes + (found.confidence.nbytes if found.confidence is not None else 0)
    assert kept <= peak_bytes <= kept + 64 * 2**20 // 10


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (5, 4, 4), (0, 5, 4, 4)], ids=str)
def test_refuses_logits_of_another_plan(shape: tuple[int, ...]) -> None:
    plan, patch_size = make_plan("one window")
    with pytest.raises(ValueError, match=r"^logits: expected \[1, K, Gh, Gw\], got \["):
        label_map(torch.zeros(shape), plan, patch_size)
