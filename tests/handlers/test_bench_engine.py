"""The engine's section of the GPU's benchmark, on whatever runs the tests."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from handlers.bench import engines
from handlers.bench import gpu as bench_gpu
from handlers.bench.gpu import soft_pictures
from mpm_ops.bench import gpu

pytest_plugins = ("tiny_server",)


@pytest.fixture
def deep(checkpoint: Path, tmp_path: Path) -> Path:
    """The folder of a small checkpoint with the blocks of the default schedule."""
    variant = (checkpoint.parent / "variant.yml").read_text().replace("n_layers: 3", "n_layers: 6")
    (tmp_path / "variant.yml").write_text(variant)
    shutil.copy(checkpoint.parent / "classes.csv", tmp_path)
    weights = torch.load(checkpoint, weights_only=True)["model"]
    blocks = {name: name.split(".") for name in weights if name.startswith("encoder.blocks.")}
    more = {".".join([*n[:2], str(3 + int(n[2])), *n[3:]]): weights[name] for name, n in blocks.items()}
    torch.save({"model": weights | more}, tmp_path / "checkpoint.pth")
    return tmp_path


def test_the_engine_is_timed_from_bytes_and_from_frames(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "INFLIGHT", 2)
    monkeypatch.setattr(bench_gpu, "_alone", lambda engine, data, options: [0.25, 0.5, 1.0])
    lookaheads: list[int] = []
    saturate = bench_gpu._saturate

    def note(engine: Any, *arguments: Any) -> float:
        lookaheads.append(engine.lookahead)
        return saturate(engine, *arguments)

    monkeypatch.setattr(bench_gpu, "_saturate", note)
    found = bench_gpu.time_engine(deep, bench_gpu.soft_pictures(1, 128), "cpu", seconds=0.1)
    served = ["jpeg, merged", "jpeg, unmerged", "frame, merged", "frame, unmerged"]
    assert list(found["engine"]) == [*served, *(f"{way}, one group at a time" for way in served[2:])]
    assert lookaheads == 3 * [1, 1, 1, 1, 0, 0]
    for row in found["engine"].values():
        assert row["pictures_per_second"] > 0
        assert row["alone_ms_p50"] == 500
    assert set(found["same_bytes_among_others"].values()) == {1.0}


def test_it_is_one_of_the_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any, **options: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'simplejpeg'")

    monkeypatch.setattr(bench_gpu, "time_engine", broken)
    monkeypatch.setattr(gpu, "_sections", lambda *_, more, **__: [*more, ("merge", "", lambda: {"median_ms": {}})])
    monkeypatch.setattr(gpu, "check_parity", lambda *_: {})
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--out", str(out), "--only", "engine,merge"])
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")
    assert bench_gpu.main() == 1
    sections = json.loads(out.read_text())["sections"]
    assert [section["kind"] for section in sections] == ["parity", "engine", "merge"]
    assert sections[1]["error"] == "ModuleNotFoundError: No module named 'simplejpeg'"
    assert "error" not in sections[2]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["real", "free"])
def test_engines_in_processes_of_their_own(
    network: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    command = f"gpu --device cpu --only engines --processes 1 2 --loop 0.5 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(engines, "NETWORKS", (network,))
    monkeypatch.setattr(bench_gpu, "INFLIGHT", 4)
    monkeypatch.setattr(bench_gpu, "soft_pictures", lambda number, side: soft_pictures(2, 256))
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(gpu, "device_facts", lambda device: {"name": str(device)})
    assert bench_gpu.main() == 0
    (section,) = json.loads(out.read_text())["sections"]
    assert [(row["source"], row["processes"]) for row in section["engines"]] == [
        (source, number) for source in ("jpeg", "frame") for number in (1, 2)
    ]
    for row in section["engines"]:
        assert row["network"] == network
        assert len(row["of_each"]) == row["processes"]
    if network == "free":
        assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in section["engines"])
        assert all(row["pictures_per_second"] > 0 for row in section["engines"])
    assert capsys.readouterr().out.count(" pictures/s  p50 ") == 4


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    load = engines.Load(folder=tmp_path, size="Ti", device="cpu", sources={"jpeg": [b""]})
    with pytest.raises(RuntimeError, match=r"^engines: a process failed: .*checkpoint\.pth: no such checkpoint"):
        engines.time_engines(load, processes=[1], networks=["free"], seconds=0.1)
