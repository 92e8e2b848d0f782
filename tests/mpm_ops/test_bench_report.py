"""What the benchmarks share."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpm_ops import Segmenter
from mpm_ops.bench import __main__ as bench
from mpm_ops.bench import model_shapes, percentile_ms, read_images, time_in_turn, write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(7):
        Image.fromarray(np.full((2, 3, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("most", "chosen"), [(None, range(7)), (1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (7, range(7)), (9, range(7))]
)
def test_pictures_are_chosen_evenly(folder: Path, most: int | None, chosen: list[int]) -> None:
    images = read_images(folder, most)
    assert [image[0, 0, 0] for image in images] == list(chosen)
    assert {image.shape for image in images} == {(2, 3, 3)}


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="most: expected at least 1, got 0"):
        read_images(folder, 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no pictures"):
        read_images(empty)


def test_ways_take_turns() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = time_in_turn(ways, repeats=2)
    assert calls == ["a", "b", "a", "b"]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 2, "b": 2}
    assert len(time_in_turn(ways, repeats=1, seconds=0.05)["a"]) > 1


def test_percentiles_are_milliseconds() -> None:
    assert percentile_ms([0.001, 0.002, 0.4]) == 2
    assert percentile_ms([0.001, 0.002], 100) == 2


def test_a_report_says_what_it_depends_on(tmp_path: Path, tiny_model: Callable[..., Segmenter]) -> None:
    told = write_report(tmp_path / "x.json", {"answer": 1}, shapes=model_shapes(tiny_model(schedule=(1, 2))))
    written = json.loads((tmp_path / "x.json").read_text())
    assert written == told
    assert written["answer"] == 1
    assert written["shapes"]["window"] == 64
    assert written["shapes"]["schedule"] == [1, 2]
    assert {"processor", "threads", "torch", "numpy", "commit"} <= set(written["environment"])
    assert write_report(None, {}, shapes={})["shapes"] == {}


def test_errors_are_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "model", "--checkpoint", "no.pth", "--images", "nowhere"])
    assert bench.main() == 1
    assert capsys.readouterr().err == "no.pth: no such checkpoint, nor a folder with one\n"
