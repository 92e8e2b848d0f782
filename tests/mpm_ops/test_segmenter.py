"""The Segmenter as a whole: what it accepts, what it returns, and that batching is invisible."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig, TooManyWindowsError
from mpm_ops.windows import cut_windows, normalize_windows, plan_windows

GOOD = {"image_size": (64, 64), "patch_size": 16, "d_model": 64, "n_heads": 1, "n_layers": 2, "n_cls": 3}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 0, "patch_size: expected a positive integer, got 0"),
        ("n_layers", 1.5, r"n_layers: expected a positive integer, got 1\.5"),
        ("n_cls", "11", "n_cls: expected a positive integer, got '11'"),
        ("decoder_layers", -1, "decoder_layers: expected a positive integer, got -1"),
        ("image_size", (64, 65), r"image_size: expected multiples of the patch size 16, got \(64, 65\)"),
        ("image_size", (), r"image_size: expected multiples of the patch size 16, got \(\)"),
        ("d_model", 128, "d_model: expected n_heads x 64 = 64, got 128"),
        ("decoder", "unet", "decoder: expected one of mask_transformer, linear, got 'unet'"),
        ("drop_path_rate", None, r"drop_path_rate: expected a number in \[0, 1\), got None"),
    ],
)
def test_config_names_what_is_wrong(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SegmenterConfig(**(GOOD | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"schedule": (3,)}, {"schedule": (2, 1)}, {"align": 0}], ids=str)
def test_refuses_a_schedule_or_align_that_does_not_fit(
    fields: dict[str, Any], tiny_model: Callable[..., Segmenter]
) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))}: expected"):
        tiny_model(**fields)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 70), (1, 1), (16, 130)])
@pytest.mark.parametrize("fields", [{}, {"schedule": (0, 2)}, {"decoder": "linear", "distilled": True}], ids=str)
def test_one_logit_vector_per_patch(
    height: int, width: int, fields: dict[str, Any], tiny_model: Callable[..., Segmenter]
) -> None:
    logits = tiny_model(**fields).window_logits(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 5, -(-height // 16), -(-width // 16))
    assert logits.isfinite().all()
    assert not logits.requires_grad


def test_windows_are_padded_with_zeros_on_the_right_and_bottom(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1,))
    window = torch.randn(1, 3, 50, 70)
    padded = torch.zeros(1, 3, 64, 80)
    padded[:, :, :50, :70] = window
    assert torch.equal(model.window_logits(window), model.window_logits(padded))


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_merged_patches_share_their_logits(decoder: str, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1, 2), decoder=decoder)
    windows = torch.randn(2, 3, 64, 80)
    batch = model.embed(windows)
    for stage in model.stages:
        batch = model.run_blocks(stage, batch)
        batch = model.merge(batch) if stage.merges else batch
    assert batch.merge_maps is not None
    for merge_map, logits in zip(batch.merge_maps, model.window_logits(windows).flatten(2).mT, strict=True):
        same_token = merge_map[:, None] == merge_map
        same_logits = (logits[:, None] == logits).all(dim=2)
        assert torch.equal(same_logits, same_token)
        assert same_token.sum() > len(merge_map)


@pytest.mark.parametrize("align", [1, 4])
def test_later_blocks_see_fewer_tokens(align: int, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1, 2), distilled=True, align=align)
    rows: list[int] = []
    for block in model.encoder.blocks:
        assert isinstance(block.norm1, nn.Module)
        block.norm1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model.window_logits(torch.randn(1, 3, 128, 128))
    assert rows[0] == 2 + 64
    assert rows[0] > rows[1] > rows[2] >= 2 + 16
    assert [(length - 2) % align for length in rows] == [0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 32, 32), torch.float32),
        ((1, 4, 32, 32), torch.float32),
        ((0, 3, 32, 32), torch.float32),
        ((1, 3, 32, 0), torch.float32),
        ((1, 3, 32, 32), torch.uint8),
    ],
    ids=str,
)
def test_refuses_what_are_no_windows(
    shape: tuple[int, ...], dtype: torch.dtype, tiny_model: Callable[..., Segmenter]
) -> None:
    with pytest.raises(ValueError, match=r"^windows: expected float \[B, 3, H, W\], got torch\."):
        tiny_model().window_logits(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (30, 200), (333, 41), (97, 101)], ids=str)
def test_labels_every_pixel_of_any_picture(shape: tuple[int, int], tiny_model: Callable[..., Segmenter]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = tiny_model(schedule=(1, 2)).segment(image)
    assert labels.shape == shape
    assert labels.dtype == np.uint8
    assert labels.max() < 5


def test_labels_beyond_256_classes_take_two_bytes(tiny_model: Callable[..., Segmenter]) -> None:
    labels = tiny_model(n_cls=300).segment(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert labels.dtype == np.uint16
    assert labels.max() > 255


def test_the_mask_does_not_depend_on_how_windows_are_batched(
    threads: int, tiny_model: Callable[..., Segmenter]
) -> None:
    inference = InferenceConfig(im_size=128, max_ratio=4, window_size=128, window_stride=96, normalization="deit")
    model = tiny_model(schedule=(1, 2), image_size=(128, 128), inference=inference)
    image = np.random.default_rng(1).integers(0, 256, (100, 380, 3), dtype=np.uint8)
    masks = [model.segment(image, window_batch=size) for size in (1, 3, 64)]
    assert all(np.array_equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=lambda image: f"{image.dtype} {image.shape}",
)
def test_refuses_what_is_no_picture(image: np.ndarray, tiny_model: Callable[..., Segmenter]) -> None:
    with pytest.raises(ValueError, match=r"^image: expected uint8 \[H, W, 3\], got "):
        tiny_model().segment(image)


def test_refuses_an_endless_picture_before_touching_its_pixels(
    tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpm_ops.segmenter.cut_windows", lambda *_: pytest.fail("windows were cut"))
    with pytest.raises(TooManyWindowsError, match=r"^a 65535x1 picture needs 256 windows"):
        tiny_model().segment(np.zeros((1, 65535, 3), np.uint8))


@pytest.mark.parametrize("normalization", ["vit", "deit"])
def test_bytes_are_embedded_as_normalised_windows_are(
    normalization: str, tiny_model: Callable[..., Segmenter]
) -> None:
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=64, normalization=normalization)
    model = tiny_model(inference=inference)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    windows = cut_windows(image, plan_windows(64, 64, inference), inference)
    pixels = torch.from_numpy(image)[None]
    assert torch.equal(normalize_windows(pixels, normalization), windows)
    found, expected = model.embed(pixels), model.embed(windows)
    assert torch.equal(found.tokens.values, expected.tokens.values)


def test_one_product_embeds_patches_as_the_convolution_does(tiny_model: Callable[..., Segmenter]) -> None:
    encoder = tiny_model().encoder
    windows = torch.randn(2, 3, 64, 32)
    expected = encoder.patch_embed["proj"](windows).flatten(2).mT
    torch.testing.assert_close(encoder._project(windows), expected)
