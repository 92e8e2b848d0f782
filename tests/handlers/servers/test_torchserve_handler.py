"""The handler alone, between TorchServe's own context and an engine that does what it is told."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
import yaml
from making import BREAKS, break_decoding, make_picture

from handlers.api.formats.views import encode_picture
from handlers.api.options import RequestOptions
from handlers.config import CONFIG_KEY
from handlers.engine import loading
from handlers.engine.request import Picture, Reply, Request
from handlers.errors import ErrorKind, ServingError
from handlers.launch.drain import DRAIN_HEADER, DRAIN_SECRET_VARIABLE
from handlers.observe.tracing import RequestSpan
from handlers.servers import torchserve as torchserve_handler
from handlers.servers.torchserve import SegmenterHandler

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it leaves its version file open
    import ts.service
    from ts.context import Context, RequestProcessor
    from ts.protocol.otf_message_handler import create_predict_response

pytest_plugins = ("tiny_server",)


OK = Reply({"png": b"ok"}, "image/png", (64, 40, 30), {"decode": 0.001, "merge": 0.2}, 1)


class ObedientEngine:
    """Answers `b"ok"`; a body that names an error gets it, and one that begins with `later` waits."""

    def __init__(self, *_: Any, observer: Callable[[Any, float], None], **__: Any) -> None:
        self.seen: list[tuple[bytes, RequestOptions]] = []
        self.later: dict[bytes, Picture] = {}
        self.end_group = lambda: observer(None, 0.0)

    def warm_up(self, pictures: Iterable[bytes]) -> None:
        """Nothing here is cold."""

    def open(self, request_id: str, *, arrived: float, span: RequestSpan, render: Any) -> Request:
        return Request(request_id, arrived, arrived + 60, span=span, render=render)

    def take(self, request: Request, pictures: Sequence[bytes], options: RequestOptions) -> None:
        (data,) = pictures
        self.seen.append((bytes(data), options))
        picture = make_picture(request=request)
        request.begin([picture])
        if data == b"raise":
            raise RuntimeError("submitting failed")
        if data.startswith(b"later"):
            self.later[bytes(data)] = picture
        elif data == b"refuse":
            picture.fail(ServingError(ErrorKind.TOO_LARGE, "too\r\nlarge"))
        else:
            request.complete(picture, OK)


def answer(picture: Picture) -> None:
    picture.request.complete(picture, OK)


@pytest.fixture(autouse=True)
def _own_process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `initialize` sets for its whole process is set back."""
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    monkeypatch.setattr(ts.service, "create_predict_response", create_predict_response)
    loggers = [logging.getLogger(name) for name in ("", "handlers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def initialized(checkpoint: Path) -> Callable[[SegmenterHandler], SegmenterHandler]:
    """Initializes a handler as TorchServe does."""

    def initialize(handler: SegmenterHandler) -> SegmenterHandler:
        context = Context("tiny", str(checkpoint.parent), {}, 8, None, "0.12.0")
        context.model_yaml_config = yaml.safe_load(f"{CONFIG_KEY}: {{schedule: [1]}}")
        handler.initialize(context)
        return handler

    return initialize


@pytest.fixture
def handler(
    initialized: Callable[[SegmenterHandler], SegmenterHandler], monkeypatch: pytest.MonkeyPatch
) -> SegmenterHandler:
    monkeypatch.setattr(loading, "Engine", ObedientEngine)
    monkeypatch.setattr(torchserve_handler, "_MAX_WAIT_SECONDS", 30)
    return initialized(SegmenterHandler())


def batch_of(*headers: dict[str, Any], ids: Sequence[str] = ()) -> Context:
    """TorchServe's context of a batch, given the headers of each request."""
    context = Context("tiny", ".", {}, len(headers), None, "0.12.0")
    context.request_ids = dict(enumerate(ids or [f"own-{i}" for i in range(len(headers))]))
    context.request_processor = [RequestProcessor(h) for h in headers]
    return context


def body(data: bytes) -> dict[str, bytearray]:
    return {"body": bytearray(data)}


def engine_of(handler: SegmenterHandler) -> ObedientEngine:
    engine: Any = handler._engine
    assert isinstance(engine, ObedientEngine)
    return engine


def test_a_failure_is_one_request_s_own(handler: SegmenterHandler) -> None:
    context = batch_of({}, {}, {}, {"Accept": "text/html"}, {})
    data = [body(b"x"), body(b"raise"), body(b"refuse"), body(b"x"), body(b"x")]
    replies = handler.handle(data, context)

    statuses = [context.get_response_status(i)[0] for i in range(5)]
    assert statuses == [200, 500, 413, 406, 200]
    assert replies[0] == replies[4] == b"ok"
    for i in range(1, 4):
        told = json.loads(replies[i] or b"")
        assert told["code"] == statuses[i]
        assert told["request_id"] == f"own-{i}"
        assert context.get_response_content_type(i) == "application/json"
    assert json.loads(replies[1] or b"")["error"] == "the request failed inside the server"


def test_headers_of_an_answer(handler: SegmenterHandler) -> None:
    context = batch_of({"X-Request-Id": "mine"})
    handler.handle([body(b"x")], context)
    headers = context.get_response_headers(0)
    assert headers["X-MPM-Request-Id"] == "mine"
    assert headers["X-MPM-Tokens"] == "in=64, out=30"
    assert re.fullmatch(r"decode;dur=1\.00, merge;dur=200\.00, total;dur=[\d.]+", headers["Server-Timing"])
    assert context.get_response_content_type(0) == "image/png"


@pytest.mark.parametrize("evil", ["a\r\nX-Evil: 1", "\x00", "é", "\U0001f600", "x" * 100_000, ""])
def test_replies_are_safe_to_encode(handler: SegmenterHandler, evil: str) -> None:
    """A header that is no string or holds a line break would end the worker."""
    context = batch_of(*({name: evil} for name in ("X-Request-Id", "Accept", "X-MPM-View")))
    replies = handler.handle([body(b"x") for _ in range(3)], context)
    for i in range(3):
        headers = context.get_response_headers(i)
        assert all(isinstance(value, str) and value.isprintable() and value.isascii() for value in headers.values())
        assert headers["X-MPM-Request-Id"] == f"own-{i}"
    assert create_predict_response(replies, context.request_ids, "", 200, context=context)


@pytest.mark.parametrize("name", ["image", "body", "data"])
def test_names_of_the_picture(handler: SegmenterHandler, name: str) -> None:
    handler.handle([{name: bytearray(b"x"), "other": bytearray(b"y")}], batch_of({}))
    assert engine_of(handler).seen[-1][0] == b"x"


@pytest.mark.parametrize("parts", [{}, {"picture": bytearray(b"x")}, {"\r\n" * 100: bytearray(b"x")}])
def test_no_picture_among_the_parts(handler: SegmenterHandler, parts: dict[str, bytearray]) -> None:
    context = batch_of({})
    (reply,) = handler.handle([parts], context)
    assert context.get_response_status(0)[0] == 400
    assert "form part 'image'" in json.loads(reply or b"")["error"]


def test_a_part_is_no_header(handler: SegmenterHandler) -> None:
    """TorchServe keeps the content types of parts among the headers, under the names of the parts."""
    part = {"content-type": "application/x-npy"}
    context = batch_of({"accept": part, "x-mpm-view": part, "X-Request-Id": part, "Accept": "application/json"})
    handler.handle([body(b"x")], context)
    _, options = engine_of(handler).seen[-1]
    assert options == RequestOptions(request_id="own-0", format="json")


def test_a_reply_that_would_end_the_worker(handler: SegmenterHandler) -> None:
    handler._max_reply_bytes = 1
    context = batch_of({})
    (reply,) = handler.handle([body(b"x")], context)
    assert context.get_response_status(0)[0] == 413
    assert "reply: expected at most 1 bytes, got 2;" in json.loads(reply or b"")["error"]


def test_the_model_beside_the_handler(initialized: Callable[[SegmenterHandler], SegmenterHandler]) -> None:
    handler = initialized(SegmenterHandler())
    context = batch_of({"Accept": "application/json"})
    picture = encode_picture(np.zeros((20, 30, 3), np.uint8), "image/png")
    while (reply := handler.handle([body(picture)], context)[0]) is None:
        """Groups are through, and the picture is not."""
    handler._engine.close()
    told = json.loads(reply or b"")
    assert (told["height"], told["width"]) == (20, 30)
    assert all(described["name"].startswith("thing") for described in told["classes"])


def test_a_picture_that_breaks_the_engine_fails_alone(
    initialized: Callable[[SegmenterHandler], SegmenterHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = initialized(SegmenterHandler())
    break_decoding(monkeypatch)
    waiting = {f"own-{i}": body(encode_picture(np.zeros((size, 30, 3), np.uint8), "image/png"))
               for i, size in enumerate((20, BREAKS, 24))}  # fmt: skip
    told: dict[str, tuple[int, bytes]] = {}
    while waiting:
        context = batch_of(*({} for _ in waiting), ids=list(waiting))
        replies = handler.handle(list(waiting.values()), context)
        for i, (name, reply) in enumerate(zip(list(waiting), replies, strict=True)):
            if reply is not None:
                told[name] = context.get_response_status(i)[0], reply
                del waiting[name]
    handler._engine.close()
    assert {name: status for name, (status, _) in told.items()} == {"own-0": 200, "own-1": 500, "own-2": 200}
    error = {"code": 500, "error": "the request failed inside the server", "request_id": "own-1"}
    assert json.loads(told["own-1"][1]) == error


def test_unusable_configuration(checkpoint: Path) -> None:
    context = Context("tiny", str(checkpoint.parent), {}, 8, None, "0.12.0")
    context.model_yaml_config = {CONFIG_KEY: {"windos": 3}}
    with pytest.raises(ValueError, match="unknown fields windos"):
        SegmenterHandler().initialize(context)


@pytest.fixture
def drain(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The headers of the launcher's request for a drain."""
    monkeypatch.setenv(DRAIN_SECRET_VARIABLE, "secret")
    return {DRAIN_HEADER: "secret"}


class TestContinuous:
    def test_a_drain_is_answered_after_the_last_before_it(
        self, handler: SegmenterHandler, drain: dict[str, str]
    ) -> None:
        engine = engine_of(handler)
        data, ids = [body(b"later"), body(b"drain"), body(b"x")], ["a", "b", "c"]
        context = batch_of({}, drain, {}, ids=ids)
        replies = handler.handle(data, context)
        assert replies[:2] == [None, None]
        assert context.get_response_status(2)[0] == 503
        answer(engine.later[b"later"])
        assert handler.handle(data[:2], batch_of({}, drain, ids=ids[:2])) == [b"ok", None]
        assert handler.handle(data[1:2], batch_of(drain, ids=ids[1:2])) == [b"drained\n"]

    def test_a_drain_of_nothing_is_answered_at_once(self, handler: SegmenterHandler, drain: dict[str, str]) -> None:
        start = perf_counter()
        assert handler.handle([body(b"drain")], batch_of(drain, ids=["a"])) == [b"drained\n"]
        assert perf_counter() - start < 5  # and not when the wait of 30 seconds ends

    def test_only_what_is_done_is_answered(self, handler: SegmenterHandler) -> None:
        data = [body(b"later 1"), body(b"x"), body(b"raise"), body(b"later 2")]
        context = batch_of({}, {}, {}, {}, ids=["a", "b", "c", "d"])
        replies = handler.handle(data, context)
        assert replies[0] is replies[3] is None
        assert replies[1] == b"ok"
        assert replies[2]
        assert json.loads(replies[2])["request_id"] == "c"
        sent = ts.service.create_predict_response(replies, context.request_ids, "", 200, context=context)
        in_message = [job_id for job_id in "abcd" if b"\0\0\0\1" + job_id.encode() in sent]
        assert in_message == ["b", "c"]

        answer(engine_of(handler).later[b"later 2"])
        assert handler.handle([data[0], data[3]], batch_of({}, {}, ids=["a", "d"])) == [None, b"ok"]
        answer(engine_of(handler).later[b"later 1"])
        assert handler.handle([data[0]], batch_of({}, ids=["a"])) == [b"ok"]

    def test_a_body_that_comes_again_is_not_submitted_again(self, handler: SegmenterHandler) -> None:
        before = len(engine_of(handler).seen)
        for _ in range(3):
            engine_of(handler).end_group()
            assert handler.handle([body(b"later")], batch_of({}, ids=["a"])) == [None]
        assert len(engine_of(handler).seen) == before + 1

    def test_what_happens_between_two_calls_wakes_the_next(self, handler: SegmenterHandler) -> None:
        engine = engine_of(handler)
        engine.end_group()
        assert handler.handle([body(b"later")], batch_of({}, ids=["a"])) == [None]
        start = perf_counter()
        engine.end_group()
        assert handler.handle([body(b"later")], batch_of({}, ids=["a"])) == [None]
        answer(engine.later[b"later"])
        assert handler.handle([body(b"later")], batch_of({}, ids=["a"])) == [b"ok"]
        assert perf_counter() - start < 5  # and not when the wait of 30 seconds ends

    def test_an_answer_ends_the_wait(self, handler: SegmenterHandler) -> None:
        engine = engine_of(handler)
        with ThreadPoolExecutor(1) as server:
            step = server.submit(handler.handle, [body(b"later")], batch_of({}, ids=["a"]))
            while b"later" not in engine.later:
                sleep(0.001)
            answer(engine.later[b"later"])
            step_end = step.result(timeout=5)
        assert step_end in ([b"ok"], [None])  # None: the answer came as the wait began
        if step_end == [None]:
            assert handler.handle([body(b"later")], batch_of({}, ids=["a"])) == [b"ok"]

    def test_requests_that_went_away_are_cancelled(self, handler: SegmenterHandler) -> None:
        engine = engine_of(handler)
        engine.end_group()
        assert handler.handle([body(b"later 1"), body(b"later 2")], batch_of({}, {}, ids=["a", "b"])) == [None] * 2
        assert handler.handle([body(b"x")], batch_of({}, ids=["c"])) == [b"ok"]
        assert all(picture.request.cancelled() for picture in engine.later.values())
