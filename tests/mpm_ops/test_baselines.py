"""ToMe and ALGM against plain loops over single tokens, and their networks against the Segmenter they borrow."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.baselines import Algm, ToMe
from mpm_ops.baselines.rivals import Matches, MergedWindows
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def bipartite(metric: Tensor, num_special: int, choose: Callable[[list[float]], int]) -> list[list[int]]:
    """Clusters in the order of the merged rows: special, even tokens that stay, odd tokens with what joined them."""
    special = set(range(num_special))
    evens = [i for i in range(0, len(metric), 2) if i not in special]
    odds = [i for i in range(1, len(metric), 2) if i not in special]
    ranked = {i: max((cosine(metric[i], metric[j]), j) for j in odds) for i in evens}
    best = {i: value for i, (value, _) in ranked.items()}
    partner = {i: j for i, (_, j) in ranked.items()}
    joining = sorted(evens, key=lambda i: -best[i])[: choose(list(best.values()))]
    return (
        [[i] for i in sorted(special)]
        + [[i] for i in evens if i not in joining]
        + [[j, *(i for i in joining if partner[i] == j)] for j in odds]
    )


def check_clusters(windows: MergedWindows, merged: MergedWindows, clusters: list[list[list[int]]]) -> None:
    for b, rows in enumerate(clusters):
        assert merged.x.shape[1] == len(rows)
        for row, members in enumerate(rows):
            weights = windows.sizes[b, members]
            mean = (windows.x[b, members] * weights[:, None]).sum(0) / weights.sum()
            close(merged.x[b, row], mean)
            assert merged.sizes[b, row] == weights.sum()
            for member in members:
                assert (merged.rows[b][windows.rows[b] == member] == row).all()


def some_windows(num_windows: int, length: int) -> MergedWindows:
    """Tokens that stand for several already."""
    rows = torch.stack([torch.cat([torch.arange(length), torch.randint(2, length, (9,))]) for _ in range(num_windows)])
    sizes = torch.stack([row.bincount(minlength=length) for row in rows]).float()
    return MergedWindows(torch.randn(num_windows, length, 12), sizes, rows)


@pytest.mark.parametrize("num_special", [1, 2])
@pytest.mark.parametrize("length", [18, 31])
@pytest.mark.parametrize("r", [0, 1, 5, 7])
def test_bipartite_matching_merges_the_best_even_tokens_into_odd_ones(num_special: int, length: int, r: int) -> None:
    windows, metric = some_windows(3, length), torch.randn(3, length, 6)
    step, new_length = Matches.find(metric, num_special).step(r, length, num_special)
    assert new_length == length - r
    clusters = [bipartite(metric[b], num_special, lambda _: r) for b in range(3)]
    check_clusters(windows, windows.merged(step, new_length), clusters)


@pytest.mark.parametrize("distilled", [False, True])
def test_tome_removes_r_tokens_in_every_block(distilled: bool, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(160, 160), distilled=distilled)
    windows = torch.randn(2, 3, 160, 160)
    special = model.encoder.num_special
    encoded = ToMe(model, r=7).encode(windows, (10, 10))
    assert encoded.x.shape[1] == 100 + special - 3 * 7
    assert torch.equal(encoded.sizes.sum(1), torch.full((2,), 100.0 + special))
    assert torch.equal(encoded.rows[:, :special], torch.arange(special).expand(2, -1))
    assert ToMe(model, r=1000).encode(windows, (10, 10)).x.shape[1] < 100 / 8 + special + 2  # at most half a block


def test_tome_decodes_merged_tokens_as_if_they_were_copied_back_first(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(128, 128)).double()
    windows = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    rival = ToMe(model, r=9)
    with torch.inference_mode():
        encoded = rival.encode(windows, (8, 8))
        full = encoded.x.gather(1, encoded.rows[..., None].expand(-1, -1, 64))
        copied = model.decode(WindowBatch(PackedTokens.from_batch(full)))
    found = rival.window_logits(windows)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), copied, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.2, 2.0])
@pytest.mark.parametrize("grid", [(4, 6), (8, 4)])
def test_algm_merges_similar_squares_first(
    threshold: float, grid: tuple[int, int], tiny_model: Callable[..., Segmenter]
) -> None:
    rival = Algm(tiny_model(n_layers=5), threshold=threshold)
    windows = MergedWindows.start(torch.randn(2, 1 + grid[0] * grid[1], 8))
    squares = [
        [1 + (2 * down + dy) * grid[1] + 2 * across + dx for dy in (0, 1) for dx in (0, 1)]
        for down in range(grid[0] // 2)
        for across in range(grid[1] // 2)
    ]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    alike = [[sum(cosine(x[square[i]], x[square[j]]) for i, j in pairs) / 6 for square in squares] for x in windows.x]
    r = min(sum(value >= threshold for value in values) for values in alike)
    clusters = []
    for values in alike:
        chosen = sorted(range(len(squares)), key=lambda s: -values[s])[:r]
        joined = {token for s in chosen for token in squares[s]}
        single = [[i] for i in range(1, 1 + grid[0] * grid[1]) if i not in joined]
        clusters.append([[0], *(squares[s] for s in chosen), *single])
    check_clusters(windows, rival.merge(0, windows, torch.empty(0), grid), clusters)


def test_algm_merges_above_the_mean_of_the_batch_next(tiny_model: Callable[..., Segmenter]) -> None:
    rival = Algm(tiny_model(n_layers=5), threshold=0.9)
    windows = some_windows(3, 41)

    best: list[Tensor] = []
    for x in windows.x:
        values = [max(cosine(x[i], x[j]) for j in range(1, 41, 2)) for i in range(2, 41, 2)]
        best.append(torch.tensor(values))
    threshold = sum(float(b.mean()) for b in best) / 3 + sum(float(b.std()) for b in best) / 3 / 5
    r = min(int((b >= threshold).sum()) for b in best)
    assert 0 < r < 20
    clusters = [bipartite(x, 1, lambda _: r) for x in windows.x]
    check_clusters(windows, rival.merge(1, windows, torch.empty(0), (1, 1)), clusters)


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_networks_without_merges_are_the_segmenter(decoder: str, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(96, 96), n_layers=5, decoder=decoder)
    windows = torch.randn(2, 3, 96, 96)
    rival = Algm(model, threshold=math.inf)
    rival._global = lambda x: Matches.find(x, 1).step(0, x.shape[1], 1)  # type: ignore[method-assign]
    close(rival.window_logits(windows), model.window_logits(windows))


def test_windows_of_a_tome_batch_do_not_see_each_other(tiny_model: Callable[..., Segmenter]) -> None:
    rival = ToMe(tiny_model(image_size=(160, 160)), r=5)
    windows = torch.randn(3, 3, 160, 160)
    alone = torch.cat([rival.window_logits(window[None]) for window in windows])
    close(rival.window_logits(windows), alone)


def test_refuses_what_does_not_fit(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^r: expected a number for a width of 64, got None$"):
        ToMe(model)
    with pytest.raises(ValueError, match=r"^r: expected an integer >= 1, got 0$"):
        ToMe(model, r=0)
    with pytest.raises(ValueError, match=r"^cuts: expected strictly increasing block numbers within 0\.\.2"):
        Algm(model, threshold=0.9)
    with pytest.raises(ValueError, match=r"^threshold: expected a number for a width of 64, got None$"):
        Algm(tiny_model(n_layers=5))
    with pytest.raises(
        ValueError, match=r"^model: expected one special token, as ALGM does, got a distilled network$"
    ):
        Algm(tiny_model(n_layers=5, distilled=True), threshold=0.9)
    odd = Algm(tiny_model(n_layers=5), threshold=0.9)
    with pytest.raises(ValueError, match=r"^windows: expected an even number of patches each way, got 3 x 4$"):
        odd.window_logits(torch.zeros(1, 3, 48, 64))
    with pytest.raises(ValueError, match=re.escape("windows: expected float [B, 3, H, W], got torch.float32 [3, 64]")):
        odd.window_logits(torch.zeros(3, 64))
