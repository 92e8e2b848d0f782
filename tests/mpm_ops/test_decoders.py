"""The mask decoder for all windows at once, as on a GPU, against window by window."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.decoders import MaskTransformer
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

WIDTH = 128


def everywhere(values: Tensor) -> bool:
    return True


def make_decoder(num_classes: int) -> MaskTransformer:
    decoder = MaskTransformer(n_cls=num_classes, d_encoder=WIDTH, n_layers=2).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return decoder


@pytest.mark.parametrize("num_classes", [1, 5, 150])
@pytest.mark.parametrize("lengths", [(9,), (1,), (7, 7, 7), (5, 12, 1, 5)])
@pytest.mark.parametrize("sized", [False, True])
@torch.inference_mode()
def test_all_windows_at_once_score_as_each_alone(
    sized: bool, lengths: tuple[int, ...], num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(num_classes)
    tokens = PackedTokens(torch.randn(sum(lengths), WIDTH, dtype=torch.float64), lengths)
    sizes = torch.randint(1, 9, (len(tokens.values),)) if sized else None
    each = [None] * len(lengths) if sizes is None else sizes.split(lengths)
    alone = [decoder(PackedTokens.pack([own]), size) for own, size in zip(tokens.split(), each, strict=True)]
    monkeypatch.setattr("mpm_ops.decoders.decodes_together", everywhere)
    found = decoder(tokens, sizes)
    assert found.shape == (sum(lengths), num_classes)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@torch.inference_mode()
def test_a_network_decodes_all_windows_at_once(
    merged: bool, distilled: bool, tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(distilled=distilled).double()
    special = model.encoder.num_special
    batch = model.embed(torch.randn(3, 3, 64, 64, dtype=torch.float64))
    if merged:
        batch = batch.merged(num_special=special, align=1).merged(num_special=special, align=1)
        assert len(set(batch.tokens.lengths)) > 1
    expected = model.decode(batch)
    for module in ("decoders", "segmenter"):
        monkeypatch.setattr(f"mpm_ops.{module}.decodes_together", everywhere)
    torch.testing.assert_close(model.decode(batch), expected, rtol=0, atol=1e-10)


def test_first_rows_are_dropped_from_every_sequence() -> None:
    tokens = PackedTokens(torch.arange(12.0)[:, None], (5, 1, 6))
    rest = tokens.without_first(1)
    assert rest.values.flatten().tolist() == [1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert rest.lengths == (4, 0, 5)
    assert rest.cu_seqlens.tolist() == [0, 4, 4, 9]
    with pytest.raises(ValueError, match=r"^lengths: expected at least 2, got 1$"):
        tokens.without_first(2)


def test_bounds_must_fit_the_lengths() -> None:
    with pytest.raises(ValueError, match=r"^bounds: expected 3 of them, got 2$"):
        PackedTokens(torch.zeros(4, 1), (3, 1), torch.tensor([0, 4], dtype=torch.int32))


def test_windows_keep_their_bounds_through_a_stage(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model()
    bounds = torch.tensor([0, 30, 47], dtype=torch.int32)
    batch = WindowBatch(PackedTokens(torch.randn(47, 64), (30, 17), bounds))
    assert model.run_blocks(model.stages[0], batch).tokens.bounds is bounds
