"""Region-based MPM against plain loops over the tokens of each square."""

from collections.abc import Callable

import pytest
import torch

from mpm_ops import Segmenter
from mpm_ops.merging import Tower, make_merger
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.stages import WindowBatch

TOWER = Tower(num_blocks=6, width=12, num_special=1)


def test_pairs_are_mutual_within_their_square() -> None:
    """7 x 7 patches in squares of 4, 3 at the edges, twice: what a square became stays in it."""
    merger = make_merger("region:1,3", TOWER)
    batch = WindowBatch(PackedTokens(torch.randn(2 * 50, 12), (50, 50)), grid=(7, 7))
    for _ in merger.cuts:
        before, batch = batch, merger.launch(batch)()
        assert batch.merge_maps is not None
        for i in range(2):
            x, merged = before.tokens.split()[i], batch.tokens.split()[i]
            assert torch.equal(merged[0], x[0])
            old = torch.arange(49) if before.merge_maps is None else before.merge_maps[i]
            squares = [{int(old[7 * y + p]) for y in range(t, min(t + 4, 7)) for p in range(u, min(u + 4, 7))}
                       for t in (0, 4) for u in (0, 4)]  # fmt: skip
            new = {int(old[p]): int(batch.merge_maps[i][p]) for p in range(49)}
            for square in squares:
                best = {}
                for a in square:
                    others = {b: float(torch.cosine_similarity(x[1 + a], x[1 + b], dim=0)) for b in square - {a}}
                    best[a] = max(others, key=lambda b: others[b])
                for a in square:
                    partner = best[a] if best[best[a]] == a else a
                    assert {b for b in new if new[b] == new[a]} == {a, partner}
                    torch.testing.assert_close(merged[1 + new[a]], (x[1 + a] + x[1 + partner]) / 2)


def test_gives_the_same_on_every_runtime_and_alone(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(96, 96), n_layers=5)
    model.merger = make_merger("region:1,3,side=2", model.tower)
    windows = torch.randn(3, 3, 96, 96)
    expected = model.window_logits(windows)
    assert torch.equal(model.window_logits(windows[1:2]), expected[1:2])
    model.runtime = make_runtime(model, "openvino", "fp32")
    torch.testing.assert_close(model.window_logits(windows), expected, atol=1e-4, rtol=1e-4)


def test_refuses_what_it_cannot_cut_into_squares(tiny_model: Callable[..., Segmenter]) -> None:
    with pytest.raises(ValueError, match="side: expected an integer >= 1, got 0"):
        make_merger("region:1,side=0", TOWER)
    model = tiny_model(n_layers=5)
    model.merger = make_merger("region:1", model.tower)
    with pytest.raises(ValueError, match="windows: expected square ones, got 12 patches"):
        model.window_logits(torch.zeros(1, 3, 48, 64))
