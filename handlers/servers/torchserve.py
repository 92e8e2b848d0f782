"""TorchServe's view of the engine. All that is peculiar to TorchServe's workers stays in this file."""

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import Any

from handlers.api.options import RequestOptions, request_id_from
from handlers.config import CONFIG_KEY, ServingConfig
from handlers.engine.loading import load_engine, warm_up_picture
from handlers.engine.request import Reply, Request, internal_error, only_reply
from handlers.errors import ErrorKind, ServingError
from handlers.launch.models import with_watch
from handlers.observe.tracing import make_tracing

from .draining import Drain

logger = logging.getLogger(__name__)

_REQUEST_ID_HEADER = "X-MPM-Request-Id"  # TorchServe overwrites X-Request-Id with an id of its own
_MAX_WAIT_SECONDS = 1.0  # well below TorchServe's responseTimeout
_PICTURE_NAMES = ("image", "body", "data")  # under which TorchServe hands over what was posted


class SegmenterHandler:
    """One engine behind TorchServe's continuous batching: requests join while others compute.

    TorchServe passes everything in flight at every call, and takes answers for some of it. A call
    returns when an answer is there, or when a group is through and new requests could be taken.
    `handle` never raises: an exception would fail every request of the batch.
    """

    def initialize(self, context: Any) -> None:
        """Load the model that lies beside the handler and warm it up."""
        logging.getLogger().setLevel(logging.WARNING)  # TorchServe's own worker logs three lines a batch
        logging.getLogger("handlers").setLevel(logging.INFO)
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"  # bodies stay bytes, whatever type they claim to be
        self._progress = threading.Event()
        self._pending: dict[str, Request] = {}
        folder = Path(context.system_properties["model_dir"])
        name = context.model_name
        config = with_watch(ServingConfig.from_mapping(context.model_yaml_config.get(CONFIG_KEY, {})), name)
        self._max_reply_bytes = config.max_reply_bytes
        self._tracing = make_tracing(name)
        self._drain = Drain(flush=self._tracing.close)
        self._engine = load_engine(
            folder,
            config,
            name=name,
            observer=lambda group, seconds: self._progress.set(),
            keeps_bodies=True,  # Java does, and hands them over again at every step
        )
        self._engine.warm_up([warm_up_picture()])
        _answer_only_what_is_there()
        logger.info("ready")

    def handle(self, data: list[dict[str, bytearray]], context: Any) -> list[bytes | None]:
        """Answer those requests of the batch that are done, None for the others.

        Statuses and headers go to the context.
        """
        job_ids = [context.get_request_id(i) for i in range(len(data))]
        for gone in self._pending.keys() - set(job_ids):
            self._pending.pop(gone).cancel()
        for i, job_id in enumerate(job_ids):
            if job_id not in self._pending:
                self._pending[job_id] = self._take(i, data[i], context)
                self._pending[job_id].add_done_callback(lambda _: self._progress.set())
        self._drain.end(self._pending.values())
        self._progress.wait(_MAX_WAIT_SECONDS)
        self._progress.clear()  # before looking: what happens from here on wakes the next call
        return [
            _answer(context, i, self._pending.pop(job_id)) if self._pending[job_id].done() else None
            for i, job_id in enumerate(job_ids)
        ]

    def _take(self, i: int, parts: Mapping[str, bytearray], context: Any) -> Request:
        arrived = monotonic()
        # Part headers share this mapping as dictionaries of their own.
        headers = {k.lower(): v for k, v in context.get_all_request_header(i).items() if isinstance(v, str)}
        request_id = request_id_from(headers, default=context.get_request_id(i))
        if self._drain.is_asked(headers):
            request = Request(request_id, arrived, math.inf)
            self._drain.begin(request)
            return request
        span = self._tracing.start(headers, request_id, arrived)
        request = self._engine.open(request_id, arrived=arrived, span=span, render=self._fitting_reply)
        with request.guarded():
            self._drain.check()
            options = RequestOptions.from_headers(headers, request_id)
            self._engine.take(request, [_image_bytes(parts)], options)
        return request

    def _fitting_reply(self, replies: Sequence[Reply]) -> Reply:
        """The reply, if TorchServe can pass it on: one that is longer than its limit would end the worker."""
        reply: Reply = only_reply(replies)
        if len(reply.body) > self._max_reply_bytes:
            raise ServingError(
                ErrorKind.TOO_LARGE,
                f"reply: expected at most {self._max_reply_bytes} bytes, got {len(reply.body)}; "
                "ask for a smaller picture, or for another form of reply",
            )
        return reply


def _answer_only_what_is_there() -> None:
    """Make TorchServe's reply builder leave out requests whose answer is None."""
    import ts.service  # a worker has it loaded; elsewhere it would leave a file open

    build = ts.service.create_predict_response

    def build_partial(ret: Any, req_id_map: dict[int, str], *args: Any, **kwargs: Any) -> Any:
        if ret is not None:
            req_id_map = {i: job_id for i, job_id in req_id_map.items() if ret[i] is not None}
        return build(ret, req_id_map, *args, **kwargs)

    ts.service.create_predict_response = build_partial


def _image_bytes(parts: Mapping[str, bytearray]) -> bytearray:
    """The picture among the parts of a request; a raw body is a part named `body`."""
    name = next((name for name in _PICTURE_NAMES if name in parts), None)
    if name is None:
        got = ", ".join(repr(name[:40]) for name in sorted(parts)[:5]) or "no part"
        raise ServingError(ErrorKind.BAD_REQUEST, f"expected the picture as body or as form part 'image', got {got}")
    return parts[name]


def _answer(context: Any, i: int, request: Request) -> bytes:
    try:
        return _succeed(context, i, request, request.result())
    except Exception as error:
        return _fail(context, i, request, error)


def _succeed(context: Any, i: int, request: Request, reply: Reply) -> bytes:
    steps = {**reply.seconds, "total": monotonic() - request.arrived}
    timings = [f"{step};dur={1000 * seconds:.2f}" for step, seconds in steps.items()]
    context.set_response_status(code=200, phrase="OK", idx=i)
    context.set_response_content_type(i, reply.media_type)
    context.set_response_header(i, _REQUEST_ID_HEADER, request.request_id)
    context.set_response_header(i, "Server-Timing", ", ".join(timings))
    context.set_response_header(i, "X-MPM-Tokens", f"in={reply.tokens[0]}, out={reply.tokens[-1]}")
    if reply.reduced_from is not None:
        height, width = reply.reduced_from
        context.set_response_header(i, "X-MPM-Reduced-From", f"{width}x{height}")
    return reply.body


def _fail(context: Any, i: int, request: Request, error: Exception) -> bytes:
    if not isinstance(error, ServingError):
        logger.error("a request failed", exc_info=error)
        error = internal_error()
    status = error.kind.http_status
    context.set_response_status(code=status, phrase=HTTPStatus(status).phrase, idx=i)
    context.set_response_content_type(i, "application/json")
    context.set_response_header(i, _REQUEST_ID_HEADER, request.request_id)
    if error.retry_after is not None:
        context.set_response_header(i, "Retry-After", str(error.retry_after))
    return error.body(request.request_id)
