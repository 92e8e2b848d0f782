import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from making import make_picture, make_window
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from handlers.api.options import RequestOptions
from handlers.client import NoAnswerError, fetch
from handlers.config import ServingConfig
from handlers.engine.clock import DeviceClock
from handlers.engine.engine import Engine
from handlers.engine.lane import Lane
from handlers.engine.request import Group
from handlers.errors import ErrorKind, ServingError
from handlers.launch.processes import free_port
from handlers.observe.metrics import Metrics
from mpm_ops import InferenceConfig, Segmenter
from mpm_ops.classes import Classes, default_colors

SCHEDULE = (1, 2)
CONFIG = ServingConfig(schedule=SCHEDULE, runtime="torch", agreement_fraction=0)
OPTIONS = RequestOptions(request_id="test")
CLASSES = Classes(tuple("abcde"), default_colors(5))
INFO = {"schedule": "1"}


@pytest.fixture
def start(tiny_model: Callable[..., Segmenter]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=64, normalization="vit")

    def make(config: ServingConfig = CONFIG, **options: Any) -> Engine:
        model = tiny_model(schedule=config.schedule, patch_size=8, inference=inference)
        engines.append(Engine(model, CLASSES, config, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def encoded(seed: int = 0, height: int = 64, width: int = 128) -> bytes:
    """A picture of two windows."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def read(port: int, headers: dict[str, str] | None = None) -> str:
    """The text that the port serves, as soon as it does."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return fetch(f"http://127.0.0.1:{port}/metrics", headers=headers).body.decode()
        except NoAnswerError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def value(engine: Engine, name: str, **labels: str) -> float:
    found = engine.metrics.registry.get_sample_value(name, {"model": "segmenter"} | labels)
    assert found is not None, f"no {name} with {labels}"
    return found


def test_counts_what_was_answered(start: Callable[..., Engine]) -> None:
    engine = start()
    replies = [engine.submit(encoded(seed), OPTIONS).result(60) for seed in range(3)]
    assert value(engine, "mpm_requests_total", code="200") == 3
    assert value(engine, "mpm_images_total") == 3
    assert value(engine, "mpm_windows_total") == 6
    assert value(engine, "mpm_inflight_requests") == 0
    for name in ("request", "decode", "queue", "labels", "encode"):
        assert value(engine, f"mpm_{name}_seconds_count") == 3
    for step in ("decode", "queue", "labels", "encode"):
        total = sum(reply.seconds[step] for reply in replies)
        assert value(engine, f"mpm_{step}_seconds_sum") == pytest.approx(total)
    assert value(engine, "mpm_request_seconds_sum") > sum(reply.seconds["compute"] for reply in replies)


def test_tokens_are_those_of_the_replies(start: Callable[..., Engine]) -> None:
    engine = start()
    replies = [engine.submit(encoded(seed), OPTIONS).result(60) for seed in range(4)]
    engine.close()  # the device thread counts a group after its windows moved on
    per_stage = [sum(step) for step in zip(*(reply.tokens for reply in replies), strict=True)]
    assert per_stage[0] == 4 * 128
    for stage, into in enumerate(per_stage):
        out = per_stage[min(stage + 1, 2)]  # the last stage does not merge
        assert value(engine, "mpm_tokens_total", point="in", stage=str(stage), schedule="1,2") == into
        assert value(engine, "mpm_tokens_total", point="out", stage=str(stage), schedule="1,2") == out
        assert value(engine, "mpm_tokens_per_window_sum", stage=str(stage), schedule="1,2") == into
        assert value(engine, "mpm_tokens_per_window_count", stage=str(stage), schedule="1,2") == 8
        assert value(engine, "mpm_group_windows_sum", stage=str(stage), schedule="1,2") == 8
        assert value(engine, "mpm_waiting_windows", stage=str(stage), schedule="1,2") == 0
    assert value(engine, "mpm_waiting_tokens") == 0
    assert value(engine, "mpm_padding_tokens_total") == 0


def test_merge_times_are_part_of_their_stages(start: Callable[..., Engine]) -> None:
    engine = start()
    reply = engine.submit(encoded(), OPTIONS).result(60)
    engine.close()
    merges = 0.0
    for stage in ("0", "1"):
        merge = value(engine, "mpm_merge_seconds_sum", stage=stage, schedule="1,2")
        assert 0 < merge < value(engine, "mpm_stage_seconds_sum", stage=stage, schedule="1,2")
        merges += merge
    assert merges == pytest.approx(reply.seconds["merge"])
    families = engine.metrics.registry.collect()
    stages = {s.labels["stage"] for f in families if f.name == "mpm_merge_seconds" for s in f.samples}
    assert stages == {"0", "1"}, "the last stage merges nothing"


def test_the_warm_up_is_in_no_metric(start: Callable[..., Engine]) -> None:
    engine = start(ServingConfig(schedule=SCHEDULE, runtime="torch", agreement_fraction=1))
    engine.warm_up([encoded(seed) for seed in range(3)])
    with pytest.raises(ServingError):
        engine.warm_up([b"no picture"])
    counted = [
        sample
        for family in engine.metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("mpm_") and sample.name != "mpm_model_info" and not sample.name.endswith("_created")
    ]
    assert {sample.value for sample in counted} == {0}
    assert {sample.labels.get("stage") for sample in counted} >= {"0", "1", "2"}, (
        "lanes are there before their windows"
    )
    engine.submit(encoded(), OPTIONS).result(60)
    assert value(engine, "mpm_requests_total", code="200") == 1
    for stage in ("0", "1", "2"):
        assert value(engine, "mpm_stage_seconds_count", stage=stage, schedule="1,2") >= 1
        assert value(engine, "mpm_group_windows_sum", stage=stage, schedule="1,2") == 2


def test_whoever_has_an_answer_finds_it_computed_and_counted(start: Callable[..., Engine]) -> None:
    engine = start()
    for num_answered in range(1, 21):
        engine.submit(encoded(num_answered), OPTIONS).result(60)
        assert value(engine, "mpm_tokens_per_window_count", stage="2", schedule="1,2") == 2 * num_answered


def test_errors_are_counted_by_status(start: Callable[..., Engine]) -> None:
    engine = start()
    with pytest.raises(ServingError):
        engine.submit(b"no picture", OPTIONS).result(60)
    refused = engine.open("test")
    refused.fail(ServingError(ErrorKind.NOT_ACCEPTABLE, "no"))
    assert refused.exception(60)
    assert value(engine, "mpm_requests_total", code="400") == 1
    assert value(engine, "mpm_requests_total", code="406") == 1
    assert value(engine, "mpm_request_seconds_count") == 2
    assert value(engine, "mpm_images_total") == 0
    assert value(engine, "mpm_waiting_tokens") == 0


def test_a_cancelled_request_leaves_nothing_waiting(start: Callable[..., Engine]) -> None:
    engine = start()
    answers = [engine.submit(encoded(seed), OPTIONS) for seed in range(12)]
    cancelled = sum(answer.cancel() for answer in answers)
    engine.close()
    assert value(engine, "mpm_waiting_tokens") == 0
    assert value(engine, "mpm_requests_total", code="499") == cancelled > 0


def test_lengths_are_counted_in_rows_of_the_grid() -> None:
    for grid, step in ((8, 8), (32, 64), (64, 256)):
        metrics = Metrics("m", grid=grid, info=INFO)
        metrics.computed(Lane(0, "1", 2), [1], 1, 0.1, 0.01)
        bounds = [
            float(sample.labels["le"])
            for family in metrics.registry.collect()
            if family.name == "mpm_tokens_per_window"
            for sample in family.samples
            if sample.name.endswith("_bucket")
        ]
        assert bounds == [*range(step, grid * grid + 1, step), float("inf")]


def test_padding_and_waiting_of_a_group() -> None:
    metrics = Metrics("m", grid=8, info=INFO)
    lane = Lane(1, "1", 2)
    windows = tuple(make_window(make_picture(), lane, length) for length in (10, 30))
    windows[0].entered, windows[1].entered = 5.0, 4.0
    metrics.waiting(lane, 2, 40)
    get = metrics.registry.get_sample_value
    labels = {"model": "m", "stage": "1", "schedule": "1"}
    assert get("mpm_waiting_tokens", {"model": "m"}) == 40
    assert get("mpm_waiting_windows", labels) == 2
    metrics.released(Group(lane, windows, "delay"), 6.5)
    metrics.computed(lane, [10, 30], 40, 0.1, None, padding_tokens=20)
    assert get("mpm_waiting_tokens", {"model": "m"}) == 0
    assert get("mpm_waiting_windows", labels) == 0
    assert get("mpm_padding_tokens_total", {"model": "m"}) == 20
    assert get("mpm_group_wait_seconds_sum", labels) == 2.5
    assert get("mpm_group_release_total", {"model": "m", "reason": "delay"}) == 1
    assert get("mpm_group_release_total", {"model": "m", "reason": "full"}) == 0


def test_capacity_is_tokens_before_merging_per_busy_second_and_forgets() -> None:
    metrics = Metrics("m", grid=8, info=INFO)

    def capacity() -> float | None:
        return metrics.registry.get_sample_value("mpm_capacity_tokens_per_second", {"model": "m"})

    metrics.computed(Lane(0, "1", 2), [64, 64], 60, 0.5, 0.1)
    metrics.computed(Lane(1, "1", 2), [30, 30], 60, 0.5, None)
    assert capacity() == 128
    for _ in range(200):  # twice as fast from now on
        metrics.computed(Lane(0, "1", 2), [64, 64], 60, 0.25, 0.1)
        metrics.computed(Lane(1, "1", 2), [30, 30], 60, 0.25, None)
    assert capacity() == pytest.approx(256, rel=0.02)


def test_the_port_serves_what_the_registry_holds_and_is_free_again_after(start: Callable[..., Engine]) -> None:
    port = free_port()
    config = ServingConfig(schedule=SCHEDULE, runtime="torch", metrics_port=port)
    for _ in range(2):  # the second rebinds the port and starts from zero
        engine = start(config, name="street")
        engine.submit(encoded(), OPTIONS).result(60)
        text = read(port)
        samples = {
            (sample.name, sample.labels.get("code")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == "street"
        }
        assert samples["mpm_requests_total", "200"] == 1
        assert samples["mpm_model_info", None] == 1
        engine.close()
    with pytest.raises(NoAnswerError):
        fetch(f"http://127.0.0.1:{port}/metrics")


def test_a_taken_port_is_named_and_taken_over(start: Callable[..., Engine], caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    config = ServingConfig(schedule=SCHEDULE, runtime="torch", metrics_port=port)
    old = start(config, name="old")
    assert 'model="old"' in read(port)
    new = start(config, name="new")  # as Triton does it: the old version serves until the new one is there
    new.submit(encoded(), OPTIONS).result(60)
    deadline = time.monotonic() + 10
    while f"metrics_port: cannot listen on 127.0.0.1:{port} yet" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 'model="old"' in read(port)
    old.close()
    assert 'model="new"' in read(port)


def test_exemplars_name_a_request(start: Callable[..., Engine]) -> None:
    port = free_port()
    engine = start(ServingConfig(schedule=SCHEDULE, runtime="torch", metrics_port=port))
    engine.submit(encoded(), RequestOptions(request_id="street-7")).result(60)
    engine.submit(encoded(), RequestOptions(request_id="x" * 128)).result(60)  # too long for an exemplar
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = read(port, accept)
    assert '# {request_id="street-7"}' in text
    assert value(engine, "mpm_request_seconds_count") == 2


@pytest.mark.gpu
def test_device_times_are_those_of_the_work() -> None:
    import torch

    clock = DeviceClock(torch.device("cuda"))
    x = torch.randn(8192, 8192, device="cuda")
    torch.mm(x, x)
    torch.cuda.synchronize()
    start = clock.mark()
    for _ in range(20):
        torch.mm(x, x)
    # 20 x 1.1e12 operations; launching takes well under a millisecond
    assert clock.seconds(start, clock.mark()) > 0.01
