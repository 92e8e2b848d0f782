"""Triton's view of the engine. All that is peculiar to Triton's Python backend stays in this file.

`execute` hands work to the engine and returns; answers go out from the engine's threads, whenever they are
there. Triton asks four things of a model that does so: every request gets exactly one final response; nobody
touches a request after it (the whole server would end); `execute` never raises once a sender exists (the
same); and the model itself limits what is in flight, because only while `execute` blocks do requests
stay in Triton's queue, where its limits, timeouts and priorities hold.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml

from .config import ServingConfig
from .errors import ErrorKind, ServingError
from .frames import read_header
from .journal import describe_request
from .loading import load_engine
from .options import RequestOptions, request_id_from
from .replies import SegmentReply
from .tracing import CONTEXT_HEADERS, NO_SPAN, RequestSpan, make_tracing

logger = logging.getLogger(__name__)

INPUT = "IMAGE"
OUTPUTS = {"MASK": "application/x-npy", "MASK_PNG": "image/png", "RESULT_JSON": "application/json"}
MAX_INFLIGHT_KEY = "max_inflight"  # a parameter in config.pbtxt

_VIEWED = "MASK_PNG"  # the output that holds a view, where one is asked for
_OPTIONS = ("x-mpm-outputs", "x-mpm-priority", "x-mpm-schedule", "x-mpm-view", "x-request-id", *CONTEXT_HEADERS)
_POLL_SECONDS = 0.05


class TritonPythonModel:
    """One engine behind one version of a model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the version's folder, and answer the pictures in the model's folder `warmup`.

        Triton could do the latter itself, but would end if one was refused, and other models with it.

        Raises:
            OSError, ValueError, RuntimeError, ServingError: what is there, or the numpy at hand, can't be served.
        """
        if int(np.__version__.partition(".")[0]) > 1:
            raise RuntimeError(f"numpy: this Triton expects one below 2, got {np.__version__}")
        logging.basicConfig(format="%(message)s")
        logging.getLogger(__package__).setLevel(logging.INFO)
        folder = Path(args["model_repository"]) / args["model_version"]
        config = ServingConfig.from_mapping(yaml.safe_load((folder / "serving.yaml").read_text()) or {})
        parameters = json.loads(args["model_config"])["parameters"]
        self._deadline_seconds = config.deadline_seconds
        self._gate = _Gate(int(parameters[MAX_INFLIGHT_KEY]["string_value"]))
        self._tracing = make_tracing(args["model_name"])
        self._engine = load_engine(folder, config, name=args["model_name"])
        self._engine.warm_up([picture.read_bytes() for picture in sorted((folder.parent / "warmup").glob("*"))])
        self._exchanges: set[_Exchange] = set()
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()
        logger.info("ready: schedule %s, align %d", config.schedule, config.align)

    def execute(self, requests: Sequence[Any]) -> list[None]:
        """Take requests; blocks while too much is in flight."""
        exchanges = [_Exchange(request, self._deadline_seconds) for request in requests]
        self._exchanges.update(exchanges)
        for exchange in exchanges:
            try:
                self._take(exchange)
            except ServingError as error:
                self._engine.refuse(error, exchange.request_id, exchange.span)
                self._fail(exchange, error)
            except Exception as error:
                self._fail(exchange, error)
        return [None] * len(requests)

    def finalize(self) -> None:
        """Finish what was accepted, and stop."""
        self._engine.close()
        self._stopped.set()
        self._watcher.join()
        self._tracing.close()
        logger.info("stopped with %d pictures in flight", self._gate.inflight)

    def _take(self, exchange: "_Exchange") -> None:
        with exchange.asked() as request:
            if request is None:
                return
            headers = _headers(request)
            exchange.request_id = request_id_from(headers, default=exchange.request_id)
            exchange.span = self._tracing.start(headers, exchange.request_id, exchange.arrived)
            exchange.outputs = _outputs(request, headers)
            options = _options(headers, exchange.outputs, exchange.request_id)
            pictures = _pictures(request)
        if not self._gate.enter(len(pictures), give_up=lambda: exchange.done):
            return
        for i, picture in enumerate(pictures):
            name = exchange.request_id if len(pictures) == 1 else f"{exchange.request_id}:{i}"
            answer = self._submit(picture, replace(options, request_id=name), exchange.span)
            answer.add_done_callback(lambda _: self._gate.leave())
            exchange.answers.append(answer)
        for answer in exchange.answers:
            answer.add_done_callback(lambda answer: self._on_answer(exchange, answer))
        if exchange.done:  # it ended in between, without these
            exchange.cancel_work()

    def _submit(self, picture: bytes, options: RequestOptions, span: RequestSpan) -> "Future[SegmentReply]":
        try:
            return self._engine.submit(picture, options, span)
        except Exception as error:
            failed: Future[SegmentReply] = Future()
            failed.set_exception(error)
            return failed

    def _on_answer(self, exchange: "_Exchange", answer: "Future[SegmentReply]") -> None:
        """One picture of a request is through; called in the engine's threads, or at once."""
        if answer.cancelled():  # by the end of its exchange
            return
        try:
            answer.result()
            if exchange.is_last_answer():
                replies = [answer.result() for answer in exchange.answers]
                response = pb_utils.InferenceResponse(_tensors(replies, exchange.outputs))
                self._end(exchange, 200, response, replies=replies)
        except ServingError as error:
            self._fail(exchange, _of_picture(error, exchange.answers.index(answer), len(exchange.answers)))
        except Exception as error:
            self._fail(exchange, error)

    def _fail(self, exchange: "_Exchange", error: Exception) -> None:
        if not isinstance(error, ServingError):
            logger.error("a request failed", exc_info=error)
            error = ServingError(ErrorKind.INTERNAL, "the request failed inside the server")
        code = getattr(pb_utils.TritonError, error.kind.triton_code)
        self._end(exchange, error.kind.http_status, _refusal(str(error), code), error=str(error))

    def _end(self, exchange: "_Exchange", code: int, response: Any, **told: Any) -> None:
        if not exchange.answer(response):
            return
        self._exchanges.discard(exchange)
        exchange.cancel_work()
        exchange.span.end(code)
        seconds = monotonic() - exchange.arrived
        logger.info(describe_request(exchange.request_id, code, seconds, trace_id=exchange.span.trace_id, **told))

    def _watch(self) -> None:
        """Deadlines hold and cancelled work is dropped even when nothing else moves."""
        while not self._stopped.wait(_POLL_SECONDS):
            now = monotonic()
            for exchange in list(self._exchanges):
                if now > exchange.deadline:
                    seconds = exchange.deadline - exchange.arrived
                    self._fail(exchange, ServingError(ErrorKind.DEADLINE, f"not answered within {seconds:g} s"))
                elif exchange.is_cancelled():
                    self._end(exchange, 499, _refusal("cancelled", pb_utils.TritonError.CANCELLED))


class _Exchange:
    """One request and its one response. The lock keeps everyone off the request once its response is out."""

    def __init__(self, request: Any, deadline_seconds: float) -> None:
        self._sender = request.get_response_sender()
        self._request = request
        self._lock = threading.Lock()
        self._num_answered = 0
        self.done = False
        self.arrived = monotonic()
        wanted = request.timeout() / 1e6  # microseconds; 0 is none
        self.deadline = self.arrived + (min(wanted, deadline_seconds) if wanted else deadline_seconds)
        self.request_id = request_id_from({"x-request-id": request.request_id()}, default=str(uuid4()))
        self.span: RequestSpan = NO_SPAN
        self.outputs: tuple[str, ...] = ()
        self.answers: list[Future[SegmentReply]] = []

    @contextmanager
    def asked(self) -> Iterator[Any]:
        """The request for a while, None if it is answered already."""
        with self._lock:
            yield None if self.done else self._request

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self.done and bool(self._request.is_cancelled())

    def is_last_answer(self) -> bool:
        """Count one picture; True at the last."""
        with self._lock:
            self._num_answered += 1
            return self._num_answered == len(self.answers)

    def answer(self, response: Any) -> bool:
        """Send the response unless there was one before; what can't be sent becomes an error."""
        with self._lock:
            if self.done:
                return False
            self.done = True
            for attempt in (response, _refusal("the answer could not be sent", pb_utils.TritonError.INTERNAL)):
                try:
                    self._sender.send(attempt, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                    break
                except Exception:  # no room in shared memory, for one
                    logger.exception("request %s: the answer could not be sent", self.request_id)
            del self._request, self._sender
            return True

    def cancel_work(self) -> None:
        for answer in self.answers:
            answer.cancel()


class _Gate:
    """Counts pictures in flight, and blocks beyond the most there may be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.inflight = 0
        self._changed = threading.Condition()

    def enter(self, num_pictures: int, *, give_up: Callable[[], bool]) -> bool:
        """Wait for room, which an empty gate always has; False if there is no point any more."""
        with self._changed:
            while self.inflight and self.inflight + num_pictures > self._most:
                if give_up():
                    return False
                self._changed.wait(_POLL_SECONDS)
            self.inflight += num_pictures
            return True

    def leave(self) -> None:
        with self._changed:
            self.inflight -= 1
            self._changed.notify_all()


def _headers(request: Any) -> dict[str, str]:
    """Options by lower-case name, from parameters and from the HTTP headers that Triton passes on as such."""
    headers = {}
    for name, value in json.loads(request.parameters() or "{}").items():
        if name.lower() not in _OPTIONS:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"parameters: expected some of {', '.join(_OPTIONS)}, got {name[:40]!r}"
            )
        if not isinstance(value, str):
            raise ServingError(ErrorKind.BAD_REQUEST, f"{name}: expected text, got {value!r}")
        headers[name.lower()] = value
    return headers


def _outputs(request: Any, headers: Mapping[str, str]) -> tuple[str, ...]:
    """Of what Triton was asked for, what X-MPM-Outputs leaves: a request without JSON can't choose otherwise."""
    asked = [name for name in OUTPUTS if name in request.requested_output_names()]
    if "x-mpm-outputs" not in headers:
        return tuple(asked)
    wanted = [name.strip() for name in headers["x-mpm-outputs"].split(",")]
    unknown = [name for name in wanted if name not in asked]
    if unknown:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"X-MPM-Outputs: expected some of {', '.join(asked)}, got {unknown[0][:40]!r}"
        )
    return tuple(name for name in asked if name in wanted)


def _options(headers: Mapping[str, str], outputs: Sequence[str], request_id: str) -> RequestOptions:
    options = RequestOptions.from_headers(headers, request_id)
    if options.view is not None and _VIEWED not in outputs:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"X-MPM-View: expected {_VIEWED} among the outputs, got {', '.join(outputs)}"
        )
    first = _VIEWED if options.view is not None else outputs[0]
    also = tuple(OUTPUTS[name] for name in outputs if name != first)
    return replace(options, media_type=OUTPUTS[first], also=also)


def _pictures(request: Any) -> list[bytes]:
    values = pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy().ravel()
    return [bytes(value) for value in values]


def _tensors(replies: Sequence[SegmentReply], outputs: Sequence[str]) -> list[Any]:
    """Outputs of [pictures, ...] each."""
    tensors = []
    for name in outputs:
        bodies = [{reply.media_type: reply.body, **reply.also}[OUTPUTS[name]] for reply in replies]
        if name == "MASK":
            tensors.append(pb_utils.Tensor(name, _stack([_labels(body) for body in bodies])))
        else:
            tensors.append(pb_utils.Tensor(name, np.array([[body] for body in bodies], dtype=np.object_)))
    return tensors


def _labels(npy: bytes) -> np.ndarray:
    header = read_header(npy)
    return np.frombuffer(npy, header.descr, offset=header.offset).reshape(header.shape)


def _stack(masks: Sequence[np.ndarray]) -> np.ndarray:
    sizes = sorted({f"{width}x{height}" for height, width in (mask.shape for mask in masks)})
    if len(sizes) > 1:
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"MASK: expected pictures of one size in a batch, got {', '.join(sizes[:4])}; "
            "ask for MASK_PNG, or send them one by one",
        )
    return np.stack(masks)


def _of_picture(error: ServingError, index: int, num_pictures: int) -> ServingError:
    """The error with the picture's place, where there are several."""
    if num_pictures == 1:
        return error
    return ServingError(error.kind, f"picture {index} of {num_pictures}: {error}", retry_after=error.retry_after)


def _refusal(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
