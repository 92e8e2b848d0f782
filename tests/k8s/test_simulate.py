"""The autoscaler of the manifests, simulated: what a real one did under the same load, and what settings change."""

import io
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rendering import K8S, manifests, render, render_overlay

from handlers.cli import main
from k8s.check import problems
from k8s.manifests import Manifests
from k8s.simulate import Scaler, simulate

HOUR = 3600


@pytest.fixture(scope="module")
def scaler() -> Scaler:
    return Scaler.of(manifests("overlays/h100-sxm/torchserve"))


def steps(replicas: Sequence[int]) -> list[int]:
    return [number for number, _ in itertools.groupby(replicas)]


def test_constant_load_of_three_and_a_half_replicas(scaler: Scaler) -> None:
    """With both signals it settles at five; with waiting alone it goes into overload again and again."""
    load = [3.5] * 2 * HOUR
    started = replace(scaler, low=5)
    both = simulate([*[3.5] * HOUR, *load], started, start_seconds=60)
    assert (both.refused, both.overloaded, set(both.replicas)) == (0, 0, {5})
    alone = simulate(load, replace(scaler, use=math.inf), start_seconds=60)
    assert alone.refused > 0.01
    assert alone.overloaded >= 3
    assert [5, 4, 3, 6] in [steps(alone.replicas)[i : i + 4] for i in range(len(steps(alone.replicas)))]
    settled = simulate(load, scaler, start_seconds=60)
    assert steps(settled.replicas)[-1] == 5
    assert settled.refused < alone.refused / 3
    assert settled.gpu_hours < alone.gpu_hours


def test_levers_against_a_fast_ramp(scaler: Scaler) -> None:
    """From 0.5 to 3.5 replicas in four minutes: a higher minimum, a cron, more headroom, a shorter start."""
    load = [0.5] * HOUR + [0.5 + 3 * second / 240 for second in range(240)] + [3.5] * HOUR
    refused = simulate(load, scaler, start_seconds=60).refused
    assert refused > 0.001
    for lever in (
        replace(scaler, low=4),
        replace(scaler, use=0.5),
        replace(scaler, crons=((HOUR - 600, 3 * HOUR, 5),)),
    ):
        assert simulate(load, lever, start_seconds=60).refused < refused / 2
    assert simulate(load, scaler, start_seconds=15).refused < refused / 2
    assert simulate(load, scaler, start_seconds=180).refused > 2 * refused


def test_one_replica_and_back(scaler: Scaler) -> None:
    load = [0.1] * HOUR + [0.1 + 2.9 * second / HOUR for second in range(HOUR)] + [0.1] * HOUR
    found = simulate(load, replace(scaler, low=1), start_seconds=60)
    assert (found.replicas[0], max(found.replicas), found.replicas[-1]) == (1, 4, 1)
    assert found.refused == 0


@pytest.mark.parametrize(("start", "end", "minutes"), [(8, 2, 20), (300, 100, 30), (1000, 300, 32)])
def test_a_fleet_shrinks_in_minutes(scaler: Scaler, start: int, end: int, minutes: int) -> None:
    fleet = replace(scaler, low=1, high=2000, crons=((0, HOUR, start),))
    found = simulate([0.7 * end] * 3 * HOUR, fleet, start_seconds=0)
    assert found.replicas[HOUR - 1] == start
    below = next(second for second, number in enumerate(found.replicas) if second > HOUR and number <= end)
    assert below / 60 - 60 == pytest.approx(minutes, abs=0.5)


def rollout_minutes(replicas: int, start_seconds: float) -> float:
    """Each pod ends within preStop's 15 s once it is idle, starts, and is ready for minReadySeconds of 5 s."""
    share = max(1, replicas // 10)
    return math.ceil(replicas / share) * (15 + start_seconds + 5) / 60


def test_the_readme_s_table_of_sizes() -> None:
    text = (K8S / "README.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| rollout, pods that start in 60 s |")]
    told = [float(cell.strip().removesuffix(" min")) for cell in row.split("|")[2:5]]
    assert told == [pytest.approx(rollout_minutes(number, 60), abs=0.5) for number in (8, 100, 1000)]
    deployment = manifests("overlays/h100-sxm/torchserve").servers[0]["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    assert deployment["minReadySeconds"] == 5


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *options: str,
    day: str = "00:00,300\n08:00,300\n09:00,1700\n10:00,1700",
) -> int:
    (folder / "day.csv").write_text(day)
    monkeypatch.setattr("sys.stdin", io.StringIO(render("overlays/h100-sxm/torchserve")))
    return main(["simulate", "--day", str(folder / "day.csv"), *options])


def test_the_cheapest_that_refuses_nobody_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [{"measured": {"name": "one", "low": 500.0, "replicas": 1}, "codec_cores": 3.1}]
    (tmp_path / "sizes.json").write_text(json.dumps({"sizes": sizes}))
    given = [
        "--rate",
        str(tmp_path / "sizes.json"),
        "--min",
        "1,4",
        "--use",
        "0.8,0.95",
        "--write",
        str(tmp_path / "m"),
    ]
    assert run(monkeypatch, tmp_path, *given) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    good = [row for row in rows if float(row[4].rstrip("%")) <= 0.1]
    assert len(rows) == 4
    cheapest = min(good, key=lambda row: float(row[5]))
    patch = yaml.safe_load((tmp_path / "m" / "kustomization.yaml").read_text())["patches"]
    text = "resources: [../h100-sxm/torchserve]\npatches:\n" + yaml.safe_dump(patch)
    found = Manifests.parse(render_overlay(text))
    assert problems(found) == []
    chosen = Scaler.of(found)
    assert [str(chosen.low), f"{chosen.use:g}"] == [cheapest[0], cheapest[3]]
    requests = found.servers[0]["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert requests["cpu"] == "6", "a quarter more than 3.1, 1 and 0.5 cores"


@pytest.mark.parametrize(
    ("day", "options", "status", "told"),
    [
        ("00:00,1\n00:00,2", ["--rate", "1"], 2, "line 2: expected HH:MM,PICTURES_PER_SECOND, later than before"),
        ("noon,1", ["--rate", "1"], 2, "line 1: expected HH:MM"),
        ("00:00,1", ["--rate", "1"], 2, "expected two lines or more, got 1"),
        (
            "00:00,1\n00:10,1",
            ["--rate", "fast"],
            2,
            "rate: expected pictures per second, or a file of `capacity --out`, got 'fast'",
        ),
        ("00:00,90\n00:10,90", ["--rate", "1"], 1, "none refuses 0.001 or less"),
    ],
)
def test_what_cannot_be_simulated(
    day: str,
    options: list[str],
    status: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path, *options, day=day) == status
    assert told in capsys.readouterr().err
