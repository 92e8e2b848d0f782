"""How pictures become windows, on numbers worked out by hand from the official rule."""

import tracemalloc
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpm_ops import InferenceConfig, TooManyWindowsError
from mpm_ops.labels import label_map
from mpm_ops.windows import NORMALIZATIONS, cut_windows, normalize_windows, plan_windows

ADE20K = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
CITYSCAPES = InferenceConfig(im_size=1024, max_ratio=2, window_size=768, window_stride=512, normalization="vit")
PASCAL = InferenceConfig(im_size=520, max_ratio=8, window_size=480, window_stride=448, normalization="vit")


@pytest.mark.parametrize(
    ("inference", "original", "fitted", "frame", "tops", "lefts"),
    [
        (ADE20K, (512, 512), (512, 512), (512, 512), (0,), (0,)),
        (ADE20K, (480, 640), (512, 683), (512, 683), (0,), (0, 171)),
        (ADE20K, (640, 480), (683, 512), (683, 512), (0, 171), (0,)),
        (ADE20K, (3000, 2000), (768, 512), (768, 512), (0, 256), (0,)),
        (ADE20K, (512, 1024), (512, 1024), (512, 1024), (0,), (0, 512)),
        (ADE20K, (512, 1025), (512, 1025), (512, 1025), (0,), (0, 512, 513)),
        # Too long to fit with a short side of 512: 2048 long, then the short side is brought up to the window.
        (ADE20K, (100, 600), (341, 2048), (512, 3075), (0,), (0, 512, 1024, 1536, 2048, 2560, 2563)),
        (ADE20K, (1, 1), (512, 512), (512, 512), (0,), (0,)),
        (ADE20K, (3, 1), (1536, 512), (1536, 512), (0, 512, 1024), (0,)),
        (CITYSCAPES, (1024, 2048), (1024, 2048), (1024, 2048), (0, 256), (0, 512, 1024, 1280)),
        (PASCAL, (375, 500), (520, 693), (520, 693), (0, 40), (0, 213)),
    ],
)
def test_official_rule(
    inference: InferenceConfig,
    original: tuple[int, int],
    fitted: tuple[int, int],
    frame: tuple[int, int],
    tops: tuple[int, ...],
    lefts: tuple[int, ...],
) -> None:
    plan = plan_windows(*original, inference)
    assert (plan.original_size, plan.fitted_size, plan.frame_size) == (original, fitted, frame)
    assert (plan.tops, plan.lefts) == (tops, lefts)
    assert plan.num_windows == len(tops) * len(lefts)


@pytest.mark.parametrize("inference", [ADE20K, CITYSCAPES, PASCAL], ids=["ade20k", "cityscapes", "pascal"])
def test_windows_cover_the_frame_and_stay_inside(inference: InferenceConfig) -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (200, 2)).tolist()
    for height, width in sizes:
        if max(height, width) > 8 * min(height, width):
            continue
        plan = plan_windows(height, width, inference)
        for origins, side in zip((plan.tops, plan.lefts), plan.frame_size, strict=True):
            covered = np.zeros(side, bool)
            for origin in origins:
                assert 0 <= origin <= side - plan.window_size
                covered[origin : origin + plan.window_size] = True
            assert covered.all(), (height, width)


def test_a_panorama_gets_windows_until_there_are_too_many() -> None:
    assert plan_windows(40, 1200, ADE20K).num_windows == 31
    with pytest.raises(TooManyWindowsError, match=r"^a 2601x40 picture needs 67 windows of 512x512; at most 64 are"):
        plan_windows(40, 2601, ADE20K)


LONGER = replace(ADE20K, fit="longer")


@pytest.mark.parametrize(
    ("original", "fitted", "tops", "lefts"),
    [
        ((200, 8000), (51, 2048), (0,), (0, 512, 1024, 1536)),
        ((512, 1), (2048, 4), (0, 512, 1024, 1536), (0,)),
        ((100, 600), (341, 2048), (0,), (0, 512, 1024, 1536)),
    ],
)
def test_the_longer_side_decides_where_it_is_to(
    original: tuple[int, int], fitted: tuple[int, int], tops: tuple[int, ...], lefts: tuple[int, ...]
) -> None:
    plan = plan_windows(*original, LONGER)
    assert (plan.fitted_size, plan.frame_size, plan.tops, plan.lefts) == (fitted, fitted, tops, lefts)
    told = "at most 3 are allowed; where the longer side decides .fit: longer. it needs 3"
    with pytest.raises(TooManyWindowsError, match=told):
        plan_windows(512, 20_000, replace(ADE20K, im_size=384, window_size=512, max_windows_per_request=3))
    for size in ((512, 512), (480, 640), (1025, 512), (1, 1), (3, 1)):  # others it leaves alone
        assert plan_windows(*size, LONGER) == plan_windows(*size, ADE20K)


@pytest.mark.parametrize("normalization", ["vit", "deit"])
@pytest.mark.parametrize("size", [(10, 90), (90, 10)])
def test_what_is_missing_is_padded_with_the_mean(size: tuple[int, int], normalization: str) -> None:
    inference = InferenceConfig(
        im_size=32, max_ratio=2, window_size=32, window_stride=20, normalization=normalization, fit="longer"
    )
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    plan = plan_windows(*size, inference)
    short, long = min(plan.fitted_size), max(plan.fitted_size)
    assert (short, long) == (7, 64)
    windows = cut_windows(image, plan, inference)
    assert windows.shape == (3, 3, 32, 32)
    across = windows if size[1] == 90 else windows.mT
    assert across[:, :, short:].abs().max() < 0.01
    mean, std = (torch.tensor(stat)[:, None, None] for stat in NORMALIZATIONS[normalization])
    fitted = torch.from_numpy(cv2.resize(image, plan.fitted_size[::-1])).permute(2, 0, 1)
    seen = (fitted if size[1] == 90 else fitted.mT).float()
    assert torch.equal(across[1, :, :short], ((seen - mean) / std)[:, :, 20:52])
    assert torch.equal(normalize_windows(cut_windows(image, plan, inference, as_bytes=True), normalization), windows)


def test_labels_of_a_padded_picture_are_those_of_its_own_tokens() -> None:
    """Each column of patches has a class of its own; the rows below the picture have another one."""
    inference = replace(ADE20K, im_size=64, window_size=64, window_stride=64, max_ratio=2, fit="longer")
    plan = plan_windows(40, 320, inference)
    assert plan.fitted_size == (16, 128)
    logits = torch.zeros(2, 9, 4, 4)
    for window in range(2):
        for column in range(4):
            logits[window, 4 * window + column, :1, column] = 1
    logits[:, 8, 1:] = 100
    labels = label_map(logits, plan, 16).labels
    middle = np.arange(20, 320, 40)
    np.testing.assert_array_equal(labels[:, middle], np.tile(np.arange(8), (40, 1)))


@pytest.mark.parametrize(("height", "width"), [(1, 65535), (65535, 1)])
def test_a_line_of_pixels_is_refused_for_next_to_nothing(height: int, width: int) -> None:
    tracemalloc.start()
    with pytest.raises(TooManyWindowsError, match=f"^a {width}x{height} picture needs 2048 windows"):
        plan_windows(height, width, ADE20K)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_refuses_a_picture_without_pixels(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"^picture: expected at least 1x1 pixels, got {width}x{height}$"):
        plan_windows(height, width, ADE20K)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("vit", [-1.0, 1 / 255, 1.0]),
        ("deit", [-123.68 / 58.4, (128 - 116.28) / 57.12, (255 - 103.53) / 57.38]),
    ],
)
def test_normalisation(normalization: str, expected: list[float]) -> None:
    inference = InferenceConfig(im_size=32, max_ratio=4, window_size=32, window_stride=32, normalization=normalization)
    image = np.broadcast_to(np.array([0, 128, 255], np.uint8), (32, 32, 3)).copy()
    (window,) = cut_windows(image, plan_windows(32, 32, inference), inference)
    assert window.dtype == torch.float32
    torch.testing.assert_close(window, torch.tensor(expected)[:, None, None].expand(3, 32, 32), rtol=1e-6, atol=1e-6)


def test_windows_are_cut_row_by_row_where_the_plan_says() -> None:
    inference = InferenceConfig(im_size=50, max_ratio=2, window_size=32, window_stride=20, normalization="vit")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    plan = plan_windows(50, 70, inference)
    assert (plan.fitted_size, plan.tops, plan.lefts) == ((50, 70), (0, 18), (0, 20, 38))

    windows = cut_windows(image, plan, inference)
    expected = [
        (image[top : top + 32, left : left + 32].astype(np.float32) - 127.5) / 127.5
        for top in (0, 18)
        for left in (0, 20, 38)
    ]
    np.testing.assert_array_equal(windows.permute(0, 2, 3, 1), np.stack(expected))


def test_a_narrow_picture_is_widened_after_normalisation() -> None:
    inference = InferenceConfig(im_size=32, max_ratio=2, window_size=32, window_stride=32, normalization="vit")
    image = np.random.default_rng(1).integers(0, 256, (10, 64, 3), dtype=np.uint8)
    plan = plan_windows(10, 64, inference)
    assert (plan.fitted_size, plan.frame_size) == ((10, 64), (32, 204))

    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] - 127.5) / 127.5
    frame = F.interpolate(pixels, (32, 204), mode="bilinear", align_corners=False)[0]
    windows = cut_windows(image, plan, inference)
    assert len(windows) == 7
    torch.testing.assert_close(windows[-1], frame[:, :, 172:], rtol=0, atol=0)


@pytest.mark.parametrize("normalization", ["vit", "deit"])
@pytest.mark.parametrize("size", [(50, 70), (70, 50), (32, 32), (10, 64), (200, 131), (7, 5), (40, 41)], ids=str)
def test_the_same_to_the_bit_as_normalising_the_whole_picture(size: tuple[int, int], normalization: str) -> None:
    inference = InferenceConfig(im_size=40, max_ratio=2, window_size=32, window_stride=20, normalization=normalization)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image.setflags(write=False)
    plan = plan_windows(*size, inference)

    fitted = torch.from_numpy(cv2.resize(image, plan.fitted_size[::-1], interpolation=cv2.INTER_LINEAR))
    mean, std = (torch.tensor(stat) for stat in NORMALIZATIONS[normalization])
    frame = ((fitted - mean) / std).permute(2, 0, 1)[None]
    if plan.frame_size != plan.fitted_size:
        frame = F.interpolate(frame, plan.frame_size, mode="bilinear", align_corners=False)
    expected = [frame[0, :, top : top + 32, left : left + 32] for top in plan.tops for left in plan.lefts]
    windows = cut_windows(image, plan, inference)
    assert windows.is_contiguous()
    assert torch.equal(windows, torch.stack(expected))


def test_windows_are_the_callers_own() -> None:
    inference = InferenceConfig(im_size=32, max_ratio=2, window_size=32, window_stride=32, normalization="vit")
    image = np.full((32, 32, 3), 7, np.uint8)
    plan = plan_windows(32, 32, inference)
    first = cut_windows(image, plan, inference)
    kept = first.clone()
    cut_windows(image + 1, plan, inference).zero_()
    assert torch.equal(first, kept)
    assert torch.equal(cut_windows(image, plan, inference), kept)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("im_size", 0, "im_size: expected a positive integer, got 0"),
        ("im_size", "512", "im_size: expected a positive integer, got '512'"),
        ("max_ratio", -1, "max_ratio: expected a positive integer, got -1"),
        ("window_size", 1.5, r"window_size: expected a positive integer, got 1\.5"),
        ("window_stride", 513, "window_stride: expected at most window_size = 512, got 513"),
        ("normalization", "imagenet", "normalization: expected one of vit, deit, got 'imagenet'"),
        ("normalization", [], r"normalization: expected one of vit, deit, got \[\]"),
        ("fit", "longest", "fit: expected one of shorter, longer, got 'longest'"),
        ("max_windows_per_request", 0, "max_windows_per_request: expected a positive integer, got 0"),
    ],
)
def test_config_names_what_is_wrong(field: str, value: object, message: str) -> None:
    fields: dict[str, Any] = {"im_size": 512, "max_ratio": 4, "window_size": 512, "window_stride": 512}
    with pytest.raises(ValueError, match=f"^{message}$"):
        InferenceConfig(**(fields | {"normalization": "vit", field: value}))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 300), (300, 41), (64, 96)])
def test_bytes_that_a_device_normalises_are_the_same_numbers(
    normalization: str, height: int, width: int, device: torch.device
) -> None:
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=48, normalization=normalization)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image.flags.writeable = False  # as raw frames are
    plan = plan_windows(height, width, inference)
    given = cut_windows(image, plan, inference, as_bytes=True)
    if plan.frame_size == plan.fitted_size:
        assert (given.dtype, given.shape) == (torch.uint8, (plan.num_windows, 64, 64, 3))
    else:
        assert given.dtype == torch.float32
    found = normalize_windows(given.to(device), normalization).cpu()
    assert torch.equal(found, cut_windows(image, plan, inference))


def test_refuses_bytes_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"^windows: expected uint8 \[B, H, W, 3\], got torch.uint8 \[1, 3, 8, 8\]$"):
        normalize_windows(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "vit")
