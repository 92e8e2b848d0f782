"""Mergers by name, and ToMe and ALGM against plain loops over single tokens."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.merging import Algm, Merger, Mpm, NoMerging, ToMe, Tower, make_merger
from mpm_ops.merging.bipartite import Matches, merge_windows
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.stages import Decoded, WindowBatch

TOWER = Tower(num_blocks=12, width=192, num_special=1)

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


def check_clusters(before: WindowBatch, after: WindowBatch, clusters: list[list[list[int]]], num_special: int) -> None:
    """Each row is the mean of its members weighted by the patches they stand for, and maps point to it."""
    assert after.merge_maps is not None
    for b, rows in enumerate(clusters):
        x, merged = before.tokens.split()[b], after.tokens.split()[b]
        patches = torch.arange(len(x) - num_special) if before.merge_maps is None else before.merge_maps[b]
        sizes = patches.bincount(minlength=len(x) - num_special).float()
        assert len(merged) == len(rows)
        for row, members in enumerate(rows):
            special = [member for member in members if member < num_special]
            assert not special or members == [row], "special tokens stay in front, alone"
            weights = torch.tensor([1.0 if m < num_special else float(sizes[m - num_special]) for m in members])
            close(merged[row], (x[members] * weights[:, None]).sum(0) / weights.sum())
            for member in members:
                if member >= num_special:
                    places = after.merge_maps[b][patches == member - num_special]
                    assert (places == row - num_special).all()


def some_windows(num_windows: int, length: int, num_special: int) -> WindowBatch:
    """Tokens that stand for several patches already, and keys."""
    num_image = length - num_special
    maps = [torch.cat([torch.arange(num_image), torch.randint(num_image, (9,))]) for _ in range(num_windows)]
    tokens = PackedTokens(torch.randn(num_windows * length, 12), (length,) * num_windows)
    return WindowBatch(tokens, tuple(maps), keys=torch.randn(num_windows * length, 6))


def run_stages(model: Segmenter, windows: Tensor) -> list[WindowBatch]:
    """What each merge of a model gives."""
    given: Tensor | WindowBatch = windows
    found = []
    for stage in model.stages[:-1]:
        launched = model.launch(stage, given)
        assert not isinstance(launched, Decoded)
        given = launched()
        found.append(given)
    return found


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ((), [range(24)]),
        ((0,), [range(0), range(24)]),
        ((0, 1), [range(0), range(2), range(2, 24)]),
        ((2, 5), [range(4), range(4, 10), range(10, 24)]),
        ((11,), [range(22), range(22, 24)]),
    ],
)
def test_mpm_cuts_before_each_block_of_its_schedule(schedule: tuple[int, ...], parts: list[range]) -> None:
    mpm = Mpm(tower=TOWER, schedule=schedule)
    assert [stage.parts for stage in mpm.stages] == parts
    assert [stage.index for stage in mpm.stages] == list(range(len(parts)))
    assert [stage.merger for stage in mpm.stages] == [mpm] * (len(parts) - 1) + [None]


@pytest.mark.parametrize("schedule", [(12,), (-1,), (5, 2), (2, 2), (2, 5, 99)])
def test_refuses_schedules_the_encoder_cannot_follow(schedule: tuple[int, ...]) -> None:
    message = f"schedule: expected strictly increasing block numbers within 0..11, got {schedule}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Mpm(tower=TOWER, schedule=schedule)


@pytest.mark.parametrize(
    ("text", "merger", "written"),
    [
        ("none", NoMerging(tower=TOWER), "none"),
        ("mpm:2,5", Mpm(tower=TOWER, schedule=(2, 5)), "mpm:2,5"),
        ("mpm: 2, 5, align=16", Mpm(tower=TOWER, schedule=(2, 5), align=16), "mpm:2,5,align=16"),
        (
            "mpm:proportional,1,3,keep=.50,weighted",
            Mpm(tower=TOWER, schedule=(1, 3), keep=0.5, weighted=True, proportional=True),
            "mpm:1,3,keep=0.5,weighted,proportional",
        ),
        ("mpm:2,5,keep=1", Mpm(tower=TOWER, schedule=(2, 5)), "mpm:2,5"),
        ("tome", ToMe(tower=TOWER, r=30), "tome:r=30"),
        ("tome:r=46", ToMe(tower=TOWER, r=46), "tome:r=46"),
        ("algm", Algm(tower=TOWER, threshold=0.9), "algm:threshold=0.9"),
        ("algm:threshold=0.999", Algm(tower=TOWER, threshold=0.999), "algm:threshold=0.999"),
    ],
)
def test_mergers_are_read_and_written_as_text(text: str, merger: Merger, written: str) -> None:
    assert make_merger(text, TOWER) == merger
    assert str(merger) == written
    assert make_merger(written, TOWER) == merger


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pitome", "merger: expected one of none, mpm, tome, algm, region and its parameters, got 'pitome'"),
        ("none:2", "merger: none has no parameter schedule, expected one of: none; got 'none:2'"),
        ("tome:2,5", "merger: tome has no parameter schedule, expected one of: r; got 'tome:2,5'"),
        ("tome:s=4", "merger: tome has no parameter s, expected one of: r; got 'tome:s=4'"),
        ("tome:r=4,r=5", "merger: r is given twice in 'tome:r=4,r=5'"),
        ("tome:r=many", "merger: expected int for r, got 'many' in 'tome:r=many'"),
        ("mpm:two", "merger: expected a block's number, got 'two' in 'mpm:two'"),
        ("mpm:2,", "merger: expected a block's number, got '' in 'mpm:2,'"),
        ("mpm:2,keep=half", "merger: expected float for keep, got 'half' in 'mpm:2,keep=half'"),
        ("mpm:2,keep=1.5", "keep: expected a number in (0, 1], got 1.5"),
        ("mpm:2,weighted=1", "merger: expected weighted alone, a flag, got 'weighted=1' in 'mpm:2,weighted=1'"),
        ("mpm:2,weighted,weighted", "merger: weighted is given twice in 'mpm:2,weighted,weighted'"),
        ("mpm:5,2", "schedule: expected strictly increasing block numbers within 0..11, got (5, 2)"),
        ("mpm:2,align=0", "align: expected an integer >= 1, got 0"),
        ("tome:r=-1", "r: expected an integer >= 1"),
    ],
)
def test_refuses_mergers_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_merger(text, TOWER)


@pytest.mark.parametrize("num_special", [1, 2])
@pytest.mark.parametrize("length", [18, 31])
@pytest.mark.parametrize("r", [0, 1, 5, 7])
def test_bipartite_matching_merges_the_best_even_tokens_into_odd_ones(num_special: int, length: int, r: int) -> None:
    windows = some_windows(3, length, num_special)

    def find(x: Tensor, keys: Tensor | None) -> tuple[Tensor, int]:
        assert keys is not None
        step, new_length = Matches.find(keys, num_special).step(r, length, num_special)
        assert new_length == length - r
        return step, new_length

    assert windows.keys is not None
    clusters = [bipartite(keys, num_special, lambda _: r) for keys in windows.keys.split(length)]
    check_clusters(windows, merge_windows(windows, num_special, find), clusters, num_special)


def test_attention_counts_patches_where_it_is_proportional(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(96, 96)).double()
    windows = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    model.merger = make_merger("mpm:1,keep=0.6,proportional", model.tower)
    with torch.inference_mode():
        merged = run_stages(model, windows)[-1]
        last = model.run_blocks(model.stages[-1], merged)
        assert merged.merge_maps is not None
        maps = merged.merge_maps
        full = [torch.cat([x[:1], x[1:][m]]) for x, m in zip(merged.tokens.split(), maps, strict=True)]
        copied = model.run_blocks(model.stages[-1], WindowBatch(PackedTokens.pack(full))).tokens
    for found, m, expected in zip(last.tokens.split(), maps, copied.split(), strict=True):
        torch.testing.assert_close(torch.cat([found[:1], found[1:][m]]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_tome_removes_r_tokens_in_every_block(distilled: bool, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(160, 160), distilled=distilled)
    windows, special = torch.randn(2, 3, 160, 160), model.encoder.num_special
    model.merger = ToMe(tower=model.tower, r=7)
    with torch.inference_mode():
        found = run_stages(model, windows)
        assert [batch.tokens.lengths for batch in found] == [(100 + special - 7 * i,) * 2 for i in (1, 2, 3)]
        assert found[-1].merge_maps is not None
        assert all((m.bincount() >= 1).all() and len(m) == 100 for m in found[-1].merge_maps)
        model.merger = ToMe(tower=model.tower, r=1000)
        assert run_stages(model, windows)[-1].tokens.max_seqlen < 100 / 8 + special + 2  # at most half a block


def test_tome_decodes_merged_tokens_as_if_they_were_copied_back_first(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(128, 128)).double()
    model.merger = ToMe(tower=model.tower, r=9)
    windows = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.inference_mode():
        last = run_stages(model, windows)[-1]
        last = model.run_blocks(model.stages[-1], last)
        assert last.merge_maps is not None
        full = [torch.cat([x[:1], x[1:][m]]) for x, m in zip(last.tokens.split(), last.merge_maps, strict=True)]
        copied = model.decode(WindowBatch(PackedTokens.pack(full)))
    found = model.window_logits(windows)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), copied, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 0.2, 2.0])
@pytest.mark.parametrize("grid", [(4, 6), (8, 4)])
def test_algm_merges_similar_squares_first(
    threshold: float, grid: tuple[int, int], tiny_model: Callable[..., Segmenter]
) -> None:
    merger = Algm(tower=Tower(num_blocks=5, width=8, num_special=1), threshold=threshold)
    length = 1 + grid[0] * grid[1]
    windows = WindowBatch(PackedTokens(torch.randn(2 * length, 8), (length,) * 2), grid=grid)
    squares = [
        [1 + (2 * down + dy) * grid[1] + 2 * across + dx for dy in (0, 1) for dx in (0, 1)]
        for down in range(grid[0] // 2)
        for across in range(grid[1] // 2)
    ]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    clusters = []
    for x in windows.tokens.split():
        values = [sum(cosine(x[square[i]], x[square[j]]) for i, j in pairs) / 6 for square in squares]
        chosen = [s for s in sorted(range(len(squares)), key=lambda s: -values[s]) if values[s] >= threshold]
        joined = {token for s in chosen for token in squares[s]}
        single = [[i] for i in range(1, length) if i not in joined]
        clusters.append([[0], *(squares[s] for s in chosen), *single])
    check_clusters(windows, merger.launch(windows)(), clusters, 1)


def test_algm_merges_above_the_mean_of_the_window_next() -> None:
    merger = Algm(tower=Tower(num_blocks=5, width=12, num_special=1), threshold=0.9)
    windows = some_windows(3, 41, 1)
    clusters = []
    for x in windows.tokens.split():
        best = torch.tensor([max(cosine(x[i], x[j]) for j in range(1, 41, 2)) for i in range(2, 41, 2)])
        r = int((best >= float(best.mean()) + float(best.std()) / 5).sum())
        assert 0 < r < 20
        clusters.append(bipartite(x, 1, lambda _, r=r: r))  # type: ignore[misc]
    check_clusters(windows, merger.launch(windows)(), clusters, 1)


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_cutting_inside_blocks_changes_nothing(
    decoder: str, tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(image_size=(96, 96), n_layers=5, decoder=decoder)
    windows = torch.randn(2, 3, 96, 96)
    expected = model.window_logits(windows)
    model.merger = Algm(tower=model.tower, threshold=math.inf)
    none_of = lambda x: Matches.find(x, 1).step(0, x.shape[1], 1)  # noqa: E731
    monkeypatch.setattr("mpm_ops.merging.algm.global_step", none_of)
    assert [stage.parts for stage in model.stages] == [range(1), range(1, 9), range(9, 10)]
    close(model.window_logits(windows), expected)


@pytest.mark.parametrize("text", ["tome:r=5", "algm:threshold=0.2", "mpm:1,2,4,keep=0.5,weighted,proportional"])
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_windows_do_not_see_each_other(text: str, runtime: str, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(160, 160), n_layers=5)
    model.merger = make_merger(text, model.tower)
    model.runtime = make_runtime(model, runtime, "fp32")
    windows = torch.randn(3, 3, 160, 160)
    together = model.window_logits(windows)
    for i, window in enumerate(windows):
        assert torch.equal(model.window_logits(window[None])[0], together[i])


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "text",
    ["tome:r=5", "algm:threshold=0.2", "mpm:1,3,align=8", "mpm:1,2,4,align=4,keep=0.5,weighted,proportional", "none"],
)
def test_every_merger_gives_the_same_on_every_runtime(
    text: str, distilled: bool, tiny_model: Callable[..., Segmenter]
) -> None:
    if distilled and text.startswith("algm"):
        pytest.skip("ALGM knows no distilled networks")
    model = tiny_model(image_size=(96, 96), n_layers=5, distilled=distilled)
    model.merger = make_merger(text, model.tower)
    windows = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    expected = model.window_logits(windows)
    model.runtime = make_runtime(model, "openvino", "fp32")
    torch.testing.assert_close(model.window_logits(windows), expected, atol=1e-4, rtol=1e-4)


def test_refuses_what_does_not_fit(tiny_model: Callable[..., Segmenter]) -> None:
    small = Tower(num_blocks=3, width=64, num_special=1)
    with pytest.raises(ValueError, match=r"^r: expected an integer >= 1 \(for a width of 64\), got 0$"):
        ToMe(tower=small)
    with pytest.raises(ValueError, match=r"^schedule: expected strictly increasing block numbers within 0\.\.2"):
        Algm(tower=small, threshold=0.9)
    with pytest.raises(ValueError, match=r"^threshold: expected a number for a width of 64, got None$"):
        Algm(tower=Tower(num_blocks=5, width=64, num_special=1))
    with pytest.raises(
        ValueError, match=r"^model: expected one special token, as ALGM does, got a distilled network$"
    ):
        Algm(tower=Tower(num_blocks=5, width=64, num_special=2), threshold=0.9)
    odd = tiny_model(n_layers=5)
    odd.merger = Algm(tower=odd.tower, threshold=0.9)
    with pytest.raises(ValueError, match=r"^windows: expected an even number of patches each way, got 3 x 4$"):
        odd.window_logits(torch.zeros(1, 3, 48, 64))
