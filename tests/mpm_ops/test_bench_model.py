from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpm_ops import Segmenter
from mpm_ops.bench import model as bench_model
from mpm_ops.bench.injected import Injected
from mpm_ops.bench.model import (
    Contestant,
    bench_merging,
    bench_size,
    check_parity,
    imposed_lengths,
    ours,
    print_table,
    read_windows,
)
from mpm_ops.merging import Tower, make_merger
from mpm_ops.stages import WindowBatch

Make = Callable[..., Segmenter]

MERGERS = ("mpm:1,2",)


@pytest.fixture
def model(tiny_model: Make) -> Segmenter:
    return tiny_model(patch_size=8, n_layers=3)


def windows(number: int) -> list[torch.Tensor]:
    return list(torch.randn(number, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_every_contestant_computes_the_same_network_and_sees_every_window_once(
    model: Segmenter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_model, "build", lambda size, demo: demo)
    seen: list[int] = []
    plain = Segmenter.embed

    def embed(self: Segmenter, given: torch.Tensor) -> WindowBatch:
        seen.append(id(given))
        return plain(self, given)

    monkeypatch.setattr(Segmenter, "embed", embed)
    rows = bench_size("Ti", model, windows(5), "fp32", MERGERS)
    assert {(row["merger"], row["runtime"]) for row in rows} == {
        *(("none", way) for way in ("torch, plain", "onnxruntime, whole")),
        *(("none", f"openvino, whole{mode}") for mode in ("", ", a stream a core")),
        *((merger, runtime) for merger in ("none", *MERGERS) for runtime in ("torch", "openvino")),
    }
    assert all((row["merging_ms"] > 0) == (row["merger"] != "none") for row in rows)
    assert all(0 < row["merging_ms"] + row["median_ms"] <= 2 * row["p90_ms"] for row in rows[:-1])
    timed = [seen.count(i) for i in set(seen)]
    assert max(timed) == 1 + len(MERGERS), "one call of each torch contestant"
    print_table(rows)
    assert "1.00x the best unmerged" in capsys.readouterr().out


def test_no_figures_where_one_computes_something_else(model: Segmenter) -> None:
    right = Contestant("none", "torch", ours(model, "none", "torch", "fp32", None))
    wrong = replace(right, runtime="other", run=lambda window: (right.run(window)[0] + 0.01, 0.0))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="parity: none on other differs from torch"):
        check_parity([right, wrong], windows(1)[0], strict=True)


def test_imposed_lengths_are_what_is_computed(model: Segmenter) -> None:
    seen = []

    class Watched(Injected):
        def apply(self, *arguments):  # type: ignore[no-untyped-def]
            batch = super().apply(*arguments)
            seen.append(batch.tokens.lengths[0] - 1)
            assert batch.merge_maps is not None
            assert batch.merge_maps[0].unique().tolist() == list(range(seen[-1]))
            return batch

    with torch.inference_mode():
        for merger, low, high in (("mpm:1,2", (37, 25), (43, 31)), ("mpm:1,2,align=16", (48, 32), (48, 32))):
            seen.clear()
            ours(model, merger, "torch", "fp32", Watched(means=(40, 28), spread=3))(windows(1)[0])
            assert len(seen) == 2
            assert all(low[i] <= length <= high[i] for i, length in enumerate(seen))


def test_random_weights_get_the_lengths_of_each_merger() -> None:
    tower = Tower(num_blocks=12, width=64, num_special=1)
    for text, means in (("2,5,align=16", (774, 614)), ("1,2,4,6,keep=0.75,weighted", (839, 702, 591, 500))):
        imposed = imposed_lengths(make_merger(f"mpm:{text}", tower))
        assert imposed
        assert imposed.means == means
    assert imposed_lengths(make_merger("tome:r=30", tower)) is None
    with pytest.raises(ValueError, match=r"^mergers: .* 2,5 with keep=1, 1,2,4,6 with keep=0.75, got mpm:1,2; "):
        imposed_lengths(make_merger("mpm:1,2", tower))


def test_merging_is_timed_where_it_chooses_the_specifications_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "LENGTHS", (64, 130))
    found = bench_merging(48, repeats=1)
    assert {number: set(ms) for number, ms in found.items()} == {n: {"cpu", "specification"} for n in (64, 130)}
    monkeypatch.setattr(bench_model, "merge_tokens_cpu", lambda x: (x, torch.zeros(len(x), dtype=torch.int64)))
    with pytest.raises(RuntimeError, match=r"parity: .* of 64 tokens merge elsewhere"):
        bench_merging(48, repeats=1)


def test_sizes_that_the_checkpoint_does_not_have_get_random_weights(tiny_model: Make) -> None:
    demo = tiny_model(d_model=192, n_heads=3)
    assert bench_model.build("Ti", demo) is demo
    other = bench_model.build("S", demo)
    assert other.config.d_model == 384
    with torch.inference_mode():
        assert other.window_logits(windows(1)[0]).isfinite().all()


def test_no_window_is_timed_twice(model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "LEAST_WINDOWS", 4)
    for i in range(14):
        noise = np.random.default_rng(i // 2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    found = read_windows(tmp_path, model, 63)
    assert len(found) == 7
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"images: expected at least 7 different windows, got 6 in "):
        read_windows(tmp_path, model, 63)
