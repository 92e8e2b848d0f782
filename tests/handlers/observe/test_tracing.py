"""Spans of requests: of an engine in memory, and of real servers at a receiver that speaks OTLP."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
from asking_triton import infer_raw
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image

from handlers.api.formats.views import encode_picture
from handlers.api.options import RequestOptions
from handlers.client import Answer
from handlers.config import ServingConfig
from handlers.engine.engine import Engine
from handlers.errors import ServingError
from handlers.launch.processes import free_port
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from handlers.observe.otel import OpenTelemetry
from handlers.observe.tracing import NO_SPAN, RequestSpan, make_tracing
from model_store.torchserve import build_archive
from model_store.triton import build_model
from mpm_ops import InferenceConfig, Segmenter
from mpm_ops.classes import Classes, default_colors

pytest_plugins = ("tiny_server",)

ROOT = Path(__file__).resolve().parents[3]
CLASSES = Classes(tuple("abcde"), default_colors(5))
STEPS = ["decode", "encode", "labels", "merge", "merge", "stage 0", "stage 1", "stage 2"]
WAIT_SECONDS = 60


def encoded(seed: int, height: int = 64, width: int = 128) -> bytes:
    """A picture of two windows."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parent_of(number: int) -> dict[str, str]:
    """A client's context, its trace and span both named by a number."""
    return {"traceparent": f"00-{number:032x}-{number:016x}-01"}


class TestOfAnEngine:
    @pytest.fixture
    def exporter(self) -> InMemorySpanExporter:
        return InMemorySpanExporter()

    @pytest.fixture
    def tracing(self, exporter: InMemorySpanExporter) -> OpenTelemetry:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return OpenTelemetry(provider, "tiny")

    @pytest.fixture
    def engine(self, tiny_model: Callable[..., Segmenter]) -> Iterator[Engine]:
        inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=64, normalization="vit")
        model = tiny_model(schedule=(1, 2), patch_size=8, inference=inference)
        config = ServingConfig(schedule=(1, 2), runtime="torch", agreement_fraction=1)
        running = Engine(model, CLASSES, config)
        yield running
        running.close()

    def test_every_step_is_inside_its_request_and_takes_what_the_reply_says(
        self, engine: Engine, tracing: OpenTelemetry, exporter: InMemorySpanExporter
    ) -> None:
        span = tracing.start(parent_of(7), "mine", time.monotonic())
        reply = engine.submit(encoded(0), RequestOptions(request_id="mine"), span).result(WAIT_SECONDS)
        spans = exporter.get_finished_spans()
        (root,) = (s for s in spans if s.name == "segment")
        assert root.parent is not None
        assert (root.parent.trace_id, root.parent.span_id, root.context.trace_id) == (7, 7, 7)
        assert root.attributes == {
            "mpm.model": "tiny",
            "mpm.request_id": "mine",
            "http.response.status_code": 200,
        }
        assert sorted(s.name for s in spans if s is not root) == STEPS
        for name in ("decode", "labels", "encode"):
            (step,) = (s for s in spans if s.name == name)
            assert seconds_of(step) == pytest.approx(reply.seconds[name], abs=2e-6)
        merges = [s for s in spans if s.name == "merge"]
        assert sum(map(seconds_of, merges)) == pytest.approx(reply.seconds["merge"], abs=4e-6)
        stages = sorted((s for s in spans if s.name.startswith("stage")), key=lambda s: s.name)
        busy = reply.seconds["compute"] + reply.seconds["merge"]
        assert sum(map(seconds_of, stages)) == pytest.approx(busy, abs=6e-6)
        for i, stage in enumerate(stages):
            assert stage.attributes is not None
            assert stage.attributes["mpm.tokens.in"] == reply.tokens[i]
            assert stage.attributes["mpm.tokens.out"] == reply.tokens[min(i + 1, 2)]
            assert stage.attributes["mpm.schedule"] == "1,2"
            assert stage.attributes["mpm.windows"] == 2
        for child in (s for s in spans if s is not root):
            above = next(s for s in spans if child.parent and s.context.span_id == child.parent.span_id)
            assert above in (stages[:2] if child.name == "merge" else [root])
            assert is_inside(child, above)

    def test_mates_of_a_group_have_traces_of_their_own(
        self,
        engine: Engine,
        tracing: OpenTelemetry,
        exporter: InMemorySpanExporter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        held = threading.Event()
        embed = Segmenter.embed

        def slow_embed(self: Segmenter, windows: Any) -> Any:
            held.wait(WAIT_SECONDS)
            return embed(self, windows)

        monkeypatch.setattr(Segmenter, "embed", slow_embed)
        spans = {n: tracing.start(parent_of(n), f"request-{n}", time.monotonic()) for n in range(1, 9)}
        answers = {n: engine.submit(encoded(n), RequestOptions(request_id=f"{n}"), s) for n, s in spans.items()}
        held.set()
        for answer in answers.values():
            answer.result(WAIT_SECONDS)
        found = exporter.get_finished_spans()
        assert {s.context.trace_id for s in found} == set(spans)
        groups: dict[object, list[ReadableSpan]] = {}
        for n in spans:
            own = [s for s in found if s.context.trace_id == n]
            ids = {s.context.span_id for s in own}
            assert all(s.parent and s.parent.span_id in ids for s in own if s.name != "segment")
            windows = dict.fromkeys(("stage 0", "stage 1", "stage 2"), 0)
            for stage in (s for s in own if s.name in windows):
                assert stage.attributes is not None
                windows[stage.name] += attribute(stage, "mpm.windows")
                groups.setdefault(stage.attributes["mpm.group.number"], []).append(stage)
            assert set(windows.values()) == {2}, "both windows of the picture went through every stage"
        for mates in groups.values():
            assert [seconds_of(s) for s in mates] == pytest.approx([seconds_of(mates[0])] * len(mates), abs=2e-6)
            assert len({s.name for s in mates}) == 1
            assert {attribute(s, "mpm.group.requests") for s in mates} == {len(mates)}
            total = sum(attribute(s, "mpm.windows") for s in mates)
            assert {attribute(s, "mpm.group.windows") for s in mates} == {total}
        assert max(len(mates) for mates in groups.values()) > 1, "no group had two requests"

    def test_failures(self, engine: Engine, tracing: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
        span = tracing.start({}, "mine", time.monotonic())
        with pytest.raises(ServingError):
            engine.submit(b"no picture", RequestOptions(request_id="mine"), span).result(WAIT_SECONDS)
        tracing.start({}, "other", time.monotonic()).end(503)
        mine, other = exporter.get_finished_spans()
        assert mine.status.is_ok or mine.status.is_unset
        assert not other.status.is_ok
        assert not other.status.is_unset
        assert mine.parent is None
        assert mine.context.trace_id != other.context.trace_id

    @pytest.mark.parametrize("bad", ["", "nonsense", "00-" + 32 * "0" + "-" + 16 * "1" + "-01", "é" * 55, 10**4 * "a"])
    def test_a_traceparent_that_is_not_valid_is_as_good_as_none(
        self, tracing: OpenTelemetry, exporter: InMemorySpanExporter, bad: str
    ) -> None:
        tracing.start({"traceparent": bad}, "mine", time.monotonic()).end(200)
        (span,) = exporter.get_finished_spans()
        assert span.parent is None

    def test_what_the_client_does_not_sample_is_not_recorded(
        self, engine: Engine, tracing: OpenTelemetry, exporter: InMemorySpanExporter
    ) -> None:
        unsampled = {"traceparent": f"00-{7:032x}-{7:016x}-00"}
        span = tracing.start(unsampled, "mine", time.monotonic())
        assert span is NO_SPAN
        engine.submit(encoded(0), RequestOptions(request_id="mine"), span).result(WAIT_SECONDS)
        assert not exporter.get_finished_spans()

    def test_exemplars_name_the_trace(self, engine: Engine, tracing: OpenTelemetry) -> None:
        from prometheus_client.openmetrics.exposition import generate_latest

        spans: Sequence[RequestSpan] = (tracing.start(parent_of(0xABC), "traced", time.monotonic()), NO_SPAN)
        for name, span in zip(("x" * 128, "plain"), spans, strict=True):
            engine.submit(encoded(0), RequestOptions(request_id=name), span).result(WAIT_SECONDS)
            text = generate_latest(engine.metrics.registry).decode()
            expected = f'trace_id="{0xABC:032x}"' if span.trace_id else 'request_id="plain"'
            assert f"# {{{expected}}}" in text


def seconds_of(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def is_inside(child: Any, above: Any) -> bool:
    """Up to the microsecond that seconds lose when they are subtracted."""
    return bool(child.start_time >= above.start_time - 1000 and child.end_time <= above.end_time + 1000)


def attribute(span: ReadableSpan, name: str) -> int:
    assert span.attributes is not None
    value = span.attributes[name]
    assert isinstance(value, int)
    return value


class Receiver:
    """What an OTLP collector would get: spans, and the attributes of their resources."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in sent.resource_spans:
                    named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                    receiver.services.add(named["service.name"])
                    for scope in resource.scope_spans:
                        receiver.spans.extend(scope.spans)
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """A test's output is no log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def requests(self, *names: str) -> dict[str, Span]:
        """The spans of these requests by their ids, as soon as all are there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            roots = {told(s)["mpm.request_id"]: s for s in list(self.spans) if s.name == "segment"}
            if set(names) <= set(roots):
                return {name: roots[name] for name in names}
            assert time.monotonic() < deadline, f"expected spans of {names}, got those of {set(roots)}"
            time.sleep(0.05)

    def inside(self, span: Span) -> list[Span]:
        return [s for s in self.spans if s.parent_span_id == span.span_id]


def told(span: Span) -> dict[str, Any]:
    """A span's attributes."""
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def own_metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def traced(
    receiver: Receiver, checkpoint: Path, own_metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("traced")
    serving = {"schedule": [0, 1], "metrics_port": own_metrics_port, "agreement_fraction": 0}
    build_archive(checkpoint, name="tiny", out=folder, serving=serving)
    with variables(receiver.environment), TorchServe(folder, log=folder / "torchserve.log") as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def traced_triton(receiver: Receiver, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    folder = tmp_path_factory.mktemp("traced_triton")
    build_model(checkpoint, name="tiny", out=folder, serving={"schedule": [0, 1], "agreement_fraction": 0})
    with (
        variables(receiver.environment | {"OTEL_SERVICE_NAME": "mine"}),
        Triton(folder, log=folder / "triton.log", exit_seconds=10) as running,
    ):
        running.wait_ready()
        yield running


def check_whole(receiver: Receiver, root: Span, parent: int, *, pictures: int = 1) -> None:
    """All steps of a request are there, under the client's span, inside the request's, and of its trace."""
    assert int.from_bytes(root.trace_id) == int.from_bytes(root.parent_span_id) == parent
    assert root.kind == Span.SPAN_KIND_SERVER
    steps = receiver.inside(root)
    merges = [merge for step in steps for merge in receiver.inside(step)]
    assert all(step.trace_id == root.trace_id for step in (*steps, *merges))
    assert {step.name for step in (*steps, *merges)} == set(STEPS)
    for name in ("decode", "labels", "encode"):
        assert [step.name for step in steps].count(name) == pictures
    stages = [step for step in steps if step.name.startswith("stage")]
    assert len(merges) == len([stage for stage in stages if stage.name != "stage 2"])
    windows = {
        name: sum(told(s)["mpm.windows"] for s in stages if s.name == name) for name in STEPS if "stage" in name
    }
    assert len(set(windows.values())) == 1, "every window went through every stage, once"
    for step in steps:
        assert is_within(step, root)
        assert all(is_within(merge, step) for merge in receiver.inside(step))


def is_within(child: Span, above: Span) -> bool:
    return bool(
        child.start_time_unix_nano >= above.start_time_unix_nano - 1000
        and child.end_time_unix_nano <= above.end_time_unix_nano + 1000
        and child.end_time_unix_nano >= child.start_time_unix_nano
    )


def line_of(log: Path | None, request_id: str) -> dict[str, Any]:
    """The one line of a request in a server's log, as soon as it is there."""
    assert log is not None
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        lines = [line for line in log.read_text(errors="replace").splitlines() if f'"{request_id}"' in line]
        if lines:
            (line,) = lines
            found: dict[str, Any] = json.loads(line[line.index("{") :])
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestTorchServe:
    def test_requests_that_come_together(
        self, traced: TorchServe, receiver: Receiver, photo: Callable[..., np.ndarray], own_metrics_port: int
    ) -> None:
        def ask(number: int) -> requests.Response:
            picture = encode_picture(photo(number, 128, 256), "image/jpeg")
            headers = {"X-Request-Id": f"ts-{number}", **parent_of(number)}
            return requests.post(f"{traced.url}/predictions/tiny", data=picture, headers=headers, timeout=60)

        numbers = range(1, 9)
        with ThreadPoolExecutor(len(numbers)) as clients:
            replies = dict(zip(numbers, clients.map(ask, numbers), strict=True))
        roots = receiver.requests(*(f"ts-{n}" for n in numbers))
        for n in numbers:
            check_whole(receiver, roots[f"ts-{n}"], n)
            assert told(roots[f"ts-{n}"])["http.response.status_code"] == replies[n].status_code == 200
            timing = dict(part.split(";dur=") for part in replies[n].headers["Server-Timing"].split(", "))
            for step in receiver.inside(roots[f"ts-{n}"]):
                if step.name in timing:
                    took = (step.end_time_unix_nano - step.start_time_unix_nano) / 1e6
                    assert took == pytest.approx(float(timing[step.name]), abs=0.011)
            line = line_of(traced.log, f"ts-{n}")
            assert line["trace_id"] == f"{n:032x}"
            assert set(line["ms"]) == {"decode", "queue", "compute", "merge", "labels", "encode", "total"}
            assert line["ms"]["compute"] == pytest.approx(float(timing["compute"]), abs=0.011)
            assert (line["code"], line["windows"], len(line["tokens"])) == (200, told_windows(receiver, n), 3)
        assert "tiny" in receiver.services
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = requests.get(f"http://127.0.0.1:{own_metrics_port}/metrics", headers=accept, timeout=10).text
        assert any(f'# {{trace_id="{n:032x}"}}' in text for n in numbers)
        assert "warm-up" not in text

    def test_a_request_of_nobody_s_and_one_that_fails(self, traced: TorchServe, receiver: Receiver) -> None:
        url = f"{traced.url}/predictions/tiny"
        requests.post(url, data=encoded(0), headers={"X-Request-Id": "ts-alone"}, timeout=60)
        failing = {"X-Request-Id": "ts-bad", **parent_of(77)}
        assert requests.post(url, data=b"no picture", headers=failing, timeout=60).status_code == 400
        refused = {"X-Request-Id": "ts-refused", "Accept": "text/html", **parent_of(78)}
        assert requests.post(url, data=encoded(0), headers=refused, timeout=60).status_code == 406
        roots = receiver.requests("ts-alone", "ts-bad", "ts-refused")
        assert not roots["ts-alone"].parent_span_id
        assert len(receiver.inside(roots["ts-alone"])) >= 6
        for name, number, code in (("ts-bad", 77, 400), ("ts-refused", 78, 406)):
            assert int.from_bytes(roots[name].trace_id) == number
            assert told(roots[name])["http.response.status_code"] == code
            assert roots[name].status.code != Status.STATUS_CODE_ERROR, "it is the client's"
            assert not receiver.inside(roots[name])
            assert line_of(traced.log, name)["trace_id"] == f"{number:032x}"

    def test_the_warm_up_is_no_request(self, traced: TorchServe, receiver: Receiver) -> None:
        assert line_of(traced.log, "ts-alone")["code"] == 200
        assert not [s for s in receiver.spans if told(s).get("mpm.request_id") == "warm-up"]


def test_the_last_spans_arrive_before_the_end(receiver: Receiver, checkpoint: Path, tmp_path: Path) -> None:
    """TorchServe kills its workers; what they recorded and did not send yet has to be sent before."""
    build_archive(checkpoint, name="tiny", out=tmp_path, serving={"schedule": [0, 1], "agreement_fraction": 0})
    hours = {"OTEL_BSP_SCHEDULE_DELAY": str(3_600_000)}
    with variables(receiver.environment | hours), TorchServe(tmp_path, log=tmp_path / "torchserve.log") as running:
        running.wait_ready()
        last = {"X-Request-Id": "ts-last", **parent_of(99)}
        url = f"{running.url}/predictions/tiny"
        assert requests.post(url, data=encoded(0), headers=last, timeout=60).status_code == 200
        assert not [s for s in receiver.spans if int.from_bytes(s.trace_id) == 99]
        running.drain()
    assert [s.name for s in receiver.spans if int.from_bytes(s.trace_id) == 99 and s.name == "segment"]


def told_windows(receiver: Receiver, number: int) -> int:
    """Windows that a trace's stage 0 tells of."""
    stages = [s for s in receiver.spans if s.name == "stage 0" and int.from_bytes(s.trace_id) == number]
    return sum(told(stage)["mpm.windows"] for stage in stages)


class TestTriton:
    def test_http(self, traced_triton: Triton, receiver: Receiver, photo: Callable[..., np.ndarray]) -> None:
        def ask(number: int) -> Answer:
            picture = encode_picture(photo(number, 128, 256), "image/jpeg")
            headers = {"X_Request_Id": f"http-{number}", **parent_of(number)}
            return infer_raw(traced_triton.url, "tiny", picture, X_MPM_Outputs="MASK_PNG", **headers)

        numbers = range(101, 105)
        with ThreadPoolExecutor(len(numbers)) as clients:
            assert {reply.status for reply in clients.map(ask, numbers)} == {200}
        for name, root in receiver.requests(*(f"http-{n}" for n in numbers)).items():
            check_whole(receiver, root, int(name.removeprefix("http-")))
            line = line_of(traced_triton.log, name)
            assert line["trace_id"] == f"{int(name.removeprefix('http-')):032x}"
            assert set(line["ms"]) == {"decode", "queue", "compute", "merge", "labels", "encode", "total"}
        assert "mine" in receiver.services

    @pytest.mark.parametrize("way", ["headers", "parameters"])
    def test_grpc_with_several_pictures(self, traced_triton: Triton, receiver: Receiver, way: str) -> None:
        number = 201 if way == "headers" else 202
        image = tritonclient.grpc.InferInput("IMAGE", [3, 1], "BYTES")
        image.set_data_from_numpy(np.array([[encoded(seed)] for seed in range(3)], dtype=object))
        wanted = [tritonclient.grpc.InferRequestedOutput("MASK_PNG")]
        with tritonclient.grpc.InferenceServerClient(traced_triton.grpc_url) as client:
            context: dict[str, Any] = {way: parent_of(number)}
            client.infer("tiny", [image], outputs=wanted, request_id=f"grpc-{number}", **context)
        (root,) = receiver.requests(f"grpc-{number}").values()
        check_whole(receiver, root, number, pictures=3)
        line = line_of(traced_triton.log, f"grpc-{number}")
        assert line["windows"] == told_windows(receiver, number) >= 3
        assert line["tokens"][0] == 64 * line["windows"]


class TestTheEnvironment:
    @pytest.fixture(autouse=True)
    def _plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            monkeypatch.delenv(name)

    def test_off_imports_nothing_of_opentelemetry(self) -> None:
        code = (
            "import os, sys, handlers.servers.torchserve, handlers.observe.tracing as t\n"
            "address = {'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:1'}\n"
            "for values in ({}, {'OTEL_TRACES_EXPORTER': 'none', **address}, {'OTEL_SDK_DISABLED': 'true', **address},"
            " {'OTEL_SERVICE_NAME': 'mine'}):\n"
            "    os.environ.update(values)\n"
            "    assert t.make_tracing('m').start({}, 'r', 0) is t.NO_SPAN, values\n"
            "    assert not [m for m in sys.modules if m.startswith('opentelemetry')], values\n"
            "    for name in values: del os.environ[name]\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: expected otlp, console or none, got 'zipkin'"),
            (
                {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
                "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'",
            ),
        ],
    )
    def test_what_is_not_there_is_named(self, values: dict[str, str], message: str) -> None:
        with variables(values), pytest.raises(ValueError, match=message):
            make_tracing("m")

    def test_without_the_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "handlers.observe.otel")
        monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
        with variables({"OTEL_TRACES_EXPORTER": "otlp"}), pytest.raises(ValueError, match="its extra `tracing`"):
            make_tracing("m")

    def test_console(self) -> None:
        code = (
            "import handlers.observe.tracing as t; tracing = t.make_tracing('street');"
            "tracing.start({}, 'mine', 0).end(200); tracing.close()"
        )
        environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        (line,) = done.stdout.splitlines()
        assert json.loads(line)["attributes"]["mpm.request_id"] == "mine"
        assert json.loads(line)["resource"]["attributes"]["service.name"] == "street"
