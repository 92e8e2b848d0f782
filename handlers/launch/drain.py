"""An orderly end of TorchServe's workers: what was accepted is answered, what comes later is refused.

TorchServe resets all connections when it is told to stop, and doesn't tell what is in flight. Its launcher therefore
first asks every model for a drain, a request like any other: those queued before it come before it, those after it
are refused, and its answer is the last one.
"""

import contextlib
import hmac
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError

from handlers.api.replies import SegmentReply
from handlers.errors import ErrorKind, ServingError

DRAIN_HEADER = "X-MPM-Drain"
DRAIN_SECRET_VARIABLE = "MPM_DRAIN_SECRET"  # set by the launcher, so that nobody else can end a worker

_FLUSH_SECONDS = 3.0  # at most, whatever it is sent to
_DRAINED = SegmentReply(b"drained\n", "text/plain", (0,), {}, 0)


class Drain:
    """Whether a worker is being drained, and the answers owed to those who asked for it.

    Args:
        flush: sends what was recorded and not sent yet: TorchServe kills its workers without a word.
    """

    def __init__(self, flush: Callable[[], None] = lambda: None) -> None:
        self._flush = flush
        self._answers: list[Future[SegmentReply]] = []
        self._num_ending = 0

    def take(self, headers: Mapping[str, str]) -> "Future[SegmentReply] | None":
        """The answer to a request, its header names in lower case, if that is the launcher's; None for all others."""
        secret = os.environ.get(DRAIN_SECRET_VARIABLE, "")
        given = headers.get(DRAIN_HEADER.lower(), "")
        if not secret or not hmac.compare_digest(given.encode(errors="replace"), secret.encode()):
            return None
        self._answers.append(Future())
        return self._answers[-1]

    def owes(self, answer: "Future[SegmentReply]") -> bool:
        """Whether that is the answer to a drain."""
        return answer in self._answers

    def check(self) -> None:
        """Raise a ServingError if nothing new is taken."""
        if self._answers:
            raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down; ask again", retry_after=1)

    def end(self, pending: "Iterable[Future[SegmentReply]]" = ()) -> None:
        """If nothing else is pending, flush and then answer who asked for the drain; returns at once."""
        if not all(map(self.owes, pending)):
            return
        for answer in self._answers[self._num_ending :]:
            threading.Thread(target=self._finish, args=(answer,), name="drain", daemon=True).start()
        self._num_ending = len(self._answers)

    def _finish(self, answer: "Future[SegmentReply]") -> None:
        flushing = threading.Thread(target=self._flush, name="flush", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        with contextlib.suppress(InvalidStateError):  # it was given up
            answer.set_result(_DRAINED)
