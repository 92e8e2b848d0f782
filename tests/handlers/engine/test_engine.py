import base64
import io
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from fake_cuda import Rerun, compute_packed
from PIL import Image

from handlers.api import decode
from handlers.api.decode import EncodedPicture
from handlers.api.options import RequestOptions
from handlers.config import ServingConfig
from handlers.engine.computing import Computer, Times
from handlers.engine.engine import Engine
from handlers.engine.request import Group, Request
from handlers.errors import ErrorKind, ServingError
from mpm_ops import InferenceConfig, Segmenter
from mpm_ops.classes import Classes, default_colors
from mpm_ops.kernels import has_triton
from mpm_ops.merging import make_merger
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.graphs import GraphRuntime
from mpm_ops.stages import WindowBatch
from mpm_ops.windows import cut_windows, plan_windows

CONFIG = ServingConfig(
    schedule=(1, 2),
    runtime="torch",
    precision="fp32",
    max_inflight_tokens=2**18,
    deadline_seconds=250,
    stall_seconds=250,
)
NPY = RequestOptions(request_id="test", format="npy")
CLASSES = Classes(tuple("abcde"), default_colors(5))
TINY: dict[str, Any] = {
    "patch_size": 8,
    "inference": InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=48, normalization="vit"),
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Segmenter]) -> Segmenter:
    return tiny_model(schedule=CONFIG.schedule, **TINY)


@pytest.fixture
def start(model: Segmenter) -> Iterator[Callable[..., Engine]]:
    """Start engines that are closed after the test."""
    engines: list[Engine] = []

    def make(config: ServingConfig = CONFIG, **options: Any) -> Engine:
        engines.append(Engine(model, CLASSES, config, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height * (seed % 4) // 4] = rng.integers(0, 256, 3)  # flat parts merge differently
    return noise


def encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def labels_of(answer: Request) -> np.ndarray:
    labels: np.ndarray = np.load(io.BytesIO(answer.result(250).body))
    return labels


def error_of(answer: Request) -> ServingError:
    error = answer.exception(250)
    assert isinstance(error, ServingError)
    return error


@pytest.mark.parametrize(
    ("runtime", "precision", "deterministic", "repeats"),
    [
        ("torch", "fp32", False, 6),
        ("torch", "fp32", True, 4),
        ("openvino", "fp32", False, 6),
        pytest.param("torch", "fp32", False, 125, marks=pytest.mark.slow),
        pytest.param("openvino", "fp32", False, 125, marks=pytest.mark.slow),
        pytest.param("torch", "bf16", False, 6, marks=pytest.mark.bf16),
        pytest.param("openvino", "bf16", False, 6, marks=pytest.mark.bf16),
    ],
)
def test_same_picture_same_mask_whatever_shares_its_groups(
    tiny_model: Callable[..., Segmenter],
    start: Callable[..., Engine],
    runtime: str,
    precision: str,
    deterministic: bool,
    repeats: int,
) -> None:
    pictures = [
        picture(s, height, width) for s, (height, width) in enumerate([(60, 80), (64, 64), (50, 300), (90, 40)])
    ]
    schedules: list[tuple[int, ...]] = [(1, 2), ()]
    library = {schedule: tiny_model(schedule=schedule, **TINY) for schedule in schedules}
    for network in library.values():
        network.runtime = make_runtime(network, runtime, precision)
    expected = {
        (i, schedule): network.segment(image)
        for i, image in enumerate(pictures)
        for schedule, network in library.items()
    }
    streams: set[int | None] = set()
    engine = start(
        replace(
            CONFIG, runtime=runtime, precision=precision, deterministic=deterministic, torch_threads=3, streams="auto"
        ),
        observer=lambda group, seconds: streams.add(group.stream),
    )
    encoded = [encode(image) for image in pictures]
    kinds = list(expected) * repeats
    np.random.default_rng(0).shuffle(kinds)
    answers = [engine.submit(encoded[i], replace(NPY, schedule=tuple(schedule))) for i, schedule in kinds]
    for (i, schedule), answer in zip(kinds, answers, strict=True):
        np.testing.assert_array_equal(labels_of(answer), expected[i, tuple(schedule)])
    assert engine.inflight == 0
    assert streams >= ({0, 1, 2} if runtime == "openvino" else {None}), "windows ran side by side"


def test_one_computation_gives_every_form_that_is_asked_for(model: Segmenter, start: Callable[..., Engine]) -> None:
    stages: list[int] = []
    engine = start(observer=lambda group, seconds: stages.append(group.lane.stage))
    for chosen, also in (("png", ("npy", "json")), ("overlay", ("png", "npy", "json", "tokens", "confidence"))):
        options = RequestOptions(request_id="test", format=chosen, also=also)
        reply = engine.submit(encode(picture(1)), options).result(250)
        assert tuple(reply.bodies) == (chosen, *also)
        labels = model.segment(picture(1))
        np.testing.assert_array_equal(np.load(io.BytesIO(reply.bodies["npy"])), labels)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(reply.bodies["png"]))), labels)
        assert Image.open(io.BytesIO(reply.body)).mode == ("P" if chosen == "png" else "RGB")
        assert b'"height":60' in reply.bodies["json"]
    assert stages == [0, 1, 2] * 2
    arrays = engine.submit(encode(picture(1)), RequestOptions(request_id="test", format="npy", arrays=True)).result(
        250
    )
    np.testing.assert_array_equal(arrays.body, labels)


def test_windows_of_different_requests_share_groups(start: Callable[..., Engine]) -> None:
    groups: list[int] = []
    engine = start(
        observer=lambda group, seconds: groups.append(len({window.picture.request for window in group.windows}))
    )
    wait([engine.submit(encode(picture(s)), NPY) for s in range(40)], 60)
    assert max(groups) > 1


def test_reply_tells_tokens_and_times(start: Callable[..., Engine]) -> None:
    reply = start().submit(encode(picture(1)), NPY).result(250)
    assert reply.tokens[0] == 128  # two windows of 8 x 8 patches
    assert len(reply.tokens) == 3
    assert reply.tokens[0] > reply.tokens[1] > reply.tokens[2]
    assert set(reply.seconds) == {"decode", "queue", "compute", "merge", "labels", "encode"}
    assert min(reply.seconds.values()) >= 0


@pytest.mark.parametrize("schedule", [(1, 2), ()])
def test_maps_are_those_of_the_library(
    tiny_model: Callable[..., Segmenter], start: Callable[..., Engine], schedule: tuple[int, ...]
) -> None:
    """Alone or among mates, after each merge."""
    engine = start()
    options = RequestOptions(request_id="test", format="maps", schedule=schedule)
    network = tiny_model(schedule=schedule, **TINY)
    answers = [engine.submit(encode(picture(seed, 50, 200)), options) for seed in range(4)]
    for seed, answer in enumerate(answers):
        told = json.loads(answer.result(250).body)
        plan = plan_windows(50, 200, network.inference)
        assert told["merging"]["frame"] == list(plan.frame_size)
        assert [window["left"] for window in told["merging"]["windows"]] == list(plan.lefts)
        given: Any = cut_windows(picture(seed, 50, 200), plan, network.inference)
        after: list[list[list[int]]] = [[] for _ in plan.lefts]
        for stage in network.stages[:-1]:
            with torch.inference_mode():
                given = network.launch(stage, given)()  # type: ignore[operator]
            for window, merge_map in zip(after, given.merge_maps, strict=True):
                window.append(merge_map.tolist())
        for window, maps, lengths in zip(told["merging"]["windows"], after, told["tokens_per_window"], strict=True):
            assert [np.frombuffer(base64.b64decode(text), "<u2").tolist() for text in window["maps"]] == maps
            assert [len(set(merge_map)) for merge_map in maps] == lengths[1:]


def test_a_bad_picture_fails_alone(model: Segmenter, start: Callable[..., Engine]) -> None:
    engine = start()
    good, truncated = encode(picture(0)), encode(picture(0))[:-2000]
    answers = [engine.submit(data, NPY) for data in (good, b"no picture", truncated, good)]
    for answer in (answers[0], answers[3]):
        np.testing.assert_array_equal(labels_of(answer), model.segment(picture(0)))
    assert [error_of(a).kind for a in answers[1:3]] == [ErrorKind.BAD_REQUEST] * 2


def test_a_schedule_that_is_not_allowed_is_refused(start: Callable[..., Engine]) -> None:
    error = error_of(start().submit(encode(picture(0)), replace(NPY, schedule=(2,))))
    assert (error.kind, str(error)) == (ErrorKind.BAD_REQUEST, "X-MPM-Schedule: expected one of 1,2, off, got '2'")


MERGERS = ("mpm:1,2,keep=0.75,weighted,proportional", "tome:r=7", "algm:threshold=0.9", "cts:policy=oracle,shared=3")


@pytest.mark.parametrize(
    ("runtime", "deterministic"),
    [
        ("torch", False),
        pytest.param("torch", True, marks=pytest.mark.slow),
        pytest.param("openvino", False, marks=pytest.mark.slow),
    ],
)
def test_every_merger_gives_the_mask_of_the_library_whatever_is_served_beside_it(
    tiny_model: Callable[..., Segmenter], runtime: str, deterministic: bool
) -> None:
    network = tiny_model(n_layers=5, **TINY)
    pictures = [picture(s, height, width) for s, (height, width) in enumerate([(60, 80), (50, 300)])]
    expected: dict[tuple[int, str], np.ndarray] = {}
    for text in (*MERGERS, "mpm:1,2", "none"):
        network.merger = make_merger(text, network.tower)
        network.runtime = make_runtime(network, runtime, "fp32")
        expected |= {(i, text): network.segment(image) for i, image in enumerate(pictures)}
    network.merger = make_merger(MERGERS[0], network.tower)
    serving: dict[str, Any] = {"allowed_mergers": MERGERS, "allowed_schedules": ((1, 2), ())}
    config = replace(CONFIG, merger=MERGERS[0], runtime=runtime, deterministic=deterministic, **serving)
    with closing(Engine(network, CLASSES, config)) as engine:
        encoded = [encode(image) for image in pictures]
        engine.warm_up(encoded[:1])
        kinds = list(expected) * 3
        np.random.default_rng(0).shuffle(kinds)
        asked = [engine.submit(encoded[int(i)], replace(NPY, merger=str(text))) for i, text in kinds]
        for (i, text), answer in zip(kinds, asked, strict=True):
            np.testing.assert_array_equal(labels_of(answer), expected[int(i), str(text)], err_msg=str(text))
        for options, text in ((NPY, MERGERS[0]), (replace(NPY, schedule=(1, 2)), "mpm:1,2")):
            np.testing.assert_array_equal(labels_of(engine.submit(encoded[0], options)), expected[0, text])
        counted = next(family for family in engine.metrics.registry.collect() if family.name == "mpm_tokens")
        names = {sample.labels["schedule"] for sample in counted.samples}
    assert names == {*MERGERS, "1,2", "off"}


def test_a_merger_that_is_not_allowed_is_refused(start: Callable[..., Engine]) -> None:
    engine = start(replace(CONFIG, allowed_mergers=("tome:r=7",)))
    for text in ("tome:r=8", "mpm:1,2,align=8", "pitome", "tome:r=0", "mpm:9", ""):
        error = error_of(engine.submit(encode(picture(0)), replace(NPY, merger=text)))
        told = f"X-MPM-Merger: expected one of mpm:1,2, none, tome:r=7, got {text!r}"
        assert (error.kind, str(error)) == (ErrorKind.BAD_REQUEST, told)
    for text in ("mpm:1,2", "mpm:1, 2,align=1", "mpm:2,1,keep=1.0", "none", "tome:r=07"):
        answer = engine.submit(encode(picture(0)), replace(NPY, merger=text))
        assert (answer.exception(250) is None) == (text != "mpm:2,1,keep=1.0")
    error = error_of(engine.submit(encode(picture(0)), replace(NPY, schedule=(7,))))
    assert str(error) == "X-MPM-Schedule: expected one of 1,2, off, got '7'"


def test_a_merger_that_the_network_does_not_know_or_can_not_compute_is_never_served(
    start: Callable[..., Engine], tiny_model: Callable[..., Segmenter]
) -> None:
    with pytest.raises(ValueError, match=r"allowed_mergers: tome:s=1: merger: tome has no parameter s"):
        start(replace(CONFIG, allowed_mergers=("tome:s=1",)))
    with pytest.raises(ValueError, match=r"allowed_mergers: algm:.*: expected one that decides window by window"):
        Engine(tiny_model(n_layers=5), CLASSES, replace(CONFIG, allowed_mergers=("algm:threshold=0.9,batch=4",)))
    odd = InferenceConfig(im_size=56, max_ratio=4, window_size=56, window_stride=48, normalization="vit")
    network = tiny_model(n_layers=5, patch_size=8, inference=odd)
    config = replace(CONFIG, allowed_mergers=("algm:threshold=0.9",))
    with closing(Engine(network, CLASSES, config)) as engine, pytest.raises(ServingError):
        engine.warm_up([encode(picture(0))])


WHITE = np.full((64, 64, 3), 255, np.uint8)  # the picture that faults below are tied to


def break_embed(monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], None]) -> None:
    """Let `fault` see the windows of every group before the first stage runs."""
    embed = Segmenter.embed

    def broken(self: Segmenter, windows: torch.Tensor) -> WindowBatch:
        fault(windows)
        return embed(self, windows)

    monkeypatch.setattr(Segmenter, "embed", broken)


def is_white(windows: torch.Tensor) -> torch.Tensor:
    return (windows == 1).flatten(1).all(dim=1)


def test_a_window_that_breaks_a_stage_fails_only_its_own_request(
    model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [model.segment(picture(i)) for i in range(8)]

    def fault(windows: torch.Tensor) -> None:
        if is_white(windows).any():
            raise RuntimeError("white")

    break_embed(monkeypatch, fault)
    engine = start()
    answers = [engine.submit(encode(WHITE if i == 5 else picture(i)), NPY) for i in range(8)]
    for i in set(range(8)) - {5}:
        np.testing.assert_array_equal(labels_of(answers[i]), expected[i])
    assert error_of(answers[5]).kind is ErrorKind.INTERNAL
    assert [r.levelname for r in caplog.records if "failed at stage" in r.message] == ["ERROR"]


def test_a_window_with_non_finite_logits_fails_only_its_own_request(
    model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [model.segment(picture(i)) for i in range(4)]

    def fault(windows: torch.Tensor) -> None:
        windows[is_white(windows)] = torch.nan

    break_embed(monkeypatch, fault)
    engine = start()
    answers = [engine.submit(encode(WHITE if i == 2 else picture(i)), NPY) for i in range(4)]
    for i in (0, 1, 3):
        np.testing.assert_array_equal(labels_of(answers[i]), expected[i])
    assert "finite" in str(error_of(answers[2]))


def test_running_out_of_memory_halves_the_group(
    model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [model.segment(picture(i)) for i in range(8)]
    sizes: list[int] = []

    def fault(windows: torch.Tensor) -> None:
        sizes.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("too many windows")

    break_embed(monkeypatch, fault)
    engine = start()
    answers = [engine.submit(encode(picture(i)), NPY) for i in range(8)]
    for answer, labels in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(labels_of(answer), labels)
    assert max(sizes) > 2


def test_a_hung_stage_fails_everything_in_flight_and_gives_up(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, fatal = threading.Event(), threading.Event()
    break_embed(monkeypatch, lambda windows: assert_none(release.wait(30)))
    engine = start(replace(CONFIG, stall_seconds=0.2), on_fatal=fatal.set)
    answers = [engine.submit(encode(picture(i)), NPY) for i in range(3)]
    assert fatal.wait(10)
    assert {error_of(answer).kind for answer in answers} == {ErrorKind.INTERNAL}
    assert error_of(engine.submit(encode(picture(0)), NPY)).kind is ErrorKind.OVERLOADED
    release.set()


def assert_none(_: object) -> None:
    """Drop a value where None is expected."""


def test_a_poisoned_device_fails_everything_in_flight_and_gives_up(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(windows: torch.Tensor) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    break_embed(monkeypatch, fault)
    fatal = threading.Event()
    answer = start(on_fatal=fatal.set).submit(encode(picture(0)), NPY)
    assert error_of(answer).kind is ErrorKind.INTERNAL
    assert fatal.wait(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_device_thread_is_seen(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(windows: torch.Tensor) -> None:
        raise SystemExit

    break_embed(monkeypatch, fault)
    fatal = threading.Event()
    answer = start(on_fatal=fatal.set).submit(encode(picture(0)), NPY)
    assert error_of(answer).kind is ErrorKind.INTERNAL
    assert fatal.wait(10)


def slow_embed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    break_embed(monkeypatch, lambda windows: time.sleep(seconds))


def test_a_late_request_gets_its_deadline_even_while_the_device_is_busy(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_embed(monkeypatch, 1.0)
    begin = time.monotonic()
    answer = start(replace(CONFIG, deadline_seconds=0.2)).submit(encode(picture(0)), NPY)
    assert error_of(answer).kind is ErrorKind.DEADLINE
    assert time.monotonic() - begin < 0.9


def test_a_request_that_was_never_taken_is_late_too(start: Callable[..., Engine]) -> None:
    engine = start(replace(CONFIG, deadline_seconds=0.2))
    waiting = engine.open("waits for room in front of the engine")
    impatient = engine.open("has a deadline of its own", timeout_seconds=0.1)
    patient = engine.open("may not have a later one", timeout_seconds=1000)
    told = [str(error_of(request)) for request in (impatient, waiting, patient)]
    assert told == ["not answered within 0.1 s", "not answered within 0.2 s", "not answered within 0.2 s"]
    assert num_requests(engine) == {"504": 3}
    engine.take(waiting, [encode(picture(0))], NPY)
    assert engine.inflight == 0


def num_requests(engine: Engine) -> dict[str, float]:
    """Requests by the code that they ended with."""
    samples = [sample for family in engine.metrics.registry.collect() for sample in family.samples]
    return {s.labels["code"]: s.value for s in samples if s.name == "mpm_requests_total"}


def test_each_end_is_counted_once_and_is_one_line(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes after a request's end, such as its mask, its deadline and its client that leaves."""
    held = threading.Event()
    break_embed(monkeypatch, lambda windows: assert_none(held.wait(30)))
    caplog.set_level(logging.INFO, "handlers.engine")
    engine = start(replace(CONFIG, deadline_seconds=20))
    expiring = engine.open("expired", timeout_seconds=0.2)
    engine.take(expiring, [encode(picture(0))] * 2, NPY)
    cancelled, answered = (engine.submit(encode(picture(1)), replace(NPY, request_id=i)) for i in ("left", "answered"))
    failed = engine.submit(b"no picture", replace(NPY, request_id="failed"))
    assert cancelled.cancel()
    assert error_of(expiring).kind is ErrorKind.DEADLINE
    held.set()
    labels_of(answered)
    for request in (expiring, cancelled, answered, failed):
        assert not request.cancel()
        request.expire()
        request.fail(ServingError(ErrorKind.INTERNAL, "too late"))
    engine.close()
    lines = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    codes = {"expired": 504, "left": 499, "answered": 200, "failed": 400}
    assert len(lines) == 4
    assert {line["request_id"]: line["code"] for line in lines} == codes
    assert num_requests(engine) == {str(code): 1 for code in codes.values()}
    assert engine.metrics.registry.get_sample_value("mpm_images_total", {"model": "segmenter"}) == 1
    assert engine.inflight == 0


class TestBatches:
    def test_answered_as_one(self, model: Segmenter, start: Callable[..., Engine]) -> None:
        engine = start()
        request = engine.open("batch", render=lambda replies: [reply.body for reply in replies])
        engine.take(request, [encode(picture(i)) for i in range(3)], NPY)
        for i, body in enumerate(request.result(250)):
            np.testing.assert_array_equal(np.load(io.BytesIO(body)), model.segment(picture(i)))
        assert num_requests(engine) == {"200": 1}
        assert engine.metrics.registry.get_sample_value("mpm_images_total", {"model": "segmenter"}) == 3

    def test_one_bad_picture_ends_it_once(self, start: Callable[..., Engine]) -> None:
        engine = start()
        pictures = [encode(picture(i)) for i in range(3)]
        for bad in (b"no picture", pictures[1][:-2000]):  # told from the header, and when it is decoded
            request = engine.open("batch")
            engine.take(request, [pictures[0], bad, pictures[2]], NPY)
            error = error_of(request)
            assert error.kind is ErrorKind.BAD_REQUEST
            assert str(error).startswith("picture 1 of 3: image: ")
        assert num_requests(engine) == {"400": 2}
        assert engine.inflight == 0

    def test_admitted_all_or_none(self, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
        """Two windows of 65 tokens a picture; four pictures may be in flight."""
        held = threading.Event()
        break_embed(monkeypatch, lambda windows: assert_none(held.wait(30)))
        engine = start(replace(CONFIG, max_inflight_tokens=4 * 130))
        alone = engine.submit(encode(picture(0)), NPY)
        kinds = []
        for size in (3, 4, 5):
            request = engine.open("batch", render=len)
            engine.take(request, [encode(picture(i)) for i in range(size)], NPY)
            kinds.append(request)
        assert error_of(kinds[1]).kind is ErrorKind.OVERLOADED
        assert error_of(kinds[2]).kind is ErrorKind.TOO_LARGE, "it would not fit an idle server either"
        assert str(error_of(kinds[2])) == (
            "expected a batch of at most 520 tokens, got 5 pictures of 650; send them in several requests"
        )
        assert engine.inflight == 4
        held.set()
        assert kinds[0].result(250) == 3
        labels_of(alone)
        assert engine.inflight == 0


def test_a_failure_of_our_own_is_counted_and_hidden(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("secret")

    monkeypatch.setattr(decode, "read_picture", fail)
    engine = start()
    error = error_of(engine.submit(encode(picture(0)), NPY))
    assert (error.kind, str(error)) == (ErrorKind.INTERNAL, "the request failed inside the server")
    assert num_requests(engine) == {"500": 1}


def test_a_cancelled_request_is_dropped_between_stages(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_embed(monkeypatch, 0.3)
    stages: list[int] = []
    engine = start(observer=lambda group, seconds: stages.append(group.lane.stage))
    answer = engine.submit(encode(picture(0)), NPY)
    time.sleep(0.1)
    assert answer.cancel()
    assert engine.inflight == 0
    labels_of(engine.submit(encode(picture(1)), NPY))
    assert stages == [0, 0, 1, 2]


def test_overload_is_refused_at_once_with_a_time_to_retry(
    model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.segment(picture(0))
    slow_embed(monkeypatch, 0.05)
    engine = start(replace(CONFIG, max_inflight_tokens=8 * 65 * 2))  # eight requests of two windows
    answers = [engine.submit(encode(picture(0)), NPY) for _ in range(40)]
    accepted = [answer for answer in answers if answer.exception(250) is None]
    refused = [error_of(answer) for answer in answers if answer not in accepted]
    assert len(accepted) >= 8
    assert {error.kind for error in refused} == {ErrorKind.OVERLOADED}
    assert all(error.retry_after is not None and error.retry_after >= 1 for error in refused)
    for answer in accepted:
        np.testing.assert_array_equal(labels_of(answer), expected)
    assert engine.inflight == 0


@pytest.fixture
def large() -> bytes:
    """2400 x 1600 pixels: 11.5 MB, and two windows of the network as a small picture is."""
    buffer = io.BytesIO()
    Image.fromarray(cv2.resize(picture(0), (2400, 1600))).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is computed waits for it."""
    event = threading.Event()
    break_embed(monkeypatch, lambda windows: assert_none(event.wait(60)))
    return event


class TestMemory:
    def test_what_waits_holds_no_more_than_the_network_needs(
        self, start: Callable[..., Engine], held: threading.Event, large: bytes
    ) -> None:
        engine = start()
        answers = [engine.submit(large, NPY) for _ in range(20)]
        fitted = 64 * 96 * 3
        wait_until(lambda: bytes_held(engine) == 20 * fitted)
        shown = engine.submit(large, RequestOptions(request_id="test", format="tokens"))
        wait_until(lambda: bytes_held(engine) == 20 * fitted + 2400 * 1600 * 3)
        held.set()
        wait([*answers, shown], 250)
        assert shown.exception() is None
        assert bytes_held(engine) == 0

    def test_bodies_that_are_kept_count_to_the_end(
        self, start: Callable[..., Engine], held: threading.Event, large: bytes
    ) -> None:
        engine = start(keeps_bodies=True)
        answer = engine.submit(large, NPY)
        wait_until(lambda: bytes_held(engine) == len(large) + 64 * 96 * 3)
        held.set()
        assert answer.exception(250) is None
        assert bytes_held(engine) == 0

    def test_too_many_bytes_are_refused_and_a_lone_picture_never(
        self, start: Callable[..., Engine], held: threading.Event, large: bytes
    ) -> None:
        engine = start(replace(CONFIG, max_inflight_mib=1))
        shown = RequestOptions(request_id="test", format="overlay")
        alone = engine.submit(large, shown)
        wait_until(lambda: bytes_held(engine) == 2400 * 1600 * 3)
        error = error_of(engine.submit(large, NPY))
        assert error.kind is ErrorKind.OVERLOADED
        assert str(error).startswith("the server is busy: pictures in flight hold 11520000 bytes, this one would hold")
        assert error.retry_after == 1
        held.set()
        assert alone.exception(250) is None
        assert bytes_held(engine) == 0
        assert engine.submit(large, shown).exception(250) is None

    def test_pictures_are_decoded_one_by_one_where_memory_is_short(
        self, model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode_whole, at_once, most = EncodedPicture.decode, [0], [0]

        def watched(source: EncodedPicture) -> np.ndarray:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            time.sleep(0.05)
            at_once[0] -= 1
            return decode_whole(source)

        monkeypatch.setattr(EncodedPicture, "decode", watched)
        small = [encode(picture(i, 360, 480)) for i in range(4)]  # 0.5 MB encoded, 1.4 MB while they are decoded
        for mib, expected in ((3, 1), (64, 2)):
            engine = start(replace(CONFIG, max_inflight_mib=mib, codec_threads=2))
            most[0] = 0
            answers = [engine.submit(data, NPY) for data in small]
            for i, answer in enumerate(answers):
                np.testing.assert_array_equal(labels_of(answer), model.segment(picture(i, 360, 480)))
            assert most[0] == expected


def bytes_held(engine: Engine) -> float | None:
    return engine.metrics.registry.get_sample_value("mpm_inflight_bytes", {"model": "segmenter"})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_more_is_admitted_than_the_device_can_answer(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group takes a second, and has the two windows of one picture while it is measured."""
    slow_embed(monkeypatch, 1.0)
    engine = start(replace(CONFIG, deadline_seconds=4))
    data = encode(picture(0))
    for _ in range(10):  # measures
        engine.submit(data, NPY).result(60)
    answers = [engine.submit(data, NPY) for _ in range(40)]
    errors = [answer.exception(60) for answer in answers]
    kinds = Counter(error.kind if isinstance(error, ServingError) else "served" for error in errors)
    assert set(kinds) == {"served", ErrorKind.OVERLOADED}, "what was admitted was answered in time"
    assert kinds["served"] >= 2
    told = next(str(error) for error in errors if error is not None)
    assert "a second are computed and 4 s is the deadline; try again later" in told
    assert engine.submit(data, NPY).exception(60) is None, "an idle server refuses nothing"


def test_close_answers_what_was_accepted_and_leaves_no_thread(model: Segmenter) -> None:
    before = threading.active_count()
    engine = Engine(model, CLASSES, CONFIG)
    answers = [engine.submit(encode(picture(i)), NPY) for i in range(10)]
    engine.close()
    assert all(answer.done() and answer.exception() is None for answer in answers)
    assert error_of(engine.submit(encode(picture(0)), NPY)).kind is ErrorKind.OVERLOADED
    assert threading.active_count() == before


class LateComputer(Computer):
    """Groups come true later and out of step with the host, one after the other in a thread of their own.

    What fails does so while it is launched or when it is waited for, by turns.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stream = ThreadPoolExecutor(1, "stream")
        self._random = np.random.default_rng(0)
        self.calls: list[str] = []

    def launch(self, group: Group) -> Callable[[], Times]:
        seconds = self._random.exponential(0.004)
        host_seconds = self._random.exponential(0.002)
        late = self._stream.submit(self._run, group, seconds)
        time.sleep(host_seconds)
        if len(self.calls) % 2 and late.exception():
            late.result()
        self.calls.append("launch")

        def finish() -> Times:
            self.calls.append("finish")
            return late.result()()

        return finish

    def _run(self, group: Group, seconds: float) -> Callable[[], Times]:
        time.sleep(seconds)
        return super().launch(group)


def test_groups_launched_ahead_change_no_mask(
    tiny_model: Callable[..., Segmenter], start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under failures in the middle, cancellations and a close with work in flight."""
    pictures = [picture(s, h, w) for s, (h, w) in enumerate([(60, 80), (64, 64), (50, 300), (90, 40), (64, 128)])]
    expected = {
        (i, schedule): tiny_model(schedule=schedule, **TINY).segment(image)
        for schedule in ((1, 2), ())
        for i, image in enumerate(pictures)
    }

    def fault(windows: torch.Tensor) -> None:
        if is_white(windows).any():
            raise RuntimeError("white")

    computers: list[LateComputer] = []

    def late(*args: Any) -> LateComputer:
        computers.append(LateComputer(*args))
        return computers[-1]

    break_embed(monkeypatch, fault)
    monkeypatch.setattr("handlers.engine.engine.Computer", late)
    for lookahead in (0, 1):
        engine = start(replace(CONFIG, max_group_windows=4, max_group_delay_ms=1), lookahead=lookahead)
        kinds = [*(list(expected) * 6), *([None] * 4)]
        np.random.default_rng(lookahead).shuffle(kinds)  # type: ignore[arg-type]
        answers = [
            engine.submit(encode(pictures[kind[0]] if kind else WHITE), replace(NPY, schedule=kind[1] if kind else ()))
            for kind in kinds
        ]
        cancelled = [answer for answer in answers[3::7] if answer.cancel()]
        engine.close()
        assert len(cancelled) > 3
        for kind, answer in zip(kinds, answers, strict=True):
            if answer.cancelled():
                continue
            if kind is None:
                assert error_of(answer).kind is ErrorKind.INTERNAL
            else:
                np.testing.assert_array_equal(labels_of(answer), expected[kind])
        assert engine.inflight == 0
        assert engine.metrics.registry.get_sample_value("mpm_waiting_tokens", {"model": "segmenter"}) == 0
        calls = "".join(call[0] for call in computers[-1].calls)
        assert ("llf" in calls) == bool(lookahead), "launched before the one that ran was through"
        assert "lll" not in calls
        computers[-1]._stream.shutdown()


def test_a_group_that_hangs_behind_another_is_noticed(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, fatal = threading.Event(), threading.Event()
    launch = Computer.launch
    count = Counter[str]()

    def hang(self: Computer, group: Group) -> Callable[[], Times]:
        count["launched"] += 1
        finish, is_second = launch(self, group), count["launched"] == 2

        def finish_late() -> Times:
            if is_second:
                release.wait(30)
            return finish()

        return finish_late

    monkeypatch.setattr(Computer, "launch", hang)
    config = replace(CONFIG, stall_seconds=0.3, max_group_windows=2, max_group_delay_ms=0)
    engine = start(config, on_fatal=fatal.set, lookahead=1)
    answers = [engine.submit(encode(picture(i)), NPY) for i in range(6)]
    assert fatal.wait(10)
    assert {error_of(answer).kind for answer in answers} == {ErrorKind.INTERNAL}
    release.set()


@pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install -e '.[kernels]'")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # triton's interpreter
def test_graphs_of_what_warms_up_are_there_before_traffic(
    model: Segmenter, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_packed(monkeypatch)
    graphs = GraphRuntime(model, attention="flash", budget_bytes=2**30, capture=Rerun())
    monkeypatch.setattr("handlers.engine.engine.make_runtime", lambda *_, **__: graphs)
    engine = start(replace(CONFIG, graph_mib=1024))
    data = encode(picture(1, 64, 64))
    engine.warm_up([data])
    warm = dict(graphs.policy.counts)
    labels_of(engine.submit(data, NPY))
    assert graphs.policy.counts["capture"] == warm["capture"] >= 3, "each of three stages"
    assert graphs.policy.counts["eager"] == warm["eager"]
    assert graphs.policy.counts["replay"] == warm["replay"] + 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_half_a_minute_at_three_times_capacity_loses_nothing(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_embed(monkeypatch, 0.1)  # a device that is the bottleneck, whatever the machine
    engine = start(replace(CONFIG, max_inflight_tokens=40 * 2 * 65, deadline_seconds=20))
    data = encode(picture(0))
    engine.submit(data, NPY).result(250)  # the first one compiles
    begin = time.monotonic()
    wait([engine.submit(data, NPY) for _ in range(40)])
    gap = (time.monotonic() - begin) / 40 / 3
    process = psutil.Process()
    memory, threads = process.memory_info().rss, threading.active_count()

    answers = []
    begin = time.monotonic()
    while time.monotonic() < begin + 30:
        answers.append(engine.submit(data, NPY))
        time.sleep(gap)
    wait(answers, 60)

    kinds = Counter("served" if a.exception(0) is None else error_of(a).kind for a in answers)
    assert kinds["served"] > 0
    assert kinds[ErrorKind.OVERLOADED] > kinds["served"]
    assert kinds["served"] + kinds[ErrorKind.OVERLOADED] + kinds[ErrorKind.DEADLINE] == len(answers)
    assert engine.inflight == 0
    assert threading.active_count() <= threads
    del answers
    assert process.memory_info().rss < memory + 64 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("graph_mib", "lookahead"), [(0, 0), (0, 1), (512, 1)])
def test_an_engine_on_a_gpu_gives_the_masks_of_the_cpu(
    tiny_model: Callable[..., Segmenter], graph_mib: int, lookahead: int
) -> None:
    """float32 there and here; near-ties may pair other tokens, so a few labels may differ."""
    pictures = [picture(s, height, width) for s, (height, width) in enumerate([(60, 80), (64, 64), (50, 300)])]
    expected = [tiny_model(schedule=(1, 2), **TINY).segment(image) for image in pictures]
    config = replace(CONFIG, precision="fp32", codec_threads=4, graph_mib=graph_mib)
    engine = Engine(tiny_model(schedule=(1, 2), **TINY).cuda(), CLASSES, config, lookahead=lookahead)
    try:
        answers = [engine.submit(encode(image), NPY) for image in pictures * 40]
        agreement = [(labels_of(answer) == expected[i % 3]).mean() for i, answer in enumerate(answers)]
        for view in ("tokens", "confidence", "overlay"):
            options = RequestOptions(request_id="test", format=view)
            assert engine.submit(encode(pictures[0]), options).result(250).body
    finally:
        engine.close()
    assert min(agreement) > 0.95
