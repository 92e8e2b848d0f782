"""Sizes by hand arithmetic, from files as the benchmarks write them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.api.formats.views import encode_picture
from handlers.bench.__main__ import main as bench
from loadtest.__main__ import main
from loadtest.capacity import Measured, ResultError, read_results, size_up

pytest_plugins = ("tiny_server",)

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
END_TO_END: dict[str, Any] = {
    "environment": {"processor": "a CPU"},
    "runtime": "openvino fp32",
    "median_ms": {"decode": 6.0, "network": 200.0, "labels": 4.0, "encode": 2.0},
    "served_windows_per_second": 9.0,
    "alone_ms_p50": 210.0,
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
    def test_windows_become_pictures(self, write: Callable[[Any], Path]) -> None:
        file = write(END_TO_END)
        with pytest.raises(ResultError, match="expected --windows-per-picture"):
            read_results([file])
        (found,) = read_results([file], windows_per_picture=1.5)
        assert found.rate == 6.0
        assert size_up(found, 60, 0.0).codec_cores == pytest.approx(6.0 * 8 / 1000)
        (told,) = read_results([write(END_TO_END | {"windows_per_picture": 2.0})], windows_per_picture=1.5)
        assert told.rate == 4.5

    def test_the_codec_costs_its_dearest_picture(self, write: Callable[[Any], Path]) -> None:
        files = [write(SEARCH), write(CODEC), write(END_TO_END)]
        merged, plain, alone = read_results(files, windows_per_picture=1)
        assert merged.codec_ms == plain.codec_ms == 12.5
        assert alone.codec_ms == 8.0  # its own
        assert size_up(merged, 500, 0.3).codec_cores == pytest.approx(40 * 12.5 / 1000)
        assert size_up(plain, 500, 0.3).codec_cores == pytest.approx(14 * 12.5 / 1000)
        assert "large, the dearest picture measured" in merged.assumptions[-1]

    def test_what_the_benchmarks_write(
        self,
        checkpoint: Path,
        photo: Callable[..., np.ndarray],
        write: Callable[[Any], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Real files of `handlers.bench`, so that a change of their form is seen here."""
        pictures, out = tmp_path / "pictures", tmp_path / "end_to_end.json"
        pictures.mkdir()
        for i in range(5):
            (pictures / f"{i}.png").write_bytes(encode_picture(photo(i), "image/png"))
        options = ["--checkpoint", checkpoint, "--images", pictures, "--out", out, "--schedule", "1"]
        monkeypatch.setattr("sys.argv", ["bench", "end-to-end", *map(str, options)])
        assert bench() == 0
        (found,) = read_results([out], windows_per_picture=1)
        written = json.loads(out.read_text())
        assert found.rate == written["served_windows_per_second"] / written.get("windows_per_picture", 1)
        assert found.codec_ms == sum(written["median_ms"][step] for step in ("decode", "encode"))


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
        ([], r"expected a mapping, got \[\]"),
        ({}, "expected the result of loadtest search .* got nothing"),
        ({"environment": {}}, "expected the result of loadtest search .* got environment"),
        (without(SEARCH, "device"), "device: missing; there are results, slo, versions"),
        (changed(SEARCH, "results", to=[]), r"results: expected a list that is not empty, got \[\]"),
        (changed(SEARCH, "results", to=[3]), r"results\[0\]: expected a mapping, got 3"),
        (without(SEARCH, "results", 1, "low"), r"results\[1\]\.low: missing"),
        (changed(SEARCH, "results", 0, "low", to="40"), r"results\[0\]\.low: expected a number >= 0, got '40'"),
        (changed(SEARCH, "results", 0, "low", to=True), r"results\[0\]\.low: expected a number >= 0, got True"),
        (changed(SEARCH, "results", 0, "low", to=-1), r"results\[0\]\.low: expected a number >= 0, got -1"),
        (changed(SEARCH, "results", 0, "high", to=float("nan")), r"results\[0\]\.high: expected .* got nan"),
        (
            changed(SEARCH, "results", 0, "low", to=45.0),
            r"results\[0\]: expected low <= rate_per_second <= high, got 45",
        ),
        (
            changed(SEARCH, "results", 1, "configuration", "replicas", to=0),
            r"results\[1\]\.configuration\.replicas: expected a number of things >= 1, got 0",
        ),
        (without(END_TO_END, "environment", "processor"), r"environment\.processor: missing"),
        (changed(END_TO_END, "median_ms", "decode", to=-1), r"median_ms\.decode: expected a number >= 0, got -1"),
        (CODEC, "nothing was measured in these files but the cost of decoding and encoding"),
        (changed(CODEC, "results", 2, "step", to="gif"), "no step 'png' for the picture 'small'"),
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
        read_results([write(result)], windows_per_picture=1)
    assert run("--rate", 5, "--windows-per-picture", 1, write(result)) == 2
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
        assert (
            run(
                "--rate",
                500,
                "--headroom",
                0.3,
                write(SEARCH),
                write(CODEC),
                write(END_TO_END),
                "--windows-per-picture",
                1,
                "--out",
                out,
            )
            == 0
        )
        printed = capsys.readouterr().out
        (merged,) = (line for line in printed.splitlines() if line.startswith("merged  "))
        assert merged.split()[1:7] == ["44", "40..47", "80/700", "28", "18", "19"]
        assert "144,000" in merged
        assert "merged: rate: the highest that held p99=800ms,errors=0.1%; sized by the low end" in printed
        assert "measured on different devices, which don't compare: an H100; a CPU" in printed
        assert "maxUnavailable 1" in printed
        written = json.loads(out.read_text())
        assert [size["replicas_with_spare"] for size in written["sizes"]][:2] == [19, 53]
        assert written["sizes"][0]["measured"]["low"] == 40.0
        assert written["assumptions"]

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
            (["--rate", "5", "--windows-per-picture", "0"], "windows-per-picture: expected a number >= 1, got 0"),
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
