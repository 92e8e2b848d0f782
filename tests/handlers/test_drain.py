"""A drain is answered last, with what came before it; what comes after it is refused."""

from concurrent.futures import Future
from typing import Any

import pytest

from handlers.drain import DRAIN_HEADER, DRAIN_SECRET_VARIABLE, Drain
from handlers.errors import ErrorKind, ServingError

ASKED = {DRAIN_HEADER.lower(): "secret"}


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DRAIN_SECRET_VARIABLE, "secret")


def test_it_is_answered_when_everything_else_is_done() -> None:
    drain = Drain()
    first, second = Future[Any](), Future[Any]()
    asked = drain.take(ASKED)
    assert asked is not None
    drain.end([first, asked, second])
    first.set_result(None)
    drain.end([first, asked, second])
    assert not asked.done()
    second.set_exception(ValueError())
    drain.end([asked, second])
    assert asked.result().body == b"drained\n"


def test_asked_twice() -> None:
    """The launcher asks again when an answer got lost."""
    drain = Drain()
    lost, again = drain.take(ASKED), drain.take(ASKED)
    assert lost is not None
    assert again is not None
    lost.cancel()
    drain.end([lost, again])
    assert again.done()


def test_what_comes_later_is_refused() -> None:
    drain = Drain()
    drain.check()
    drain.take(ASKED)
    with pytest.raises(ServingError, match="shutting down") as caught:
        drain.check()
    assert (caught.value.kind, caught.value.retry_after) == (ErrorKind.OVERLOADED, 1)


@pytest.mark.parametrize("given", ["", "another", "é", "\udcff", None])
def test_a_stranger_can_not_ask(given: str | None) -> None:
    drain = Drain()
    assert drain.take({} if given is None else {DRAIN_HEADER.lower(): given}) is None
    drain.check()


def test_without_a_secret_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DRAIN_SECRET_VARIABLE)
    assert Drain().take({DRAIN_HEADER.lower(): ""}) is None
