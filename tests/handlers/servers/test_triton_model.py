"""The adapter alone, between a Triton that would end at the first wrong touch and an engine that does what it is told.

What ends or hangs a real Triton is a violation here: a touch of a request after its final response, a second
response, or none.
"""

import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from making import BREAKS, break_decoding, make_picture

from handlers.api.formats.views import encode_picture
from handlers.api.options import RequestOptions
from handlers.config import ServingConfig
from handlers.engine import loading
from handlers.engine.engine import Engine
from handlers.engine.request import Picture, Reply
from handlers.engine.request import Request as EngineRequest
from handlers.errors import ErrorKind, ServingError
from handlers.observe.tracing import RequestSpan

pytest_plugins = ("tiny_server",)

WAIT_SECONDS = 10
MASK = np.arange(6, dtype=np.uint8).reshape(2, 3)
BODIES: dict[str, Any] = {"png": b"png", "npy": MASK, "json": b"{}\n", "tokens": b"view"}


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self._name, self.values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self.values

    def shape(self) -> tuple[int, ...]:
        return self.values.shape


class TritonError(SimpleNamespace):
    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = "invalid", "internal", "unavailable", "cancelled"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message=message, code=code)


class Response(SimpleNamespace):
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        super().__init__(tensors=tensors, error=error)

    def has_error(self) -> bool:
        return self.error is not None

    def output_tensors(self) -> Any:
        return self.tensors


PB_UTILS = SimpleNamespace(
    Tensor=Tensor,
    TritonError=TritonError,
    InferenceResponse=Response,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    get_input_tensor_by_name=lambda request, name: next(t for t in request.inputs() if t.name() == name),
)


class Request:
    """A request and its sender; every touch after the final response is noted."""

    def __init__(
        self,
        *pictures: bytes,
        outputs: tuple[str, ...] = ("MASK_PNG",),
        parameters: dict[str, Any] | None = None,
        timeout_us: int = 0,
        send_failures: int = 0,
    ) -> None:
        self._pictures = np.array([[picture] for picture in pictures or (b"x",)], dtype=object)
        self._outputs = outputs
        self._parameters = json.dumps(parameters) if parameters else ""
        self._timeout_us = timeout_us
        self._send_failures = send_failures
        self._num_sent = 0
        self.ends_apart = False
        self.cancelled = False
        self.responses: list[Response] = []
        self.touched_late: list[str] = []
        self.answered = threading.Event()

    def _touch(self, what: str) -> None:
        if self.answered.is_set():
            self.touched_late.append(what)

    def inputs(self) -> list[Tensor]:
        self._touch("inputs")
        return [Tensor("IMAGE", self._pictures)]

    def requested_output_names(self) -> list[str]:
        self._touch("requested_output_names")
        return list(reversed(self._outputs))

    def parameters(self) -> str:
        self._touch("parameters")
        return self._parameters

    def request_id(self) -> str:
        self._touch("request_id")
        return "named"

    def timeout(self) -> int:
        self._touch("timeout")
        return self._timeout_us

    def is_cancelled(self) -> bool:
        self._touch("is_cancelled")
        return self.cancelled

    def get_response_sender(self) -> "Request":
        self._touch("get_response_sender")
        return self

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        """As Triton's: one answer, which counts even if it fails, then the end."""
        self._touch("send")
        if response is not None:
            self._num_sent += 1
            assert self._num_sent == 1
            self.ends_apart = not flags
            assert not (self.ends_apart and response.has_error())  # over gRPC an end after an error would hide it
            if self._send_failures:
                self._send_failures -= 1
                raise RuntimeError("no room in shared memory")
            self.responses.append(response)
        if flags == PB_UTILS.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.answered.set()

    def response(self) -> Response:
        """The only response, once it is there."""
        assert self.answered.wait(WAIT_SECONDS)
        time.sleep(0.12)  # two looks of the watcher, which would touch the request if it could
        assert self.touched_late == []
        (response,) = self.responses
        return response

    def error(self) -> tuple[str, str]:
        error = self.response().error
        return error.code, error.message


class ObedientEngine:
    """Answers; a picture that names an error gets it, and one that begins with `later` waits."""

    def __init__(self, _model: Any, _classes: Any, config: ServingConfig, **__: Any) -> None:
        self.deadline_seconds = config.deadline_seconds
        self.ended: list[int] = []
        self.seen: list[tuple[bytes, RequestOptions]] = []
        self.later: dict[bytes, Picture] = {}
        self.closed = False

    def warm_up(self, pictures: Iterable[bytes]) -> None:
        """Nothing here is cold."""

    def open(
        self, request_id: str, *, arrived: float, timeout_seconds: float, span: RequestSpan, render: Any
    ) -> EngineRequest:
        deadline = arrived + min(timeout_seconds or self.deadline_seconds, self.deadline_seconds)
        on_end = lambda request, code, pictures, error: self.ended.append(code)  # noqa: E731
        request = EngineRequest(request_id, arrived, deadline, span=span, render=render, on_end=on_end)
        watchdog = threading.Timer(deadline - arrived, request.expire)
        watchdog.daemon = True
        watchdog.start()
        request.add_done_callback(lambda _: watchdog.cancel())
        return request

    def take(self, request: EngineRequest, pictures: Sequence[bytes], options: RequestOptions) -> None:
        number = len(pictures)
        taken = [make_picture(request=request, index=i, num_pictures=number) for i in range(number)]
        for picture in taken:
            picture.options = options
        request.begin(taken)
        for data, picture in zip(pictures, taken, strict=True):
            self._submit(data, picture)

    def _submit(self, data: bytes, picture: Picture) -> None:
        self.seen.append((data, picture.options))
        if data == b"raise":
            raise RuntimeError("submitting failed")
        if data.startswith(b"later"):
            self.later[data] = picture
        elif data == b"refuse":
            picture.fail(ServingError(ErrorKind.TOO_LARGE, "too large"))
        else:
            answer(picture)

    def close(self) -> None:
        self.closed = True


def answer(picture: Picture, **bodies: Any) -> None:
    known = BODIES | bodies
    found = {name: known[name] for name in picture.options.formats}
    picture.request.complete(picture, Reply(found, picture.options.media_type, (4, 2), {}, 1))


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts the model with an obedient engine; keywords are the configuration's and max_inflight."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", PB_UTILS)
    monkeypatch.delitem(sys.modules, "handlers.servers.triton", raising=False)
    monkeypatch.setattr(loading, "Engine", ObedientEngine)
    level = logging.getLogger("handlers").level
    module = importlib.import_module("handlers.servers.triton")
    models = []

    def begin(max_inflight: int = 4, **serving: Any) -> Any:
        folder = tmp_path / "1"
        folder.mkdir(exist_ok=True)
        for file in ("checkpoint.pth", "variant.yml", "classes.csv"):
            (folder / file).write_bytes((checkpoint.parent / file).read_bytes())
        (folder / "serving.yaml").write_text(yaml.safe_dump({"schedule": [1]} | serving))
        config = {"parameters": {"max_inflight": {"string_value": str(max_inflight)}}}
        model = module.TritonPythonModel()
        names = {"model_repository": str(tmp_path), "model_name": "tiny", "model_version": "1"}
        model.initialize(names | {"model_config": json.dumps(config)})
        models.append(model)
        return model

    yield begin
    for model in models:
        later = getattr(model._engine, "later", {})  # a real engine has none
        assert model._gate.inflight == len([1 for picture in later.values() if not picture.is_over])
        model.finalize()
    logging.getLogger("handlers").setLevel(level)
    sys.modules.pop("handlers.servers.triton", None)


class TestEveryPathAnswersOnce:
    @pytest.mark.parametrize(
        ("picture", "code", "told"),
        [
            (b"raise", "internal", "the request failed inside the server"),
            (b"refuse", "invalid", "too large"),
        ],
    )
    def test_engine_that_fails(self, start: Callable[..., Any], picture: bytes, code: str, told: str) -> None:
        request = Request(picture)
        assert start().execute([request]) == [None]
        assert request.error() == (code, told)

    @pytest.mark.parametrize(
        ("parameters", "told"),
        [
            ({"view": "overlay"}, "parameters: expected some of x-mpm-fit, x-mpm-merger, x-mpm-outputs"),
            ({"x-mpm-view": "funny"}, "X-MPM-View: expected one of overlay, tokens, confidence, grey, maps, got"),
            ({"x-mpm-view": 3}, "x-mpm-view: expected text, got 3"),
            ({"X-MPM-Schedule": "a"}, "X-MPM-Schedule: "),
            ({"x-mpm-priority": "high"}, "X-MPM-Priority: expected one of interactive, bulk"),
            ({"x-mpm-outputs": "MASKS"}, "X-MPM-Outputs: expected some of MASK_PNG, got 'MASKS'"),
            ({"x-mpm-outputs": ""}, "X-MPM-Outputs: expected some of MASK_PNG, got ''"),
        ],
    )
    def test_unusable_options(self, start: Callable[..., Any], parameters: dict[str, Any], told: str) -> None:
        request = Request(parameters=parameters)
        start().execute([request])
        code, message = request.error()
        assert code == "invalid"
        assert message.startswith(told)

    def test_neighbours_of_a_failure(self, start: Callable[..., Any]) -> None:
        requests = [Request(picture) for picture in (b"x", b"raise", b"refuse", b"x")]
        assert start().execute(requests) == [None] * 4
        assert [request.response().error is None for request in requests] == [True, False, False, True]

    def test_picture_that_breaks_the_engine(self, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "Engine", Engine)
        model = start()
        break_decoding(monkeypatch)
        requests = [
            Request(encode_picture(np.zeros((size, 30, 3), np.uint8), "image/png")) for size in (20, BREAKS, 24)
        ]
        model.execute(requests)
        assert [request.response().error is None for request in requests] == [True, False, True]
        assert requests[1].error() == ("internal", "the request failed inside the server")

    def test_answer_that_cannot_be_sent(self, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Where that may be it ends all the same: Triton tells its client that there is none."""
        model = start()
        sent = Request(b"x", outputs=("MASK",))
        model.execute([sent])
        assert (len(sent.response().tensors), sent.ends_apart) == (1, False)
        triton = importlib.import_module("handlers.servers.triton")
        monkeypatch.setattr(triton, "_free_bytes", lambda: -1)
        monkeypatch.setattr(triton, "_check_room", lambda size: None)
        request = Request(send_failures=1)
        model.execute([request])
        assert request.answered.wait(WAIT_SECONDS)
        assert (request.responses, request.ends_apart) == ([], True)

    def test_answer_for_which_there_is_no_room(
        self, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = start()
        free = SimpleNamespace(f_bavail=1024, f_frsize=4096)
        monkeypatch.setattr(importlib.import_module("handlers.servers.triton").os, "statvfs", lambda _: free)
        request = Request(b"x", outputs=("MASK",))
        model.execute([request])
        code, message = request.error()
        assert code == "unavailable"
        assert message.startswith("reply: expected at most the 0 bytes that /dev/shm has for it, got ")

    def test_deadline(self, start: Callable[..., Any]) -> None:
        model = start(deadline_seconds=0.2)
        request = Request(b"later")
        model.execute([request])
        assert request.error() == ("unavailable", "not answered within 0.2 s")
        assert model._engine.later[b"later"].is_over
        assert model._engine.ended == [504]

    def test_timeout_of_the_client(self, start: Callable[..., Any]) -> None:
        request = Request(b"later", timeout_us=100_000)
        start().execute([request])
        assert request.error() == ("unavailable", "not answered within 0.1 s")

    def test_cancelled_by_the_client(self, start: Callable[..., Any]) -> None:
        model = start()
        request = Request(b"later")
        model.execute([request])
        request.cancelled = True
        assert request.error()[0] == "cancelled"
        assert model._engine.later[b"later"].is_over

    def test_cancelling_races_with_answering(self, start: Callable[..., Any]) -> None:
        model = start(max_inflight=1000)
        requests = [Request(b"later %d" % i) for i in range(300)]
        model.execute(requests)

        def cancel() -> None:
            for request in requests:
                request.cancelled = True
                time.sleep(0.0005)

        canceller = threading.Thread(target=cancel)
        canceller.start()
        for picture in list(model._engine.later.values()):
            answer(picture)
            time.sleep(0.0005)
        canceller.join()
        for request in requests:
            assert request.answered.wait(WAIT_SECONDS)
        time.sleep(0.12)
        assert [len(request.responses) for request in requests] == [1] * 300
        assert not any(request.touched_late for request in requests)


class TestOrderAndRoom:
    def test_answers_leave_when_they_are_there(self, start: Callable[..., Any]) -> None:
        model = start()
        first, second, third = Request(b"later 1"), Request(b"later 2"), Request(b"x")
        model.execute([first, second])
        model.execute([third])
        third.response()
        answer(model._engine.later[b"later 2"])
        second.response()
        assert not first.answered.is_set()
        answer(model._engine.later[b"later 1"])
        first.response()

    def test_execute_blocks_while_the_engine_is_full(self, start: Callable[..., Any]) -> None:
        model = start(max_inflight=2)
        held = [Request(b"later 1"), Request(b"later 2")]
        model.execute(held)
        more = Request(b"x")
        blocked = threading.Thread(target=model.execute, args=([more],))
        blocked.start()
        time.sleep(0.2)
        assert blocked.is_alive()
        assert not more.answered.is_set()
        assert b"x" not in {data for data, _ in model._engine.seen}
        answer(model._engine.later[b"later 1"])
        blocked.join(WAIT_SECONDS)
        more.response()

    def test_a_request_ends_while_it_waits_for_room(self, start: Callable[..., Any]) -> None:
        model = start(max_inflight=1)
        model.execute([Request(b"later")])
        late, cancelled = Request(timeout_us=100_000), Request()
        cancelled.cancelled = True
        model.execute([late, cancelled])  # returns, though there is no room
        assert late.error()[0] == "unavailable"
        assert cancelled.error()[0] == "cancelled"
        assert len(model._engine.seen) == 1
        assert model._engine.ended == [504, 499]

    def test_a_batch_counts_its_pictures(self, start: Callable[..., Any]) -> None:
        model = start(max_inflight=3)
        model.execute([Request(b"later 1", b"later 2", b"later 3")])
        assert model._gate.inflight == 3
        model._engine.later[b"later 1"].fail(ServingError(ErrorKind.BAD_REQUEST, "bad"))
        assert model._gate.inflight == 0  # what the others would have told nobody


class TestOutputs:
    def test_only_those_asked_for_from_one_computation(self, start: Callable[..., Any]) -> None:
        model = start()
        for outputs in (("MASK",), ("RESULT_JSON", "MASK_PNG"), ("MASK", "MASK_PNG", "RESULT_JSON")):
            request = Request(outputs=outputs)
            model.execute([request])
            assert {tensor.name() for tensor in request.response().tensors} == set(outputs)
        assert len(model._engine.seen) == 3
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.response().tensors}
        np.testing.assert_array_equal(tensors["MASK"], MASK[None])
        assert tensors["MASK_PNG"].tolist() == [[b"png"]]
        assert tensors["RESULT_JSON"].tolist() == [[b"{}\n"]]

    def test_options(self, start: Callable[..., Any]) -> None:
        model = start()
        parameters = {
            "X-MPM-View": "tokens",
            "x-mpm-schedule": "off",
            "x-mpm-priority": "bulk",
            "X-Request-Id": "mine",
            "x-mpm-outputs": "MASK_PNG, MASK",
        }
        request = Request(outputs=("MASK", "MASK_PNG", "RESULT_JSON"), parameters=parameters)
        model.execute([request])
        assert [tensor.name() for tensor in request.response().tensors] == ["MASK", "MASK_PNG"]
        assert model._engine.seen[-1][1] == RequestOptions(
            request_id="mine",
            format="tokens",
            also=("npy",),
            arrays=True,
            schedule=(),
            bulk=True,
        )

    def test_a_view_needs_its_output(self, start: Callable[..., Any]) -> None:
        request = Request(outputs=("MASK",), parameters={"x-mpm-view": "tokens"})
        start().execute([request])
        assert request.error() == ("invalid", "X-MPM-View: expected MASK_PNG among the outputs, got MASK")

    def test_batch(self, start: Callable[..., Any]) -> None:
        model = start()
        request = Request(b"x", b"y", outputs=("MASK", "MASK_PNG"))
        model.execute([request])
        shapes = {tensor.name(): tensor.as_numpy().shape for tensor in request.response().tensors}
        assert shapes == {"MASK": (2, 2, 3), "MASK_PNG": (2, 1)}
        assert [data for data, _ in model._engine.seen] == [b"x", b"y"]

    def test_ragged_masks(self, start: Callable[..., Any]) -> None:
        model = start()
        request = Request(b"later 1", b"x", outputs=("MASK",))
        model.execute([request])
        answer(model._engine.later[b"later 1"], npy=np.zeros((5, 4), np.uint8))
        code, message = request.error()
        assert code == "invalid"
        assert "got 3x2, 4x5; ask for MASK_PNG" in message
        assert model._engine.ended == [400]

    def test_place_of_a_bad_picture_in_its_batch(self, start: Callable[..., Any]) -> None:
        request = Request(b"x", b"refuse", b"x")
        start().execute([request])
        assert request.error() == ("invalid", "picture 1 of 3: too large")


def test_unusable_configuration(start: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="unknown fields windos"):
        start(windos=3)


def test_numpy_that_this_triton_cannot_use(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with pytest.raises(RuntimeError, match=r"numpy: this Triton expects one below 2, got 2\.1\.0"):
        start()
