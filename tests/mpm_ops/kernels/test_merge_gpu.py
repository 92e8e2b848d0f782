"""Merging all windows at once, as the stages do on a GPU, against window by window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops import Segmenter, patch_timm
from mpm_ops._timm import VisionTransformer
from mpm_ops.merge_gpu import can_merge_on_gpu, merge_windows_gpu, packed_rows
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def everywhere(x: Tensor) -> bool:
    return True


def nowhere(x: Tensor) -> bool:
    return False


def test_tokens_on_the_cpu_are_not_its_business() -> None:
    assert not can_merge_on_gpu(torch.zeros(2, 2))


@pytest.mark.parametrize("align", [1, 4])
def test_maps_compose_as_window_by_window(align: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (41, 30, 3, 60)
    values = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(1)).to(device)
    first = WindowBatch(PackedTokens(values, lengths))
    monkeypatch.setattr("mpm_ops.stages.can_merge_on_gpu", nowhere)
    apart = first.merged(num_special=2, align=align).merged(num_special=2, align=align)
    monkeypatch.setattr("mpm_ops.stages.can_merge_on_gpu", everywhere)
    together = first.merged(num_special=2, align=align).merged(num_special=2, align=align)
    assert together.tokens.lengths == apart.tokens.lengths
    torch.testing.assert_close(together.tokens.values, apart.tokens.values, rtol=0, atol=0)
    assert apart.merge_maps is not None
    assert together.merge_maps is not None
    assert [m.tolist() for m in together.merge_maps] == [m.tolist() for m in apart.merge_maps]


@pytest.mark.parametrize("distilled", [False, True])
def test_a_network_gives_the_same_logits(
    distilled: bool, device: torch.device, tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(schedule=(1, 2), distilled=distilled).to(device)
    windows = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).to(device)
    monkeypatch.setattr("mpm_ops.stages.can_merge_on_gpu", nowhere)
    expected = model.window_logits(windows)
    monkeypatch.setattr("mpm_ops.stages.can_merge_on_gpu", everywhere)
    torch.testing.assert_close(model.window_logits(windows), expected, rtol=0, atol=1e-5)


def test_a_patched_vit_gives_the_same_features(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=1, num_classes=3).eval()
    vit = vit.to(device)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).to(device)
    images[0, :, :40] = images[0, :, :1, :1]
    patch_timm(vit, schedule=(1, 2))
    monkeypatch.setattr("mpm_ops.patch.can_merge_on_gpu", nowhere)
    with torch.inference_mode():
        expected = vit.forward_features(images)
        monkeypatch.setattr("mpm_ops.patch.can_merge_on_gpu", everywhere)
        torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=1e-5)


def test_rows_of_packed_maps() -> None:
    maps = [torch.tensor([0, 1, 0]), torch.tensor([0]), torch.tensor([1, 0])]
    assert packed_rows(maps, torch.tensor([0, 2, 3])).tolist() == [0, 1, 0, 2, 4, 3]
    assert packed_rows(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 5])).tolist() == [0, 1, 6, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_special": 4}, r"^tokens: expected at least 4 a sequence, got 3$"),
        ({"align": 0}, r"^align: expected an integer >= 1, got 0$"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    tokens = PackedTokens(torch.zeros(8, 4), (5, 3))
    with pytest.raises(ValueError, match=message):
        merge_windows_gpu(tokens, **({"num_special": 1} | change))
