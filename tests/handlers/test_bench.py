import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.bench import __main__ as bench
from handlers.bench import codec as bench_codecs
from handlers.bench import end_to_end
from handlers.bench import serve as bench_serve
from handlers.bench.__main__ import study
from handlers.bench.lengths import measure_costs, measure_lengths, read_windows
from handlers.config import ServingConfig
from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig
from mpm_ops.classes import Classes, default_colors
from mpm_ops.labels import LabelMap


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    shape = SegmenterConfig(image_size=(64, 64), patch_size=8, d_model=64, n_heads=1, n_layers=3, n_cls=5)
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=64, normalization="vit")
    network = Segmenter(shape, inference, schedule=(1, 2)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


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


def test_every_way_of_serving_is_timed(model: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(checkpoint: Path, schedule: tuple[int, ...], align: int) -> Segmenter:
        aligned = Segmenter(model.config, model.inference, schedule=schedule, align=align).eval()
        aligned.load_state_dict(model.state_dict())
        return aligned

    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(bench_serve, "load_segmenter", load)
    rows = bench_serve.bench_serving(tmp_path / "unused.pth", [tmp_path], (1, 2), seconds=0.1)
    assert [(row["way"], row["align"]) for row in rows] == [(way.name, way.align) for way in bench_serve.WAYS]
    assert rows[0]["mean_group"] == [1, 1, 1]  # alone
    assert all(row["pictures_per_second"] > 0 and row["open_ms_p99"] > 0 for row in rows)


def test_a_report_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, later = tmp_path / "earlier.json", tmp_path / "later.json"
    earlier.write_text(json.dumps({"measured": measured()}))
    options = ["--replay", str(earlier), "--out", str(later), "--sizes", "4:8", "--drawn", "40"]
    monkeypatch.setattr("sys.argv", ["bench", "grouping", *options])
    assert bench.main() == 0
    assert json.loads(later.read_text())["measured"] == measured()
    assert "mixed, 40 windows" in capsys.readouterr().out


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
