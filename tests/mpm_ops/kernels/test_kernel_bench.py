"""The GPU's benchmark on whatever runs the tests: its checks, the work that it times, and its report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from fake_cuda import Rerun, compute_packed

from mpm_ops import Segmenter
from mpm_ops.bench import __main__ as bench
from mpm_ops.bench import gpu as bench_gpu
from mpm_ops.bench import gpu_networks
from mpm_ops.bench.dense import DenseSegmenter
from mpm_ops.bench.gpu_networks import TINY
from mpm_ops.bench.timing import Laps, Report, Timer, in_turn
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime.graphs import GraphRuntime

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explains_itself_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "gpu"])
    assert bench.main() == 1
    assert capsys.readouterr().err == "gpu: no CUDA device is visible to torch; run this on a machine with one\n"


def test_parity_holds() -> None:
    assert set(bench_gpu.check_parity(CPU, bench_gpu.TINY_SHAPES).values()) == {1.0}


def test_no_figure_where_parity_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unmerged(tokens: PackedTokens, *, num_special: int) -> tuple[PackedTokens, Tensor]:
        return tokens, torch.cat([torch.arange(n) for n in tokens.lengths])

    monkeypatch.setattr(bench_gpu, "merge_windows_gpu", unmerged)
    report = bench_gpu.bench_gpu(CPU, TINY, out=tmp_path / "gpu.json")
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert len(sections) == len(report.content["sections"]) == 1
    assert sections[0]["error"].startswith("RuntimeError: parity: ")
    assert (
        "merge otherwise at N=130 D=64 float32; expected less than 0.1%; no figures reported" in sections[0]["error"]
    )


@pytest.fixture
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by the bounds, windows decoded together, and graphs that run their function again."""

    def graphs(model: Segmenter, precision: str) -> GraphRuntime:
        return GraphRuntime(model, precision, attention="flash", budget_bytes=2**30, capture=Rerun())

    compute_packed(monkeypatch)
    monkeypatch.setattr(gpu_networks, "make_graphs", graphs)


@pytest.mark.usefixtures("_like_a_gpu")
def test_the_whole_command_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["bench", "gpu", "--device", "cpu", "--tiny", "--out", str(out)])
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)  # the real one takes its time
    code = bench.main()
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [section["error"] for section in report["sections"] if "error" in section] == []
    assert code == 0
    assert report["left_out"] == []
    kinds = [section["kind"] for section in report["sections"]]
    assert kinds[0] == "parity"
    assert set(kinds) == {"parity", "merge", "network", "served", "labels", "groups"}
    network = next(section for section in report["sections"] if section["kind"] == "network")
    ways = network["ways"]
    ours = {"unmerged", "MPM", "MPM aligned"}
    assert {"plain", "compiled", "ToMe"} | ours == set(ways)
    assert all(way["images_per_second_with_labels"] > 0 for way in ways.values())
    assert all(way["images_per_second"] > 0 for way in ways.values())
    assert ways["compiled"]["mode"] == "reduce-overhead"
    assert ways["compiled"]["compile_seconds"] >= 0
    assert ways["compiled"]["network_ms"] > 0
    assert ways["compiled"]["parity"] < 0.3
    assert [row["name"] for row in report["sections"] if "compiled" in row.get("ways", {})] == ["Ti bf16"]
    assert set(ways["MPM"]["median_ms"]) >= {"embed", "stage 0", "merge 0", "stage 1", "merge 1", "stage 2", "decode"}
    assert ways["MPM"]["mean_lengths"][0] == 17.0
    assert 12 <= ways["MPM"]["mean_lengths"][1] <= 14
    assert {length % 4 for length in ways["MPM aligned"]["mean_lengths"][1:]} <= {1.0, 3.0}  # of two windows
    assert ways["MPM"]["network_ms"] < ways["MPM"]["with_labels_ms"]
    assert ways["MPM"]["of_gemm"] > 0
    groups = next(section for section in report["sections"] if section["kind"] == "groups")["groups"]
    assert [row["windows"] for row in groups] == [1, 2]
    assert set(groups[0]["median_ms"]) == {"unmerged", "unmerged, graphs", "MPM", "MPM, graphs"}
    assert printed.count("\n") > len(kinds)


def not_compiled(*_: Any, **__: Any) -> Any:
    raise RuntimeError("backend='inductor' raised:\nno compiler")


def wrongly_compiled(network: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda windows: network(windows.flip(3)).flip(2)


@pytest.mark.parametrize(
    ("compiler", "error"),
    [(not_compiled, "RuntimeError: backend='inductor' raised:"), (wrongly_compiled, "RuntimeError: parity: logits")],
)
def test_a_network_that_is_not_compiled_leaves_the_others_their_figures(
    compiler: Any, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    found = gpu_networks.time_network(TINY, "Ti", "fp32", CPU, compile_mode="reduce-overhead")
    row = {"kind": "network", "name": "Ti fp32", "seconds": 1} | found
    assert found["ways"]["compiled"]["error"].startswith(error)
    assert "network_ms" not in found["ways"]["compiled"]
    assert all(way["network_ms"] > 0 for name, way in found["ways"].items() if name != "compiled")
    printed = bench_gpu.summary(row).splitlines()
    assert len(printed) == 1 + len(found["ways"])
    assert " ".join(printed[-1].split()).startswith(f"compiled reduce-overhead: {error}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own parts
def test_a_network_is_compiled_and_gives_the_same_logits() -> None:
    found = gpu_networks.time_network(TINY, "Ti", "fp32", CPU, compile_mode="reduce-overhead")["ways"]["compiled"]
    assert "error" not in found
    assert found["compile_seconds"] > 0
    assert found["parity"] < 1e-3


def test_which_networks_are_compiled_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def modes(**options: Any) -> dict[str, str | None]:
        sections: Any = bench_gpu._sections(CPU, gpu_networks.PAPER, more=(), **options)
        return {name: work.keywords["compile_mode"] for kind, name, work in sections if kind == "network"}

    chosen = modes(full=False, compiled=True)
    assert {name: mode for name, mode in chosen.items() if mode} == {"B bf16": "reduce-overhead"}
    chosen = modes(full=True, compiled=True)
    assert {name for name, mode in chosen.items() if mode == "max-autotune-no-cudagraphs"} == {
        f"{name} bf16" for name in gpu_networks.PAPER.networks
    }
    assert not any(modes(full=True, compiled=False).values())


@torch.inference_mode()
@pytest.mark.parametrize("schedule", [(), (2, 5)])
def test_the_dense_network_gives_the_logits_of_the_unmerged_one(schedule: tuple[int, ...]) -> None:
    windows = torch.randn(2, 3, 64, 64)
    unmerged = gpu_networks.build(TINY, "Ti", CPU, ())
    dense = DenseSegmenter(gpu_networks.build(TINY, "Ti", CPU, schedule)).eval()
    expected = unmerged(windows).flatten(2).mT
    torch.testing.assert_close(dense(windows), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_ways_that_differ_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Segmenter.decode

    def wrong(self: Segmenter, batch: Any) -> Tensor:
        logits = plain(self, batch)
        return logits if batch.merge_maps is None or batch.tokens.is_uniform else logits.flip(2)

    monkeypatch.setattr(Segmenter, "decode", wrong)
    windows = torch.randn(2, 3, 64, 64)
    ways = gpu_networks.network_ways(TINY, "Ti", "fp32", windows, {})
    with pytest.raises(RuntimeError, match=r"^parity: logits deviate by .* of their spread; no figures are reported$"):
        gpu_networks.check_same(ways["MPM"], ways["unmerged"], TINY, Timer(CPU), "fp32")


def test_a_report_keeps_what_was_measured(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("out of luck")

    out = tmp_path / "report.json"
    report = Report({"device": "x"}, out, seconds=60)
    assert report.section("first", "a", lambda: {"ms": 3})
    assert json.loads(out.read_text())["sections"][0]["ms"] == 3
    assert not report.section("second", "b", broken)
    assert report.section("third", "c", lambda: {"ms": 4})
    late = Report({}, None, seconds=-1)
    assert not late.section("fourth", "d", broken)
    assert late.content["left_out"] == ["fourth d"]
    first, second, third = json.loads(out.read_text())["sections"]
    assert second["error"] == "ValueError: out of luck"
    assert (first["ms"], third["ms"]) == (3, 4)


def test_laps_add_up_and_works_take_turns() -> None:
    order: list[str] = []

    def work(name: str) -> Callable[[Laps], object]:
        def run(laps: Laps) -> None:
            order.append(name)
            torch.randn(200, 200) @ torch.randn(200, 200)
            laps.lap("one")
            laps.lap("two")
            laps.lap("one")

        return run

    found = in_turn({"a": work("a"), "b": work("b")}, Timer(CPU), repeats=1, warm_ups=1)
    assert order == ["a", "b", "a", "b"]
    laps = found["a"]
    assert laps["total"] == pytest.approx(laps["one"] + laps["two"] + laps["rest"], abs=1e-3)
    assert laps["one"] > laps["two"]


def test_plain_torch_finds_the_nearest() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]]])
    assert bench_gpu.plain_nearest(x).tolist() == [[1, 2, 1]]
