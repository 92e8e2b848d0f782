"""The profile of a batch: its steps, its tokens, and that it computes the network."""

from collections.abc import Callable

import pytest
import torch

from mpm_ops import Segmenter
from mpm_ops.bench.blocks import measure, profile
from mpm_ops.merging import make_merger
from mpm_ops.runtime.eager import TorchRuntime


@pytest.fixture
def model(tiny_model: Callable[..., Segmenter]) -> Segmenter:
    return tiny_model(patch_size=8, n_layers=3)


def windows(number: int) -> list[torch.Tensor]:
    return list(torch.randn(number, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("merger", ["none", "mpm:1,2", "mpm:1,keep=0.5,weighted,proportional", "tome:r=5"])
def test_computes_the_network(model: Segmenter, merger: str) -> None:
    model.merger = make_merger(merger, model.tower)
    batch = torch.cat(windows(3))
    logits, (steps, tokens) = profile(model, TorchRuntime(model), batch, None)
    torch.testing.assert_close(logits, model.window_logits(batch).flatten(2).mT)
    assert list(tokens) == [f"block {i}" for i in range(3)]
    assert tokens["block 0"] == 65
    whole = sum(ms for step, ms in steps.items() if step not in ("total", "of it copying back"))
    assert steps["total"] == pytest.approx(whole)
    assert ("merge" in steps) == (merger != "none")


def test_means_over_random_batches(model: Segmenter) -> None:
    how = {"precision": "fp32", "batch": 3, "batches": 2, "imposed": False}
    unmerged, merged = measure(model, windows(8), ["none", "mpm:1"], **how)  # type: ignore[arg-type]
    assert unmerged["tokens"] == {f"block {i}": 65 for i in range(3)}
    assert merged["tokens"]["block 0"] == 65 > merged["tokens"]["block 1"] == merged["tokens"]["block 2"]
    mean, error = unmerged["images_per_second"]
    assert 0 <= error <= mean
    assert {"embed", "block 0", "decode", "total"} <= unmerged["ms"].keys()


def test_no_figures_where_it_computes_something_else(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchRuntime, "decode", lambda self, batch, counts: torch.randn(2, 64, 5))
    with pytest.raises(RuntimeError, match=r"parity: none labels .* otherwise block by block; no figures"):
        measure(model, windows(4), ["none"], precision="fp32", batch=2, batches=1, imposed=False)
