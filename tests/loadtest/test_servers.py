"""Real servers under load: each way, a search, and a soak that is short."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtest import capacity
from loadtest.client.masks import OK
from loadtest.client.pictures import load_mix, paint_pictures
from loadtest.client.shapes import steady
from loadtest.preparing import Library, library_masks
from loadtest.report.summary import Limits, summarize
from loadtest.running import RunError, RunResult, run_load
from loadtest.search import SearchSettings, search
from loadtest.settings import LoadSettings
from loadtest.sizing.servers import MODEL, Configuration, Served
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
    paint_pictures(folder, clutter=[0, 1], sizes=[(320, 240)], num_seeds=1)
    return folder


def load(server: Served, scenes: Path, rate: float, seconds: float, **more: Any) -> tuple[LoadSettings, RunResult]:
    settings = LoadSettings(
        way=server.configuration.way,
        urls=tuple(server.urls),
        model=MODEL,
        pictures=str(scenes),
        phases=steady(rate, seconds),
        shares={"json": 0.2, "raw": 0.2, "bad": 0.2},
        **more,
    )
    return settings, run_load(settings, metrics=server.metrics)


@pytest.mark.parametrize("way", ["torchserve", "triton", "triton-grpc"])
def test_every_way_gives_the_masks_of_the_idle_server(way: str, scenes: Path, tmp_path: Path) -> None:
    with Served(Configuration(way=way), DEMO, tmp_path) as server:
        server.wait_ready(load_mix(scenes, shares={}, weights={}, seed=0).pictures[0])
        settings, result = load(server, scenes, 3, 10)
    outcomes = Counter((record.kind, record.outcome) for record in result.records)
    assert {outcome for _, outcome in outcomes} == {OK}
    assert {kind for kind, _ in outcomes} == {"png", "json", "raw", "bad"}
    assert {record.agreement for record in result.records if record.kind != "bad"} == {1.0}
    summary = summarize(settings, result, Limits(slo=Slo.parse("errors=0")))
    assert summary["held"]
    assert summary["served"]["schedule"] == "2,5"
    idle = summary["server"]["images"] - sum(record.kind != "bad" for record in result.records)
    assert 0 <= idle <= 4  # two scenes in two forms, as far as the last reading before the load was before them
    assert 0.05 < summary["server"]["stages"]["0"]["merged_share"] < 0.6
    if way == "torchserve":
        crowded, empty = (
            next(row["tokens_out"] for row in summary["pictures"] if row["name"].startswith(name))
            for name in ("clutter100", "clutter000")
        )
        assert crowded > empty  # lengths vary on purpose


def test_a_short_soak_loses_nothing_and_leaks_nothing(scenes: Path, tmp_path: Path) -> None:
    with Served(Configuration(), DEMO, tmp_path) as server:
        server.wait_ready(load_mix(scenes, shares={}, weights={}, seed=0).pictures[0])
        load(server, scenes, 1, 15, closed=12)  # more at once than the soak will have: what that takes stays taken
        settings, result = load(server, scenes, 1.2, 100)
    summary = summarize(settings, result, Limits(slo=Slo.parse("errors=0"), max_growth=0.05))
    assert summary["held"], summary["checks"]
    assert len(result.records) == len(settings.arrivals())
    assert summary["memory_growth"] < 0.05


def test_a_search_compares_configurations_and_sizes_them(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        assert result["configuration"] == configuration.as_dict()
        assert 0 < result["low"] <= result["rate_per_second"] <= result["high"]
        assert result["p50_ms"] <= result["p99_ms"]
        assert result["library"]["compared"] == 2
        assert result["library"]["least"] > 0.99
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before

    (tmp_path / "search.json").write_text(json.dumps(report))
    monkeypatch.setattr("sys.argv", ["capacity", "--rate", "10", str(tmp_path / "search.json")])
    assert capacity.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for result in report["results"]:
        (row,) = (line for line in lines if line.startswith(f"{result['name']}  "))
        replicas = int(row.removeprefix(result["name"]).split()[4])
        assert 0.7 * result["low"] * replicas >= 10 > 0.7 * result["low"] * (replicas - 1)
    assert not [line for line in lines if "not held against the library's" in line]


def test_a_search_stops_at_masks_that_are_not_the_library_s(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(library: Library, pictures: Sequence[Path]) -> dict[str, str]:
        return library_masks(replace(library, schedule="0,1,2,3"), pictures)

    monkeypatch.setattr("loadtest.search.library_masks", other)
    settings = SearchSettings(slo=Slo.parse("p90=2s"), pictures=scenes)
    with pytest.raises(RunError, match=r"torchserve, no merging: .* when idle: not the library's mask"):
        search([Configuration(schedule="off")], DEMO, settings)


def test_a_checkpoint_that_is_not_there(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected variant\.yml beside the checkpoint"):
        Served(Configuration(), tmp_path / "missing.pth", tmp_path)
