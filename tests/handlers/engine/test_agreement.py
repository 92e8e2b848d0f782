import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from handlers.api.options import RequestOptions
from handlers.config import ServingConfig
from handlers.engine.agreement import Sampler, compare_labels
from handlers.engine.engine import Engine
from mpm_ops import InferenceConfig, Segmenter
from mpm_ops.classes import Classes, default_colors

CLASSES = Classes(tuple("abcde"), default_colors(5))
NPY = RequestOptions(request_id="test", format="npy")


def chosen(sampler: Sampler, pictures: int, *, idle: bool) -> int:
    taken = 0
    for _ in range(pictures):
        if sampler.choose(idle=idle):
            taken += 1
            sampler.finish()
    return taken


def test_an_idle_device_gets_the_fraction_and_a_busy_one_the_minimum() -> None:
    assert chosen(Sampler(0.01, 0.001), 10_000, idle=True) == 100
    assert chosen(Sampler(0.01, 0.001), 10_000, idle=False) == 10
    assert chosen(Sampler(1.0, 0.0), 50, idle=True) == 50
    assert chosen(Sampler(0.0, 0.0), 10_000, idle=True) == 0


def test_what_is_due_under_load_does_not_give_way() -> None:
    assert Sampler(1.0, 1.0).choose(idle=False) == "interactive"
    assert Sampler(1.0, 1.0).choose(idle=True) == "bulk"


def test_a_busy_time_is_made_up_for_within_bounds() -> None:
    sampler = Sampler(0.01, 0.0)
    assert chosen(sampler, 10_000, idle=False) == 0
    assert chosen(sampler, 20, idle=True) == 5


def test_one_at_a_time() -> None:
    sampler = Sampler(1.0, 1.0)
    assert sampler.choose(idle=True)
    assert not sampler.choose(idle=True)
    sampler.finish()
    assert sampler.choose(idle=True)


def test_compares_pixels_by_the_class_without_merging() -> None:
    reference = np.array([[0, 0, 1], [1, 1, 4]], np.uint8)
    merged = np.array([[0, 1, 1], [1, 2, 3]], np.uint8)
    ratio, pixels = compare_labels(merged, reference, CLASSES)
    assert ratio == 0.5
    assert pixels == [("a", 1, 1), ("b", 2, 1), ("e", 0, 1)]


def test_live_agreement_is_that_of_the_library(tiny_model: Callable[..., Segmenter]) -> None:
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=48, normalization="vit")
    model = tiny_model(schedule=(0, 1), patch_size=8, inference=inference)
    plain = tiny_model(schedule=(), patch_size=8, inference=inference)
    picture = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture[:, :40] = (200, 30, 90)
    merged, reference = model.segment(picture), plain.segment(picture)
    expected = float((merged == reference).mean())
    assert 0.05 < expected < 0.999, "merging has to change something here"

    config = ServingConfig(
        schedule=(0, 1), allowed_schedules=(), runtime="torch", precision="fp32", agreement_fraction=1
    )
    engine = Engine(model, CLASSES, config)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    try:
        answer = engine.submit(buffer.getvalue(), NPY).result(60)
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), merged)
        get = engine.metrics.registry.get_sample_value
        deadline = time.monotonic() + 60
        while not get("mpm_agreement_ratio_count", {"model": "segmenter"}):
            assert time.monotonic() < deadline, "no sample was compared"
            time.sleep(0.01)
        assert get("mpm_agreement_ratio_sum", {"model": "segmenter"}) == pytest.approx(expected, abs=2e-3)
        kept, changed = (
            sum(
                get("mpm_agreement_pixels_total", {"model": "segmenter", "class": name, "outcome": outcome}) or 0
                for name in CLASSES.names
            )
            for outcome in ("kept", "changed")
        )
        assert kept + changed == 60 * 90
        assert kept / (kept + changed) == pytest.approx(expected, abs=2e-3)
        assert get("mpm_requests_total", {"model": "segmenter", "code": "200"}) == 1, "samples are no requests"
        assert get("mpm_tokens_total", {"model": "segmenter", "point": "in", "stage": "0", "schedule": "off"})
    finally:
        engine.close()


def test_what_merges_nothing_is_not_sampled(tiny_model: Callable[..., Segmenter]) -> None:
    config = ServingConfig(schedule=(), runtime="torch", agreement_fraction=1, agreement_min_fraction=1)
    engine = Engine(tiny_model(), CLASSES, config)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    for _ in range(3):
        engine.submit(buffer.getvalue(), NPY).result(60)
    engine.close()
    get = engine.metrics.registry.get_sample_value
    assert get("mpm_agreement_ratio_count", {"model": "segmenter"}) == 0
    assert get("mpm_stage_seconds_count", {"model": "segmenter", "stage": "0", "schedule": "off"}) == 3
