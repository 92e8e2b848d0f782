import io
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handlers.bench import codec as bench_codecs
from handlers.bench import end_to_end
from handlers.bench.load import closed_loop
from handlers.config import ServingConfig
from mpm_ops import Segmenter
from mpm_ops.classes import Classes, default_colors
from mpm_ops.labels import LabelMap


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Segmenter]) -> Segmenter:
    return tiny_model(schedule=(1, 2), patch_size=8)


def test_codecs_are_compared_after_parity(tmp_path: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    rows = bench_codecs.bench_codec(model, {"noise": image}, repeats=1)
    assert [row["step"] for row in rows] == ["decode", "cut", "png", "json"]
    assert all(row["plain_ms"] > 0 and row["ms"] > 0 for row in rows)
    assert rows[2]["bytes"] > 0

    monkeypatch.setattr(bench_codecs, "encode_mask_png", lambda labels, classes: png_of(labels * 0))
    with pytest.raises(RuntimeError, match="parity: png"):
        bench_codecs.bench_codec(model, {"noise": image}, repeats=1)


def png_of(labels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def test_serving_is_held_against_its_own_steps(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = Classes(tuple("abcde"), default_colors(5))
    images = [np.random.default_rng(i).integers(0, 256, (64, 64 + 40 * i, 3), dtype=np.uint8) for i in range(5)]
    config = ServingConfig(schedule=model.schedule)
    found = end_to_end.bench_end_to_end(model, classes, images, config)
    assert found["served_windows_per_second"] > 0
    assert found["summed_ms_p50"] > 0
    assert found["pictures"] == 2
    with pytest.raises(ValueError, match="images: expected more than 3 different pictures, got 1"):
        end_to_end.bench_end_to_end(model, classes, images[:1] * 60, config)
    monkeypatch.setattr(end_to_end, "label_map", lambda *_: LabelMap(np.zeros((64, 64), np.uint8), None))
    with pytest.raises(RuntimeError, match="parity"):
        end_to_end.bench_end_to_end(model, classes, images, config)


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
