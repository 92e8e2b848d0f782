"""Real servers under load: each way, a search, and a soak that is short."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest.__main__ import main
from loadtest.masks import OK, Library
from loadtest.pictures import ensure_pictures
from loadtest.search import Configuration, RunError, SearchSettings, Served, run_locust, search
from loadtest.slo import Slo

DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo" / "checkpoint.pth"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEMO.is_file(), reason="no demo checkpoint"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty and a crowded scene."""
    folder = tmp_path_factory.mktemp("scenes")
    ensure_pictures(folder, {"clutter": (0, 1), "sizes": ((320, 240),)})
    return folder


def load(server: Served, scenes: Path, **options: Any) -> dict[str, Any]:
    settings = SearchSettings(slo=Slo.parse("errors=0"), pictures=scenes)
    mix = {"accept": "png=66%,json=34%", "raw": "20%", "bad": "20%", "metrics": ",".join(server.metrics)}
    return run_locust(server, settings, None, **(mix | options))


@pytest.mark.parametrize("protocol", ["torchserve", "triton", "triton-grpc"])
def test_every_protocol_gives_the_masks_of_the_idle_server(protocol: str, scenes: Path, tmp_path: Path) -> None:
    with Served(Configuration(protocol=protocol), DEMO, tmp_path) as server:
        server.wait_ready()
        summary = load(server, scenes, rate=3, run_time=10)
    assert set(summary["outcomes"]) == {OK}
    kinds = {row["name"]: row["requests"] for row in summary["kinds"]}
    assert set(kinds) == {"png", "json", "raw", "bad"}
    assert summary["agreement"]["least"] == 1.0
    assert summary["held"]
    assert summary["served"]["schedule"] == "2,5"
    idle = summary["server"]["images"] - sum(number for kind, number in kinds.items() if kind != "bad")
    assert 0 <= idle <= 4  # two scenes in two forms, as far as the last reading before the load was before them
    assert 0.05 < summary["server"]["stages"]["0"]["merged_share"] < 0.6
    if protocol == "torchserve":
        crowded, empty = (
            next(row["tokens_out"] for row in summary["pictures"] if row["name"].startswith(name))
            for name in ("clutter100", "clutter000")
        )
        assert crowded > empty  # lengths vary on purpose


def test_a_short_soak_loses_nothing_and_leaks_nothing(scenes: Path, tmp_path: Path) -> None:
    with Served(Configuration(), DEMO, tmp_path) as server:
        server.wait_ready()
        load(server, scenes, users=12, spawn_rate=12, run_time=15)  # more at once than the soak: what that takes stays
        summary = load(server, scenes, rate=1.2, run_time=100, shape="soak")
    assert summary["held"], summary["checks"]
    assert not summary["doubts"]
    assert summary["memory_growth"] < 0.05


def test_a_search_compares_configurations_and_sizes_them(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    configurations = [Configuration.parse("schedule=off"), Configuration.parse("schedule=2,5")]
    settings = SearchSettings(
        slo=Slo.parse("p90=2s,errors=0"),
        pictures=scenes,
        repeats=2,
        trials=2,
        requests=10,
        min_seconds=3,
        max_seconds=6,
        probe_seconds=3,
        probe_users=4,
    )
    report = search(configurations, DEMO, settings)
    assert {"device", "versions", "slo", "results"} <= set(report)
    for result, configuration in zip(report["results"], configurations, strict=True):
        assert result["configuration"] == asdict(configuration)
        assert 0 < result["low"] <= result["rate_per_second"] <= result["high"]
        assert result["p50_ms"] <= result["p99_ms"]
        assert result["library"]["compared"] == 2
        assert result["library"]["least"] > 0.99
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before

    (tmp_path / "search.json").write_text(json.dumps(report))
    assert main(["capacity", "--rate", "10", str(tmp_path / "search.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for result in report["results"]:
        (row,) = (line for line in lines if line.startswith(f"{result['name']}  "))
        replicas = int(row.removeprefix(result["name"]).split()[4])
        assert 0.7 * result["low"] * replicas >= 10 > 0.7 * result["low"] * (replicas - 1)
    assert not [line for line in lines if "not compared with the library's" in line]


def test_a_search_stops_at_masks_that_are_not_the_library_s(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Library.masks
    monkeypatch.setattr(Library, "masks", lambda self, found: masks(replace(self, schedule="0,1,2,3"), found))
    settings = SearchSettings(slo=Slo.parse("p90=2s"), pictures=scenes)
    with pytest.raises(RunError, match=r"torchserve, no merging: .* when idle: not the library's mask"):
        search([Configuration(schedule="off")], DEMO, settings)


def test_a_checkpoint_that_is_not_there(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected variant\.yml beside the checkpoint"):
        Served(Configuration(), tmp_path / "missing.pth", tmp_path)
