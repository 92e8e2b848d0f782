"""An orderly end of TorchServe's workers: what was accepted is answered, what comes later is refused.

TorchServe resets all connections when it is told to stop, and doesn't tell what is in flight. Its launcher therefore
first asks every model for a drain, a request like any other: those queued before it come before it, those after it
are refused, and its answer is the last one.
"""

import hmac
import os
import threading
from collections.abc import Callable, Iterable, Mapping

from handlers.engine.request import Reply, Request
from handlers.errors import ErrorKind, ServingError
from handlers.launch.drain import DRAIN_HEADER, DRAIN_SECRET_VARIABLE

_FLUSH_SECONDS = 3.0  # at most, whatever it is sent to
_DRAINED = Reply({"text": b"drained\n"}, "text/plain", (0,), {}, 0)


class Drain:
    """Whether a worker is being drained, and the requests for a drain that wait for their answer.

    Args:
        flush: sends what was recorded and not sent yet: TorchServe kills its workers without notice.
    """

    def __init__(self, flush: Callable[[], None] = lambda: None) -> None:
        self._flush = flush
        self._requests: list[Request] = []
        self._num_ending = 0

    def is_asked(self, headers: Mapping[str, str]) -> bool:
        """Whether a request, its header names in lower case, is the launcher's for a drain."""
        secret = os.environ.get(DRAIN_SECRET_VARIABLE, "")
        given = headers.get(DRAIN_HEADER.lower(), "")
        return bool(secret) and hmac.compare_digest(given.encode(errors="replace"), secret.encode())

    def begin(self, request: Request) -> None:
        """Refuse new requests from now on; `end` answers this one."""
        self._requests.append(request)

    def check(self) -> None:
        """Raise a ServingError if nothing new is taken."""
        if self._requests:
            raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down; ask again", retry_after=1)

    def end(self, pending: Iterable[Request] = ()) -> None:
        """If nothing else is pending, flush and then answer who asked for the drain; returns at once."""
        if not all(request in self._requests for request in pending):
            return
        for request in self._requests[self._num_ending :]:
            threading.Thread(target=self._finish, args=(request,), name="drain", daemon=True).start()
        self._num_ending = len(self._requests)

    def _finish(self, request: Request) -> None:
        flushing = threading.Thread(target=self._flush, name="flush", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_SECONDS)
        request.answer(_DRAINED)
