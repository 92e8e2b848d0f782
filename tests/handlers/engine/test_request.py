"""A request ends once, whoever ends it, and its end is on record before anybody has the answer."""

import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import pytest

from handlers.api.replies import SegmentReply
from handlers.engine.request import Exchange
from handlers.errors import ErrorKind, ServingError
from handlers.observe.tracing import RequestSpan

REPLY = SegmentReply(b"png", "image/png", (4, 2), {"compute": 0.5}, 1)
REFUSED = ServingError(ErrorKind.TOO_LARGE, "too large")


class Span(RequestSpan):
    def __init__(self) -> None:
        self.codes: list[int] = []

    def end(self, code: int) -> None:
        self.codes.append(code)


class Watched:
    """An exchange, and what was recorded of its end."""

    def __init__(self, num_pictures: int = 1, **options: Any) -> None:
        self.span = Span()
        self.ends: list[tuple[int, int]] = []
        self.parts: list[Future[SegmentReply]] = [Future() for _ in range(num_pictures)]
        now = time.monotonic()
        self.exchange = Exchange("mine", now, now + 2, span=self.span, on_end=self.note, **options)
        self.exchange.gather(self.parts)

    def note(self, exchange: Exchange, code: int, replies: Sequence[SegmentReply]) -> None:
        assert exchange.answer.cancelled() or not exchange.answer.done(), "whoever has the answer finds it counted"
        self.ends.append((code, len(replies)))


def test_answered_with_its_last_picture() -> None:
    watched = Watched(3, render=lambda replies: [reply.body for reply in replies])
    for i in (1, 0, 2):
        assert not watched.exchange.answer.done()
        watched.parts[i].set_result(REPLY)
    assert watched.exchange.answer.result(0) == [b"png"] * 3
    assert watched.ends == [(200, 3)]
    assert watched.span.codes == [200]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (REFUSED, 413, "picture 1 of 3: too large"),
        (TypeError("secret"), 500, "the request failed inside the server"),
    ],
)
def test_fails_with_its_first_picture(error: Exception, code: int, told: str) -> None:
    watched = Watched(3)
    watched.parts[1].set_exception(error)
    with pytest.raises(ServingError) as caught:
        watched.exchange.answer.result(0)
    assert (caught.value.kind.http_status, str(caught.value)) == (code, told)
    assert watched.parts[0].cancelled()
    assert watched.parts[2].cancelled()
    assert watched.ends == [(code, 0)]
    assert watched.span.codes == [code]


@pytest.mark.parametrize(("error", "code"), [(ServingError(ErrorKind.BAD_REQUEST, "ragged"), 400), (KeyError(), 500)])
def test_replies_that_cannot_be_rendered(error: Exception, code: int) -> None:
    def render(_: Sequence[SegmentReply]) -> None:
        raise error

    watched = Watched(render=render)
    watched.parts[0].set_result(REPLY)
    assert watched.ends == [(code, 0)]


def test_late() -> None:
    watched = Watched()
    watched.exchange.expire()
    error = watched.exchange.answer.exception(0)
    assert isinstance(error, ServingError)
    assert (error.kind, str(error)) == (ErrorKind.DEADLINE, "not answered within 2 s")
    assert watched.parts[0].cancelled()
    assert watched.ends == [(504, 0)]


@pytest.mark.parametrize("whose", ["answer", "exchange", "picture"])
def test_given_up(whose: str) -> None:
    watched = Watched(2)
    ends = {"answer": watched.exchange.answer.cancel, "exchange": watched.exchange.cancel}
    ends.get(whose, watched.parts[0].cancel)()
    assert all(part.cancelled() for part in watched.parts)
    assert [code for code, _ in watched.ends] == [499]
    with pytest.raises(CancelledError):
        watched.exchange.answer.result(0)


def test_pictures_of_one_that_has_ended_are_dropped() -> None:
    watched = Watched()
    watched.exchange.fail(REFUSED)
    late: Future[SegmentReply] = Future()
    watched.exchange.gather([late])
    assert late.cancelled()
    assert watched.ends == [(413, 0)]


def test_many_ends_at_once_are_one() -> None:
    for _ in range(100):
        watched = Watched()
        exchange, barrier = watched.exchange, threading.Barrier(4)

        def end(act: Callable[[], object], barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            act()

        refuse = partial(exchange.fail, REFUSED)
        acts: list[Callable[[], object]] = [exchange.expire, exchange.cancel, exchange.answer.cancel, refuse]
        threads = [threading.Thread(target=end, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(watched.span.codes) == 1
        assert exchange.answer.done()


def test_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="handlers")
    for watched, end in ((Watched(), REPLY), (Watched(), REFUSED)):
        part = watched.parts[0]
        part.set_result(end) if isinstance(end, SegmentReply) else part.set_exception(end)
        watched.exchange.expire()
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["request_id"], line["code"], line.get("error")) for line in lines] == [
        ("mine", 200, None),
        ("mine", 413, "too large"),
    ]
    assert lines[0]["tokens"] == [4, 2]


def test_who_keeps_the_answer_keeps_nothing_else() -> None:
    gc.disable()  # a cycle would hold pixels until the collector comes by
    try:
        exchange, part = Exchange("mine", 0, 1), Future[SegmentReply]()
        exchange.gather([part])
        part.set_result(REPLY)
        answer, dropped = exchange.answer, weakref.ref(exchange)
        del exchange, part
        assert answer.done()
        assert dropped() is None
    finally:
        gc.enable()
