"""Against the original Segmenter's recorded outputs, and the paper's order of decoding."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.cases import CASES, Case, picture, sample, windows, write_checkpoint
from torch import Tensor

from mpm_ops import Segmenter, load_segmenter, merge_tokens

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
WITH_WINDOWS = [name for name, case in CASES.items() if case.windows]
WITH_PICTURES = [name for name, case in CASES.items() if case.pictures]


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> Iterator[Path]:
    path = write_checkpoint(CASES[name], tmp_path)
    yield path
    path.unlink()  # up to 130 MB, and pytest keeps the folders of three runs


@pytest.fixture
def golden(name: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)


@pytest.mark.parametrize("name", WITH_WINDOWS)
def test_logits(name: str, checkpoint: Path, golden: Mapping[str, np.ndarray]) -> None:
    model = load_segmenter(checkpoint)
    for height, width in CASES[name].windows:
        shown = windows(height, width)
        patches = model.window_logits(shown)
        padded = tuple(side * CASES[name].patch_size for side in patches.shape[2:])
        pixels = F.interpolate(patches, padded, mode="bilinear", align_corners=False)[..., :height, :width]

        size = f"{height}x{width}"
        np.testing.assert_allclose(patches, golden[f"patches_{size}"], rtol=0, atol=TOLERANCE, err_msg=size)
        np.testing.assert_allclose(sample(pixels), golden[f"pixels_{size}"], rtol=0, atol=TOLERANCE, err_msg=size)


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_labels(name: str, checkpoint: Path, golden: Mapping[str, np.ndarray]) -> None:
    model = load_segmenter(checkpoint)
    for height, width in CASES[name].pictures:
        labels = model.segment(picture(height, width))
        size = f"{height}x{width}"
        expected = golden[f"labels_{size}"]
        decided = np.unpackbits(golden[f"decided_{size}"], count=expected.size).reshape(expected.shape) == 1
        assert decided.mean() > 0.999, size
        np.testing.assert_array_equal(labels[decided], expected[decided], err_msg=size)


@pytest.mark.parametrize("name", ["shapes", "oblong", "linear", "deit_linear"])
@pytest.mark.parametrize(("schedule", "align"), [((0,), 1), ((1,), 1), ((0, 1), 1), ((0, 1), 4)])
def test_decoding_merged_tokens_equals_reconstructing_first(
    name: str, checkpoint: Path, schedule: tuple[int, ...], align: int
) -> None:
    model = load_segmenter(checkpoint, schedule, align).double()
    shown = windows(144, 125).double()
    with torch.inference_mode():
        expected = torch.cat([reconstructing_first(model, CASES[name], window[None]) for window in shown])
    logits = model.window_logits(shown)
    torch.testing.assert_close(logits.flatten(2).mT, expected, rtol=0, atol=1e-10)


def reconstructing_first(model: Segmenter, case: Case, window: Tensor) -> Tensor:
    """The paper's order for one window: merge, encode, copy tokens back to [1, N, D], decode as ever."""
    x = model.encoder.embed(window).values[None]  # [1, L, D]
    num_special = 2 if case.distilled else 1
    origin = torch.arange(x.shape[1] - num_special)  # the token that stands for each patch
    for i, block in enumerate(model.encoder.blocks):
        if i in model.schedule:
            merged, merge_map = merge_tokens(x[0, num_special:], align=model.align)
            x = torch.cat([x[:, :num_special], merged[None]], dim=1)
            origin = merge_map[origin]
        x = block(x)
    assert len(origin.unique()) < len(origin), "nothing merged"
    x = model.encoder.norm(x)[:, num_special:][:, origin]

    decoder: Any = model.decoder
    if case.decoder == "linear":
        return decoder.head(x)
    x = torch.cat([decoder.proj_dec(x), decoder.cls_emb], dim=1)
    x = decoder.decoder_norm(decoder.blocks(x))
    patches, classes = x[:, : -case.n_cls] @ decoder.proj_patch, x[:, -case.n_cls :] @ decoder.proj_classes
    cosines = (patches / patches.norm(dim=-1, keepdim=True)) @ (classes / classes.norm(dim=-1, keepdim=True)).mT
    return decoder.mask_norm(cosines)
