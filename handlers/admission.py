"""How much work may be in flight, and when to come back if it is too much."""

import math
import threading
from collections import deque
from time import monotonic

from .errors import ErrorKind, ServingError

_RATE_SECONDS = 10.0  # over which the drain rate is measured


class Admission:
    """Counts tokens in flight, before merging, and refuses what would exceed the limit. Thread-safe."""

    def __init__(self, max_inflight_tokens: int) -> None:
        self._max_inflight_tokens = max_inflight_tokens
        self._lock = threading.Lock()
        self._inflight_tokens = 0
        self._left: deque[tuple[float, int]] = deque()  # when requests left lately, and their tokens
        self._closed = False

    def close(self) -> None:
        """Refuse everything from now on."""
        with self._lock:
            self._closed = True

    def enter(self, tokens: int) -> None:
        """Count a request in; one that is larger than the limit may enter when nothing else is in flight.

        Raises:
            ServingError: overloaded, or closed.
        """
        with self._lock:
            if self._closed:
                raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down")
            if self._inflight_tokens and self._inflight_tokens + tokens > self._max_inflight_tokens:
                raise ServingError(
                    ErrorKind.OVERLOADED,
                    f"the server is busy: {self._inflight_tokens} tokens are in flight, "
                    f"at most {self._max_inflight_tokens} may be; try again later",
                    retry_after=self._retry_after(),
                )
            self._inflight_tokens += tokens

    def leave(self, tokens: int) -> None:
        """Count a request out."""
        with self._lock:
            now = monotonic()
            self._inflight_tokens -= tokens
            self._left.append((now, tokens))
            while self._left[0][0] < now - _RATE_SECONDS:
                self._left.popleft()

    def _retry_after(self) -> int:
        """Seconds until what is in flight has left at the rate at which requests left lately, at least 1."""
        if not self._left:
            return 1
        seconds = max(monotonic() - self._left[0][0], 1.0)
        tokens_per_second = sum(tokens for _, tokens in self._left) / seconds
        return max(1, math.ceil(self._inflight_tokens / tokens_per_second))
