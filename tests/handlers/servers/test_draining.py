"""A drain is answered last, with what came before it; what comes after it is refused."""

import math
import threading
import time

import pytest

from handlers.engine.request import Request
from handlers.errors import ErrorKind, ServingError
from handlers.launch.drain import DRAIN_HEADER, DRAIN_SECRET_VARIABLE
from handlers.servers.draining import Drain

WAIT_SECONDS = 10
ASKED = {DRAIN_HEADER.lower(): "secret"}


def ask(drain: Drain) -> Request:
    assert drain.is_asked(ASKED)
    request = Request("drain", time.monotonic(), math.inf)
    drain.begin(request)
    return request


def wait_for(event: threading.Event) -> None:
    event.wait(WAIT_SECONDS)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DRAIN_SECRET_VARIABLE, "secret")


def test_it_is_answered_when_nothing_else_is_pending() -> None:
    drain = Drain()
    first = Request("first", time.monotonic(), math.inf)
    asked = ask(drain)
    drain.end([first, asked])
    first.answer(None)
    drain.end([first, asked])  # done, but not handed over yet
    time.sleep(0.1)
    assert not asked.done()
    drain.end([asked])
    assert asked.result(WAIT_SECONDS).body == b"drained\n"


def test_asked_twice() -> None:
    """The launcher asks again when an answer got lost."""
    drain = Drain()
    lost, again = ask(drain), ask(drain)
    lost.cancel()
    drain.end([lost, again])
    assert again.result(WAIT_SECONDS)
    late = ask(drain)
    drain.end([late])
    assert late.result(WAIT_SECONDS)


def test_nobody_asked() -> None:
    flushed: list[bool] = []
    drain = Drain(flush=lambda: flushed.append(True))
    drain.end([])
    drain.check()
    assert not flushed


def test_it_is_answered_after_what_was_recorded_is_sent() -> None:
    sent = threading.Event()
    drain = Drain(flush=lambda: wait_for(sent))
    asked = ask(drain)
    drain.end([asked])
    time.sleep(0.1)
    assert not asked.done()
    sent.set()
    assert asked.result(WAIT_SECONDS)


def test_what_can_not_be_sent_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.servers.draining._FLUSH_SECONDS", 0.05)
    never = threading.Event()
    drain = Drain(flush=lambda: wait_for(never))
    asked = ask(drain)
    drain.end([asked])
    assert asked.result(WAIT_SECONDS)
    never.set()


def test_what_comes_later_is_refused() -> None:
    drain = Drain()
    drain.check()
    ask(drain)
    with pytest.raises(ServingError, match="shutting down") as caught:
        drain.check()
    assert (caught.value.kind, caught.value.retry_after) == (ErrorKind.OVERLOADED, 1)


@pytest.mark.parametrize("given", ["", "another", "é", "\udcff", None])
def test_a_stranger_can_not_ask(given: str | None) -> None:
    drain = Drain()
    assert not drain.is_asked({} if given is None else {DRAIN_HEADER.lower(): given})
    drain.check()


def test_without_a_secret_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DRAIN_SECRET_VARIABLE)
    assert not Drain().is_asked({DRAIN_HEADER.lower(): ""})
