import io
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.bench import __main__ as bench
from handlers.bench import codec as bench_codecs
from handlers.bench import end_to_end
from handlers.bench import serve as bench_serve
from handlers.bench.grouping import print_report, study
from handlers.bench.lengths import measure_costs, measure_lengths, read_windows
from handlers.bench.load import closed_loop
from handlers.config import ServingConfig
from mpm_ops import Segmenter
from mpm_ops.classes import Classes, default_colors
from mpm_ops.labels import LabelMap


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Segmenter]) -> Segmenter:
    return tiny_model(schedule=(1, 2), patch_size=8)


def measured() -> dict[str, Any]:
    """As a report keeps it: two small streams."""
    rng = np.random.default_rng(0)
    lengths: dict[str, dict[str, list[list[int]]]] = {}
    for name in ("first", "second"):
        plain = [[1025, *rng.integers((700, 500), (800, 600)).tolist()] for _ in range(20)]
        aligned = [[16 * -(-length // 16) + 1 for length in window] for window in plain]
        lengths[name] = {"1": plain, "16": aligned}
    cost = {"launch": 1e-3, "token": 1e-6, "pair": 0.0}
    return {"environment": {"processor": "a test"}, "lengths": lengths, "costs": [cost] * 3}


def test_the_study_covers_every_stream_and_their_mix() -> None:
    report = study(measured(), ["measured", "h100-bfloat16"], [(4, 8)], 60)
    assert report["num_windows"] == {"first": 20, "second": 20, "mixed": 40}
    assert {(row["stream"], row["stage"]) for row in report["padding"]} == {
        (stream, stage) for stream in ("first", "second", "mixed") for stage in (1, 2)
    }
    assert [row["padding"] for row in report["padding"] if row["policy"] == "packed, 4"] == [0] * 6
    assert all(row["occupancy"] <= 1 for row in report["simulation"])
    assert json.loads(json.dumps(report))["profiles"][0]["source"] == "measured on a test"


def test_lengths_are_those_of_the_whole_network(model: Segmenter, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    windows = read_windows(model, tmp_path, most=4)
    assert len(windows) == 4
    lengths = measure_lengths(model, windows, [1, 8])

    batch = model.embed(windows[0][None])
    expected = [len(batch.tokens.values)]
    for stage in model.stages[:-1]:
        batch = model.merge(model.run_blocks(stage, batch))
        expected.append(len(batch.tokens.values))
    assert lengths[1][0] == tuple(expected)
    assert lengths[1][2] == lengths[1][0]  # the same picture again
    assert all((length - 1) % 8 == 0 for window in lengths[8] for length in window)


def test_costs_are_measured_for_every_stage(model: Segmenter) -> None:
    costs = measure_costs(model, 65, repeats=1)
    assert len(costs) == 3
    assert all(cost(4, 33) > 0 for cost in costs)


def test_every_way_of_serving_is_timed(
    tiny_model: Callable[..., Segmenter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(checkpoint: Path, schedule: tuple[int, ...], align: int) -> Segmenter:
        return tiny_model(schedule=schedule, align=align, patch_size=8)

    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(bench_serve, "load_segmenter", load)
    rows = bench_serve.bench_serving(tmp_path / "unused.pth", [tmp_path], (1, 2), seconds=0.1)
    assert [(row["way"], row["align"]) for row in rows] == [(n, way.align) for n, way in bench_serve.WAYS.items()]
    assert rows[0]["mean_group"] == [1, 1, 1]  # alone
    assert all(share == 0 for row in rows if "padded" not in row["way"] for share in row["padding_share"])
    assert next(row for row in rows if row["way"] == "padded-by-arrival")["padding_share"][1] > 0
    assert all(row["pictures_per_second"] > 0 and row["open_ms_p99"] > 0 for row in rows)
    assert len({row["offered_per_second"] for row in rows}) == 1
    assert all(len(row["rounds"]) == bench_serve.ROUNDS for row in rows)


def test_two_ways_of_serving_are_compared_round_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    served = [{"way": "padded", "rounds": [2.0, 4.0]}, {"way": "packed", "rounds": [3.0, 5.0]}]
    print_report({"num_windows": {}, "profiles": [], "served": served})
    assert capsys.readouterr().out.endswith("packed: 1.250 to 1.500 of the pictures per second of padded\n")


def test_a_report_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, later = tmp_path / "earlier.json", tmp_path / "later.json"
    earlier.write_text(json.dumps({"measured": measured()}))
    options = ["--replay", str(earlier), "--out", str(later), "--sizes", "4:8", "--drawn", "40"]
    monkeypatch.setattr("sys.argv", ["bench", "grouping", *options])
    assert bench.main() == 0
    report = json.loads(later.read_text())
    assert report["measured"] == measured()
    assert report["shapes"]["windows"] == {"first": 20, "second": 20, "mixed": 40}
    assert report["environment"]["torch"]
    assert "mixed, 40 windows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "expected --checkpoint and --images, or --replay"),
        (["--replay", "x.json", "--serve", "1"], "--serve: expected --checkpoint and --images"),
        (["--replay", "missing.json"], "No such file or directory: 'missing.json'"),
    ],
)
def test_what_grouping_needs_is_told_in_a_line(
    options: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "grouping", *options])
    assert bench.main() == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("size", ["8", "8:4", "0:4", "a:b"])
def test_bad_sizes_are_refused(size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "grouping", "--replay", "x.json", "--sizes", size])
    with pytest.raises(SystemExit):
        bench.main()
    assert "expected GROUP:POOL" in capsys.readouterr().err


def test_codecs_are_compared_after_parity(tmp_path: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    rows = bench_codecs.bench_codec(model, {"noise": image}, repeats=1)
    assert [row["step"] for row in rows] == ["decode", "cut", "png", "json"]
    assert all(row["plain_ms"] > 0 and row["ms"] > 0 for row in rows)
    assert rows[2]["bytes"] > 0

    monkeypatch.setattr(bench_codecs.codec, "encode_mask_png", lambda labels, classes: png_of(labels * 0))
    with pytest.raises(RuntimeError, match="parity: png"):
        bench_codecs.bench_codec(model, {"noise": image}, repeats=1)


def png_of(labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def test_serving_is_held_against_its_own_steps(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = Classes(tuple("abcde"), default_colors(5))
    images = [np.random.default_rng(i).integers(0, 256, (64, 64 + 40 * i, 3), dtype=np.uint8) for i in range(2)]
    config = ServingConfig(schedule=model.schedule)
    found = end_to_end.bench_end_to_end(model, classes, images, config, seconds=0.2, rounds=1)
    assert found["served_windows_per_second"] > 0
    assert found["summed_ms_p50"] > 0
    monkeypatch.setattr(end_to_end, "label_map", lambda *_: LabelMap(np.zeros((64, 64), np.uint8), None))
    with pytest.raises(RuntimeError, match="parity"):
        end_to_end.bench_end_to_end(model, classes, images, config, seconds=0.2, rounds=1)


def test_clients_number_their_requests_and_finish_the_last() -> None:
    asked: list[int] = []

    def ask(i: int) -> None:
        time.sleep(0.01)
        asked.append(i)

    latencies, elapsed = closed_loop(lambda: nullcontext(ask), 3, 0.1)
    assert sorted(asked) == list(range(len(latencies)))
    assert min(latencies) >= 0.01
    assert elapsed >= 0.1


def test_figures_without_the_refused_are_not_reported() -> None:
    def ask(i: int) -> None:
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="2 of 2 clients failed: no"):
        closed_loop(lambda: nullcontext(ask), 2, 0.1)
