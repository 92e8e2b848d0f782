"""An orderly end of TorchServe's workers: what was accepted is answered, what comes later is refused.

TorchServe resets all connections when it is told to stop, and doesn't tell what is in flight. Its launcher therefore
first asks every model for a drain, a request like any other: those queued before it come before it, those after it
are refused, and its answer is the last one.
"""

import hmac
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from .errors import ErrorKind, ServingError
from .replies import SegmentReply

DRAIN_HEADER = "X-MPM-Drain"
DRAIN_SECRET_VARIABLE = "MPM_DRAIN_SECRET"  # set by the launcher, so that nobody else can end a worker

_DRAINED = SegmentReply(b"drained\n", "text/plain", (0,), {})


class Drain:
    """Whether a worker is being drained, and the answers owed to those who asked for it."""

    def __init__(self) -> None:
        self._answers: list[Future[SegmentReply]] = []

    def take(self, headers: Mapping[str, str]) -> "Future[SegmentReply] | None":
        """The answer to a request, its header names in lower case, if that is the launcher's; None for all others."""
        secret = os.environ.get(DRAIN_SECRET_VARIABLE, "")
        given = headers.get(DRAIN_HEADER.lower(), "")
        if not secret or not hmac.compare_digest(given.encode(errors="replace"), secret.encode()):
            return None
        self._answers.append(Future())
        return self._answers[-1]

    def check(self) -> None:
        """Raise a ServingError if nothing new is taken."""
        if self._answers:
            raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down; ask again", retry_after=1)

    def end(self, pending: "Iterable[Future[SegmentReply]]" = ()) -> None:
        """Answer who asked for the drain if everything else that is pending is done, to go out with it."""
        if self._answers and all(answer.done() or answer in self._answers for answer in pending):
            for answer in self._answers:
                if not answer.done():
                    answer.set_result(_DRAINED)
