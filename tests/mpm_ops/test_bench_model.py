from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpm_ops import Segmenter
from mpm_ops.bench import model as bench_model
from mpm_ops.bench.contestants import contestants
from mpm_ops.bench.injected import Injected
from mpm_ops.bench.model import check_parity, print_table
from mpm_ops.bench.plots import plot_models

Make = Callable[..., Segmenter]
WINDOW = (1, 3, 64, 64)


@pytest.fixture
def model(tiny_model: Make) -> Segmenter:
    """Wide enough for the rivals' published settings, deep enough for every cut."""
    return tiny_model(patch_size=8, d_model=192, n_heads=3, n_layers=6)


def test_every_way_computes_the_same_network(model: Segmenter) -> None:
    ways = contestants(model, "fp32", None)
    with torch.inference_mode():
        window = torch.randn(WINDOW)
        check_parity(ways, window)
        for way in ways:
            logits, steps = way.run(window)
            assert logits.shape == (64, 5)
            assert steps["network"] > 0
            assert (steps["merge"] > 0) == (way.name.startswith(("MPM", "ToMe", "ALGM")))
    assert [way.name for way in ways if way.plain_labels] == ["upstream"]
    assert {way.runtime for way in ways} == {"torch", "openvino", "onnxruntime"}


def test_no_figures_where_a_way_computes_something_else(model: Segmenter) -> None:
    ways = contestants(model, "fp32", None)
    ours = next(way for way in ways if (way.name, way.runtime) == ("ours, unmerged", "openvino"))

    def wrong(window: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        logits, steps = ours.run(window)
        return logits + 0.01, steps

    broken = [replace(way, run=wrong) if way is ours else way for way in ways]
    with torch.inference_mode(), pytest.raises(RuntimeError, match="parity: ours, unmerged on openvino differs"):
        check_parity(broken, torch.randn(WINDOW))


def test_injected_lengths_are_what_is_computed(model: Segmenter) -> None:
    seen = []

    class Watched(Injected):
        def apply(self, *arguments):  # type: ignore[no-untyped-def]
            batch = super().apply(*arguments)
            seen.append(batch.tokens.lengths[0] - 1)
            assert batch.merge_maps is not None
            assert batch.merge_maps[0].unique().tolist() == list(range(seen[-1]))
            assert len(batch.merge_maps[0]) == 64
            return batch

    ways = contestants(model, "fp32", Watched(means=(40, 28), spread=3))
    assert not any("ALGM" in way.name for way in ways)
    with torch.inference_mode():
        for way in ways:
            seen.clear()
            way.run(torch.randn(WINDOW))
            if way.name == "MPM":
                assert 37 <= seen[0] <= 43
                assert 25 <= seen[1] <= 31
            if way.name == "MPM, align 16":
                assert seen == [48, 32]


def test_the_table_and_the_plot_show_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"network": 80.0, "merge": 0.0, "labels": 20.0, "total": 100.0}
    rows = [
        {"size": "Ti", "precision": "fp32", "way": way, "runtime": "torch", "median_ms": steps | {"total": total}}
        for way, total in (("upstream", 200.0), ("whole, unmerged", 100.0), ("MPM", 50.0))
    ]
    print_table(rows)
    assert "4.00x the first,  2.00x the best unmerged rival" in capsys.readouterr().out
    environment = {"processor": "x", "cpu_capability": "y", "threads": 2}
    plot_models({"results": rows, "classes": 5, "environment": environment}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_demo_models_weights_are_used_where_they_fit(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "SIZES", {"Ti": (64, 1), "S": (128, 2)})
    demo = tiny_model()
    same, other = (bench_model.build(size, demo, num_classes=9) for size in ("Ti", "S"))
    own, given = same.state_dict(), demo.state_dict()
    assert torch.equal(own["encoder.blocks.2.mlp.fc1.weight"], given["encoder.blocks.2.mlp.fc1.weight"])
    assert torch.equal(own["decoder.cls_emb"][:, :5], given["decoder.cls_emb"])
    assert other.config.d_model == 128
    with torch.inference_mode():
        assert other.window_logits(torch.randn(WINDOW)).isfinite().all()
