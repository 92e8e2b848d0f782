"""One request from its coming to its end, the same behind every server."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakMethod

from .errors import ErrorKind, ServingError
from .journal import describe_request
from .replies import SegmentReply
from .tracing import NO_SPAN, RequestSpan

logger = logging.getLogger(__name__)

GONE = 499  # of a request that its client, or the server in front, gave up


def only_reply(replies: Sequence[SegmentReply]) -> SegmentReply:
    (reply,) = replies
    return reply


class Exchange:
    """A request of one or more pictures, and its one end, whoever brings that about. Thread-safe.

    Before anybody gets the answer its end is counted, in its span, and told in a line of the log. What is still being
    computed for it then is dropped.

    Args:
        request_id: names it.
        arrived: when it came, on the clock of `time.monotonic`.
        deadline: when it is late, on the same clock.
        span: told of the end.
        render: makes of the pictures' replies what the server sends.
        on_end: told of the end, with its HTTP status and the replies.

    Attributes:
        answer: what `render` made, or a ServingError. Cancelling it is an end too.
    """

    def __init__(
        self,
        request_id: str,
        arrived: float,
        deadline: float,
        *,
        span: RequestSpan = NO_SPAN,
        render: Callable[[Sequence[SegmentReply]], Any] = only_reply,
        on_end: "Callable[[Exchange, int, Sequence[SegmentReply]], None]" = lambda exchange, code, replies: None,
    ) -> None:
        self.request_id = request_id
        self.arrived = arrived
        self.deadline = deadline
        self.span = span
        self.answer: Future[Any] = Future()
        self._render = render
        self._on_end = on_end
        self._lock = threading.Lock()
        self._has_ended = False
        self._parts: Sequence[Future[SegmentReply]] = ()
        self._num_done = 0
        cancel = WeakMethod(self.cancel)  # who keeps the answer keeps no more than that
        self.answer.add_done_callback(lambda answer: _call(cancel) if answer.cancelled() else None)

    def gather(self, parts: "Sequence[Future[SegmentReply]]") -> None:
        """Be answered when these pictures are, or fail with the first of them that does."""
        self._parts = parts
        for index, part in enumerate(parts):
            part.add_done_callback(partial(self._take_part, index))
        if self._has_ended:  # in between, without these
            self._drop_parts()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What is raised inside is the end of the request."""
        try:
            yield
        except ServingError as error:
            self.fail(error)
        except Exception:
            logger.exception("request %s failed", self.request_id)
            self.fail(ServingError(ErrorKind.INTERNAL, "the request failed inside the server"))

    def fail(self, error: ServingError) -> None:
        """End with an error, unless it has ended."""
        if self._end(error.kind.http_status, error=str(error)):
            with contextlib.suppress(InvalidStateError):  # cancelled at the same moment
                self.answer.set_exception(error)

    def expire(self) -> None:
        """End because it is late, unless it has ended."""
        self.fail(ServingError(ErrorKind.DEADLINE, f"not answered within {self.deadline - self.arrived:g} s"))

    def cancel(self) -> None:
        """End because nobody waits for the answer any more, unless it has ended."""
        if self._end(GONE):
            self.answer.cancel()

    def _take_part(self, index: int, part: "Future[SegmentReply]") -> None:
        """A picture is through; called in the engine's threads, or at once."""
        if self._has_ended:
            return
        if part.cancelled():
            self.cancel()
            return
        with self.guarded():
            try:
                part.result()
            except ServingError as error:
                raise error.of_picture(index, len(self._parts)) from None
            with self._lock:
                self._num_done += 1
                parts = self._parts  # none if it has ended meanwhile
            if self._num_done == len(parts):
                replies = [part.result() for part in parts]
                rendered = self._render(replies)
                if self._end(200, replies):
                    with contextlib.suppress(InvalidStateError):
                        self.answer.set_result(rendered)

    def _end(self, code: int, replies: Sequence[SegmentReply] = (), error: str = "") -> bool:
        """Record the end; False if there was one before."""
        with self._lock:
            if self._has_ended:
                return False
            self._has_ended = True
        self._drop_parts()
        seconds = monotonic() - self.arrived
        self._on_end(self, code, replies)
        self.span.end(code)
        if logger.isEnabledFor(logging.INFO):
            trace_id = self.span.trace_id
            logger.info(
                describe_request(self.request_id, code, seconds, trace_id=trace_id, replies=replies, error=error)
            )
        return True

    def _drop_parts(self) -> None:
        parts, self._parts = self._parts, ()  # which know the exchange: nothing of it may wait for the collector
        for part in parts:
            part.cancel()


def _call(method: "WeakMethod[Callable[[], None]]") -> None:
    found = method()
    if found is not None:
        found()
