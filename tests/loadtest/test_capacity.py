"""Sizes by hand arithmetic, from files as the benchmarks write them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main
from loadtest.capacity import Measured, ResultError, read_results, size_up

SEARCH: dict[str, Any] = {
    "device": "an H100",
    "versions": {"torch": "2.11"},
    "slo": "p99=800ms,errors=0.1%",
    "results": [
        {
            "configuration": {"schedule": "2,5"},
            "name": "merged",
            "rate_per_second": 44.0,
            "low": 40.0,
            "high": 47.0,
            "p50_ms": 80.0,
            "p99_ms": 700.0,
        },
        {
            "configuration": {"schedule": "off", "replicas": 2},
            "name": "plain, two on a device",
            "rate_per_second": 30.0,
            "low": 28.0,
            "high": 31.0,
            "p50_ms": 120.0,
            "p99_ms": 790.0,
        },
    ],
}
CODEC: dict[str, Any] = {
    "environment": {"processor": "a CPU"},
    "repeats": 11,
    "results": [
        {"picture": picture, "step": step, "plain_ms": 9.0, "ms": ms, "speedup": 2.0}
        for picture, by_step in {
            "small": {"decode": 1.0, "cut": 1.0, "png": 0.5, "json": 9.0},
            "large": {"decode": 9.0, "cut": 2.0, "png": 1.5, "json": 9.0},
        }.items()
        for step, ms in by_step.items()
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a result and gives its file."""

    def write(result: Any) -> Path:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(result))
        return file

    return write


@pytest.fixture
def run() -> Callable[..., int]:
    return lambda *arguments: main(["capacity", *map(str, arguments)])


class TestSizes:
    def test_the_low_end_less_the_headroom_carries_the_rate(self, write: Callable[[Any], Path]) -> None:
        merged, plain = (size_up(one, 500, 0.3) for one in read_results([write(SEARCH)]))
        assert merged.usable_per_replica == pytest.approx(28)  # 0.7 * 40
        assert (merged.replicas, merged.replicas_with_spare, merged.devices) == (18, 19, 19)  # 500 / 28 = 17.9
        assert merged.load == pytest.approx(500 / (19 * 40))
        assert merged.load_one_away == pytest.approx(500 / (18 * 40))
        assert merged.pictures_per_device_hour == 40 * 3600
        assert merged.codec_cores is None

        assert plain.usable_per_replica == pytest.approx(9.8)  # two replicas did 28 together
        assert (plain.replicas, plain.replicas_with_spare, plain.devices) == (52, 53, 27)
        assert plain.pictures_per_device_hour == 28 * 3600

    def test_what_fits_exactly_takes_no_further_replica(self) -> None:
        one = Measured(name="one", device="a device", rate=50, low=50, high=50)
        assert size_up(one, 350, 0.3).replicas == 10
        assert size_up(one, 350.1, 0.3).replicas == 11
        assert size_up(one, 1, 0.0).replicas_with_spare == 2

    @pytest.mark.parametrize(
        ("rate", "headroom", "message"),
        [
            (0, 0.3, "rate: expected pictures per second > 0, got 0"),
            (float("nan"), 0.3, "rate: expected pictures per second > 0, got nan"),
            (5, 1.0, "headroom: expected a share within 0..1, 1 excluded, got 1"),
            (5, -0.1, "headroom: expected a share within 0..1, 1 excluded, got -0.1"),
        ],
    )
    def test_bad_targets(self, rate: float, headroom: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            size_up(Measured(name="one", device="a device", rate=50, low=50, high=50), rate, headroom)


class TestReading:
    def test_the_codec_costs_its_dearest_picture(self, write: Callable[[Any], Path]) -> None:
        for files in ([write(SEARCH), write(CODEC)], [write(CODEC), write(SEARCH)]):
            merged, plain = read_results(files)
            assert merged.codec_ms == plain.codec_ms == 12.5
        assert size_up(merged, 500, 0.3).codec_cores == pytest.approx(40 * 12.5 / 1000)
        assert size_up(plain, 500, 0.3).codec_cores == pytest.approx(14 * 12.5 / 1000)


def without(result: dict[str, Any], *path: str | int) -> dict[str, Any]:
    return changed(result, *path)


def changed(result: dict[str, Any], *path: str | int, **values: Any) -> dict[str, Any]:
    """A copy with one value taken away, or replaced by `to`."""
    copied = copy.deepcopy(result)
    place: Any = copied
    for step in path[:-1]:
        place = place[step]
    if values:
        place[path[-1]] = values["to"]
    else:
        del place[path[-1]]
    return copied


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([], r"expected what loadtest search or bench codec wrote, got \[\]"),
        ({}, r"expected what loadtest search or bench codec wrote, got \{\}"),
        (3, "expected JSON of loadtest search or bench codec"),
        (without(SEARCH, "device"), "'device': expected in what loadtest search"),
        (changed(SEARCH, "results", to=[3]), "expected JSON of loadtest search or bench codec"),
        (without(SEARCH, "results", 1, "low"), "'low': expected in what loadtest search"),
        (changed(SEARCH, "results", 0, "low", to="40"), "expected JSON of loadtest search"),
        (
            changed(SEARCH, "results", 0, "low", to=-1),
            "merged: expected 0 <= low <= rate_per_second <= high, .* got -1",
        ),
        (changed(SEARCH, "results", 0, "high", to=float("nan")), "merged: expected 0 <= low .* nan of 1 replicas"),
        (changed(SEARCH, "results", 0, "low", to=45.0), "merged: expected 0 <= low .* got 45"),
        (changed(SEARCH, "results", 1, "configuration", "replicas", to=0), "replicas >= 1, got .* of 0 replicas"),
        (CODEC, "nothing was measured in these files but the cost of decoding and encoding"),
        (changed(CODEC, "results", 2, "step", to="gif"), r"\('small', 'png'\): expected in what"),
    ],
)
def test_bad_files_are_refused_by_the_name_of_a_field(
    result: Any,
    message: str,
    write: Callable[[Any], Path],
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ResultError, match=message):
        read_results([write(result)])
    assert run("--rate", 5, write(result)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}"])
def test_what_is_not_json(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ResultError, match=r"broken\.json: expected JSON"):
        read_results([file])


class TestCommand:
    def test_a_table_its_assumptions_and_json(
        self,
        write: Callable[[Any], Path],
        run: Callable[..., int],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "sizes.json"
        other = write(SEARCH | {"device": "a CPU"})
        assert run("--rate", 500, "--headroom", 0.3, write(SEARCH), write(CODEC), other, "--out", out) == 0
        printed = capsys.readouterr().out
        merged = next(line for line in printed.splitlines() if line.startswith("merged  "))
        assert merged.split()[1:7] == ["44", "40..47", "80/700", "28", "18", "19"]
        assert "144,000" in merged
        assert "measured on different devices, which don't compare: an H100; a CPU" in printed
        assert "maxUnavailable 1" in printed
        written = json.loads(out.read_text())
        assert [size["replicas_with_spare"] for size in written["sizes"]][:2] == [19, 53]
        assert written["sizes"][0]["measured"]["low"] == 40.0

    def test_what_held_at_no_rate_has_no_size(
        self, write: Callable[[Any], Path], run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        never = {"low": 0.0, "rate_per_second": 0.0, "high": 0.4, "p50_ms": None, "p99_ms": None}
        plain = changed(SEARCH, "results", 1, to=SEARCH["results"][1] | never)
        assert run("--rate", 500, write(plain)) == 0
        printed = capsys.readouterr().out
        assert "\nmerged  " in printed
        assert "plain, two on a device: no size, because in one repeat or more no rate that was tried held" in printed
        both = changed(plain, "results", 0, to=SEARCH["results"][0] | {"low": 0.0})
        assert run("--rate", 500, write(both)) == 2
        assert "no rate that was tried held in every repeat, of merged; plain" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--rate", "-1"], "rate: expected"),
            (["--rate", "5", "--headroom", "2"], "headroom: expected"),
        ],
    )
    def test_bad_options(
        self,
        options: list[str],
        message: str,
        write: Callable[[Any], Path],
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(*options, write(SEARCH)) == 2
        assert capsys.readouterr().err.startswith(message)

    def test_no_such_file(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--rate", 5, "missing.json") == 2
        assert "missing.json" in capsys.readouterr().err
