"""Looks after a server while it runs: both go on without a word when the process that holds a model is dead."""

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

from .health import Progress, UnhealthyError, check_model, read_progress
from .readiness import Readiness

_LOOK_SECONDS = 1.0  # between two looks at what can be seen from outside
_ASK_SECONDS = 10.0  # between two looks at what models get done
_ANSWER_SECONDS = 20.0  # that a model has for a tiny picture, while nothing else gets done
_NOT_FOUND = 404


class Supervised(ABC):
    """What of a server is looked after."""

    @property
    @abstractmethod
    def watched(self) -> Mapping[str, str]:
        """Where each model answers, and where it tells how it gets on."""

    @abstractmethod
    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the end of the server, see `Server.wait`."""

    @abstractmethod
    def ailment(self) -> str:
        """What can be seen of a dead model without asking it; empty if nothing can."""

    @abstractmethod
    def forget(self) -> None:
        """All models answer: what was seen of dead ones so far is over."""

    @abstractmethod
    def may_recover(self, num_failures: int, ill_seconds: float) -> bool:
        """Whether a server that was found ill so often in a row, for so long, may still mend itself."""


def supervise(server: Supervised, readiness: Readiness) -> int:
    """Return, with the status for whoever starts another, when the server has ended or is beyond help.

    A model is well while pictures get answered. One that answers none is asked for the mask of a tiny picture; that
    this is late, or refused for lack of room, is no illness while groups are computed. A model that was unloaded is
    not ready, and not ill either.
    """
    seen: dict[str, Progress | None] = {}
    asked, num_failures, ill_since, told = time.monotonic(), 0, 0.0, ""

    def tell(found: str) -> None:
        nonlocal told
        readiness.ready = not found
        if found != told:
            print(f"not ready: {found}" if found else "ready again", file=sys.stderr, flush=True)
        told = found

    while True:
        try:
            return server.wait(_LOOK_SECONDS) or 1  # by itself
        except subprocess.TimeoutExpired:
            pass
        if found := server.ailment():
            tell(found)
        elif time.monotonic() - asked < _ASK_SECONDS:
            continue
        is_ill = False
        try:
            _ask(server, seen)  # what was seen may be over by now
            tell("")
            server.forget()
        except UnhealthyError as error:
            tell(str(error))
            is_ill = error.status != _NOT_FOUND
        asked = time.monotonic()
        ill_since = ill_since if num_failures else asked
        num_failures = num_failures + 1 if is_ill else 0
        if is_ill and not server.may_recover(num_failures, asked - ill_since):
            print("no model comes back here; ending, for another server to be started", file=sys.stderr, flush=True)
            return 1


def _ask(server: Supervised, seen: dict[str, Progress | None]) -> None:
    """Ask every model that answered no picture since the last time; raises an UnhealthyError."""
    for url, metrics_url in server.watched.items():
        before, seen[url] = seen.get(url), read_progress(metrics_url, url)
        now = seen[url]
        if before is None or now is None or now.pictures <= before.pictures:
            check_model(url, timeout_seconds=_ANSWER_SECONDS, metrics_url=metrics_url)
