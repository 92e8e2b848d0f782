"""A request ends exactly once, whoever ends it, and its end is on record before anybody has the answer."""

import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import pytest
from making import make_picture, make_reply, make_window

from handlers.engine.request import Picture, Request
from handlers.errors import ErrorKind, ServingError

REFUSED = ServingError(ErrorKind.TOO_LARGE, "too large")


class Recorded:
    """A request with pictures, and what was recorded of its end."""

    def __init__(self, num_pictures: int = 1, **options: Any) -> None:
        self.ends: list[tuple[int, int, str]] = []
        now = time.monotonic()
        self.request = Request("mine", now, now + 2, on_end=self.note, **options)
        self.pictures = [
            make_picture(request=self.request, index=i, num_pictures=num_pictures) for i in range(num_pictures)
        ]
        assert self.request.begin(self.pictures)

    def note(self, request: Request, code: int, pictures: Sequence[Picture], error: str) -> None:
        assert not request.done(), "whoever has the answer finds it counted"
        self.ends.append((code, len(pictures), error))


def test_answered_with_its_last_picture() -> None:
    recorded = Recorded(3, render=lambda replies: [reply.body for reply in replies])
    for i in (1, 0, 2):
        assert not recorded.request.done()
        recorded.request.complete(recorded.pictures[i], make_reply(b"png %d" % i))
    assert recorded.request.result(0) == [b"png 0", b"png 1", b"png 2"]
    assert recorded.ends == [(200, 3, "")]


def test_fails_with_its_first_picture_that_does() -> None:
    recorded = Recorded(3)
    recorded.request.complete(recorded.pictures[0], make_reply())
    recorded.pictures[1].fail(REFUSED)
    recorded.pictures[2].fail(REFUSED)
    assert str(recorded.request.exception(0)) == "picture 1 of 3: too large"
    assert all(picture.is_over for picture in recorded.pictures)
    assert recorded.ends == [(413, 3, "picture 1 of 3: too large")]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ServingError(ErrorKind.BAD_REQUEST, "ragged"), 400, "ragged"),
        (KeyError("secret"), 500, "the request failed inside the server"),
    ],
)
def test_replies_that_cannot_be_rendered(error: Exception, code: int, told: str) -> None:
    def render(_: Sequence[Any]) -> None:
        raise error

    recorded = Recorded(render=render)
    recorded.request.complete(recorded.pictures[0], make_reply())
    assert str(recorded.request.exception(0)) == told
    assert [end[0] for end in recorded.ends] == [code]


def test_expired() -> None:
    recorded = Recorded()
    recorded.request.expire()
    error = recorded.request.exception(0)
    assert isinstance(error, ServingError)
    assert (error.kind, str(error)) == (ErrorKind.DEADLINE, "not answered within 2 s")
    assert recorded.pictures[0].is_over
    assert [end[0] for end in recorded.ends] == [504]


def test_cancelled() -> None:
    recorded = Recorded(2)
    assert recorded.request.cancel()
    assert not recorded.request.cancel()
    assert all(picture.is_over for picture in recorded.pictures)
    assert [end[0] for end in recorded.ends] == [499]
    with pytest.raises(CancelledError):
        recorded.request.result(0)
    recorded.request.complete(recorded.pictures[0], make_reply())  # was on its way
    assert recorded.request.cancelled()


def test_pictures_of_one_that_has_ended_are_not_begun() -> None:
    recorded = Recorded()
    recorded.request.fail(REFUSED)
    late = make_picture(request=recorded.request)
    assert not recorded.request.begin([late])
    assert late.is_over
    assert len(recorded.ends) == 1


def test_many_ends_at_once_are_one() -> None:
    for _ in range(100):
        recorded = Recorded()
        request, barrier = recorded.request, threading.Barrier(4)

        def end(act: Callable[[], object], barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            act()

        refuse = partial(request.fail, REFUSED)
        complete = partial(request.complete, recorded.pictures[0], make_reply())
        acts: list[Callable[[], object]] = [request.expire, request.cancel, refuse, complete]
        threads = [threading.Thread(target=end, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(recorded.ends) == 1
        assert request.done()


@pytest.mark.parametrize("code", [200, 413])
def test_who_keeps_the_answer_keeps_no_picture(code: int) -> None:
    gc.disable()  # a cycle would hold pixels until the collector comes by
    try:
        request = Request("mine", 0, math.inf)
        picture = make_picture(request=request)
        make_window(picture, picture.lane)
        assert request.begin([picture])
        if code == 200:
            request.complete(picture, make_reply())
        else:
            picture.fail(REFUSED)
        dropped = weakref.ref(picture)
        del picture
        assert request.done()
        assert dropped() is None
    finally:
        gc.enable()
