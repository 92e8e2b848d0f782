"""Triton's view of the engine. All that is peculiar to Triton's Python backend stays in this file.

`execute` hands requests to the engine and returns; answers go out from the engine's threads, whenever they are
there. Triton asks four things of a model that does so: every request gets exactly one final response; nobody
touches a request after it (the whole server would end); `execute` never raises once a sender exists (the
same); and the model itself limits what is in flight, because only while `execute` blocks do requests
stay in Triton's queue, where its limits, timeouts and priorities hold.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml

from handlers.api.formats import FORMATS, MASKS
from handlers.api.headers import OPTION_HEADERS
from handlers.api.options import RequestOptions, request_id_from
from handlers.config import ServingConfig
from handlers.engine.loading import load_engine
from handlers.engine.request import Reply, Request
from handlers.errors import ErrorKind, ServingError
from handlers.launch.models import with_watch
from handlers.observe.tracing import make_tracing

logger = logging.getLogger(__name__)

INPUT = "IMAGE"
OUTPUTS = tuple(sorted(FORMATS[name].output for name in MASKS))
MAX_INFLIGHT_KEY = "max_inflight"  # a parameter in config.pbtxt

_FORMAT_OF = {FORMATS[name].output: name for name in MASKS}
_POLL_SECONDS = 0.05
_SHM = Path("/dev/shm")
_SHM_MARGIN_BYTES = 4 * 2**20
_sending = threading.Lock()  # one answer at a time lies in shared memory, until Triton has copied it


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
        logging.getLogger("handlers").setLevel(logging.INFO)
        folder = Path(args["model_repository"]) / args["model_version"]
        config = ServingConfig.from_mapping(yaml.safe_load((folder / "serving.yaml").read_text()) or {})
        config = with_watch(config, args["model_name"])
        parameters = json.loads(args["model_config"])["parameters"]
        self._gate = _Gate(int(parameters[MAX_INFLIGHT_KEY]["string_value"]))
        self._tracing = make_tracing(args["model_name"])
        name = args["model_name"]
        self._engine = load_engine(folder, config, name=name, keeps_bodies=True)  # in shared memory, until the end
        self._engine.warm_up([picture.read_bytes() for picture in sorted((folder.parent / "warmup").glob("*"))])
        self._open: dict[_Channel, Request] = {}
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()
        logger.info("ready")

    def execute(self, requests: Sequence[Any]) -> list[None]:
        """Take requests; blocks while too much is in flight."""
        for channel in [_Channel(request) for request in requests]:
            self._take(channel)
        return [None] * len(requests)

    def finalize(self) -> None:
        """Finish what was accepted, and stop."""
        self._engine.close()
        self._stopped.set()
        self._watcher.join()
        self._tracing.close()
        logger.info("stopped with %d pictures in flight", self._gate.inflight)

    def _take(self, channel: "_Channel") -> None:
        """Answer a request; it was read before its deadline can end it and send its response."""
        headers, outputs, wrong = channel.headers, channel.outputs, channel.error
        pictures, channel.pictures = channel.pictures, []  # the engine drops them when they are decoded
        num_pictures = len(pictures)
        request_id = request_id_from(headers, default=channel.request_id)
        request = self._engine.open(
            request_id,
            arrived=channel.arrived,
            timeout_seconds=channel.timeout_seconds,
            span=self._tracing.start(headers, request_id, channel.arrived),
            render=lambda replies: pb_utils.InferenceResponse(_tensors(replies, outputs)),
        )
        request.add_done_callback(channel.send)
        self._open[channel] = request
        request.add_done_callback(lambda _: self._open.pop(channel, None))
        with request.guarded():
            if wrong is not None:
                raise wrong
            options = _options(headers, outputs, request_id)
            if self._gate.enter(num_pictures, give_up=request.done):
                request.add_done_callback(lambda _: self._gate.leave(num_pictures))
                self._engine.take(request, pictures, options)

    def _watch(self) -> None:
        """Cancel requests whose client went away; Triton tells it only if asked."""
        while not self._stopped.wait(_POLL_SECONDS):
            for channel, request in list(self._open.items()):
                if channel.is_cancelled():
                    request.cancel()


class _Channel:
    """A request as it was read, and its one response. The lock keeps everyone off the request once that is out.

    Attributes:
        headers: its options by lower-case name.
        outputs: that it asks for.
        pictures: encoded.
        error: what makes it unusable; None if nothing does.
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._request = request
        self._lock = threading.Lock()
        self._sent = False
        self.arrived = monotonic()
        self.timeout_seconds = request.timeout() / 1e6  # from microseconds; 0 is none
        self.request_id = request_id_from({"x-request-id": request.request_id()}, default=str(uuid4()))
        self.headers: dict[str, str] = {}
        self.outputs: tuple[str, ...] = ()
        self.pictures: list[bytes] = []
        self.error: Exception | None = None
        try:
            self.headers = _headers(request)
            self.outputs = _outputs(request, self.headers)
            self.pictures = _pictures(request)
        except Exception as error:  # raised again where it ends the request
            self.error = error

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._sent and bool(self._request.is_cancelled())

    def send(self, answer: "Future[Any]") -> None:
        """Send what the request is answered with.

        Triton takes no second answer where the first failed, for want of shared memory. So where it may fail the end
        is sent apart: with no answer before it, it makes Triton answer an error of its own. Elsewhere the answer comes
        with its end, because an end apart ends Triton itself (SIGSEGV) if its gRPC request was cancelled.
        """
        response, final = _response(answer), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        with self._lock:
            self._sent = True
            with _sending:
                parts: list[dict[str, Any]] = [{"response": response, "flags": final}]
                if not response.has_error() and _num_bytes(response.output_tensors()) > _free_bytes():
                    parts = [{"response": response, "flags": 0}, {"flags": final}]
                for part in parts:
                    try:
                        self._sender.send(**part)
                    except Exception as error:
                        logger.error("request %s: the answer could not be sent: %s", self.request_id, error)
            del self._request, self._sender


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

    def leave(self, num_pictures: int) -> None:
        with self._changed:
            self.inflight -= num_pictures
            self._changed.notify_all()


def _headers(request: Any) -> dict[str, str]:
    """Options by lower-case name, from parameters and from the HTTP headers that Triton passes on as such."""
    headers = {}
    try:
        parameters = json.loads(request.parameters() or "{}")
    except ValueError:
        raise ServingError(ErrorKind.BAD_REQUEST, "headers and parameters: expected UTF-8, got other bytes") from None
    for name, value in parameters.items():
        if name.lower() not in OPTION_HEADERS:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"parameters: expected some of {', '.join(OPTION_HEADERS)}, got {name[:40]!r}"
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
    form = FORMATS[options.format]
    if form.is_view and form.output not in outputs:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"X-MPM-View: expected {form.output} among the outputs, got {', '.join(outputs)}"
        )
    first = form.output if form.is_view else outputs[0]
    also = tuple(_FORMAT_OF[name] for name in outputs if name != first)
    chosen = options.format if form.is_view else _FORMAT_OF[first]
    return replace(options, format=chosen, media_type="", also=also, arrays=True)


def _pictures(request: Any) -> list[bytes]:
    tensor = pb_utils.get_input_tensor_by_name(request, INPUT)
    values, shape = tensor.as_numpy().ravel(), list(tensor.shape())
    if shape != [len(values), 1]:  # which Triton doesn't compare with what came
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"{INPUT}: expected shape [pictures, 1], as many as came ({len(values)}), got {shape}",
        )
    return [bytes(value) for value in values]


def _tensors(replies: Sequence[Reply], outputs: Sequence[str]) -> list[Any]:
    """Outputs of [pictures, ...] each."""
    tensors = []
    for output in outputs:
        bodies = [_body(reply, output) for reply in replies]
        arrays = isinstance(bodies[0], np.ndarray)
        values = _stack(bodies) if arrays else np.array([[body] for body in bodies], dtype=np.object_)
        tensors.append(pb_utils.Tensor(output, values))
    _check_room(_num_bytes(tensors))
    return tensors


def _num_bytes(tensors: Sequence[Any]) -> int:
    arrays = [tensor.as_numpy() for tensor in tensors]
    return sum(sum(map(len, each.ravel())) if each.dtype == object else each.nbytes for each in arrays)


def _free_bytes() -> int:
    """By how much a region of shared memory may grow, with some to spare."""
    free = os.statvfs(_SHM)
    return int(free.f_bavail * free.f_frsize) - _SHM_MARGIN_BYTES


def _check_room(size: int) -> None:
    """Refuse an answer of more bytes than this model's region of shared memory and what it may grow by."""
    region = _SHM / Path("/proc/self/cmdline").read_text().split("\0")[2]  # as Triton calls this process
    room = _free_bytes() + (region.stat().st_size if region.is_file() else 0)
    if size > room:
        raise ServingError(
            ErrorKind.OVERLOADED,
            f"reply: expected at most the {room} bytes that {_SHM} has for it, got {size}; ask for MASK_PNG, or for a "
            "smaller picture, or give the server more",
        )


def _body(reply: Reply, output: str) -> Any:
    return next(body for name, body in reply.bodies.items() if FORMATS[name].output == output)


def _stack(masks: Sequence[np.ndarray]) -> np.ndarray:
    sizes = sorted({f"{width}x{height}" for height, width in (mask.shape for mask in masks)})
    if len(sizes) > 1:
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"MASK: expected pictures of one size in a batch, got {', '.join(sizes[:4])}; "
            "ask for MASK_PNG, or send them one by one",
        )
    return np.stack(masks)


def _response(answer: "Future[Any]") -> Any:
    if answer.cancelled():
        return _refusal("cancelled", "CANCELLED")
    error = answer.exception()
    if isinstance(error, ServingError):
        return _refusal(str(error), error.kind.triton_code)
    return answer.result()


def _refusal(message: str, code: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))
