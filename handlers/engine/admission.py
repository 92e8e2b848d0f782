"""How much work and how many bytes may be in flight, and when to come back if it is too much."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from handlers.errors import ErrorKind, ServingError

from .request import Picture

_RATE_SECONDS = 10.0  # over which the drain rate is measured
_ANSWERABLE = 0.8  # of what the device computes within the deadline; the rest is for decoding, encoding and misjudging


class Admission:
    """Counts tokens in flight, before merging, and bytes that pictures hold; refuses what is too much. Thread-safe.

    What is more than a limit by itself may enter when nothing else counts towards that limit.

    Args:
        max_inflight_tokens: at most so many.
        max_inflight_bytes: at most so many; what decoding and encoding take for a while waits for what is left.
        deadline_seconds: tokens that the device would not get through in most of this time are too many as well.
        capacity: gives the tokens per second that a busy device gets through, as measured lately; 0 while unknown.

    Attributes:
        num_inflight: pictures that entered and have not left.
    """

    def __init__(
        self,
        max_inflight_tokens: int,
        max_inflight_bytes: int,
        deadline_seconds: float,
        capacity: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._max_inflight_tokens = max_inflight_tokens
        self._max_inflight_bytes = max_inflight_bytes
        self._deadline_seconds = deadline_seconds
        self._capacity = capacity
        self._changed = threading.Condition()
        self.num_inflight = 0
        self._inflight_tokens = 0
        self._held_bytes = 0
        self._num_working = 0
        self._working_bytes = 0
        self._left: deque[tuple[float, int]] = deque()  # when requests left lately, and their tokens
        self._closed = False

    @property
    def inflight_bytes(self) -> int:
        """What pictures hold, and what is being decoded or encoded takes."""
        return self._held_bytes + self._working_bytes

    def close(self) -> None:
        """Refuse everything from now on."""
        with self._changed:
            self._closed = True

    def enter(self, pictures: Sequence[Picture]) -> None:
        """Count the pictures of a request in, all or none.

        Raises:
            ServingError: overloaded, or closed.
        """
        tokens = sum(picture.tokens for picture in pictures)
        size = sum(picture.held_bytes for picture in pictures)
        with self._changed:
            if self._closed:
                raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down")
            self._check_tokens(tokens)
            if self._held_bytes and self._held_bytes + size > self._max_inflight_bytes:
                raise ServingError(
                    ErrorKind.OVERLOADED,
                    f"the server is busy: pictures in flight hold {self._held_bytes} bytes, this one would hold "
                    f"{size}, at most {self._max_inflight_bytes} may be held; try again later",
                    retry_after=self._retry_after(),
                )
            self._inflight_tokens += tokens
            self._held_bytes += size
            self.num_inflight += len(pictures)
            for picture in pictures:
                picture.is_admitted = True

    def leave(self, picture: Picture) -> None:
        """Count a picture out, unless it was."""
        with self._changed:
            if not picture.is_admitted:
                return
            now = monotonic()
            picture.is_admitted = False
            self.num_inflight -= 1
            self._inflight_tokens -= picture.tokens
            self._held_bytes -= picture.held_bytes
            self._left.append((now, picture.tokens))
            self._forget_old(now)
            self._changed.notify_all()

    def resize(self, picture: Picture, size: int) -> None:
        """A picture keeps so many bytes from now on."""
        with self._changed:
            if picture.is_admitted:
                self._held_bytes += size - picture.held_bytes
                picture.held_bytes = size
                self._changed.notify_all()

    @contextmanager
    def working(self, size: int) -> Iterator[None]:
        """Have so many bytes for a while; waits for them, unless nobody else works who could give some back."""
        with self._changed:
            while self._num_working and self.inflight_bytes + size > self._max_inflight_bytes:
                self._changed.wait()
            self._num_working += 1
            self._working_bytes += size
        try:
            yield
        finally:
            with self._changed:
                self._num_working -= 1
                self._working_bytes -= size
                self._changed.notify_all()

    def _check_tokens(self, tokens: int) -> None:
        most, why = self._max_inflight_tokens, ""
        capacity = self._capacity()
        answerable = _ANSWERABLE * capacity * self._deadline_seconds  # NaN without a capacity or a deadline
        if capacity and answerable < most:
            most = int(answerable)
            why = f", for {capacity:.0f} a second are computed and {self._deadline_seconds:g} s is the deadline"
        if self._inflight_tokens and self._inflight_tokens + tokens > most:
            raise ServingError(
                ErrorKind.OVERLOADED,
                f"the server is busy: {self._inflight_tokens} tokens are in flight, "
                f"at most {most} may be{why}; try again later",
                retry_after=self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Seconds until what is in flight has left at the rate at which requests left lately, at least 1."""
        now = monotonic()
        self._forget_old(now)
        if not self._left:
            return 1
        seconds = max(now - self._left[0][0], 1.0)
        tokens_per_second = sum(tokens for _, tokens in self._left) / seconds
        return max(1, math.ceil(self._inflight_tokens / tokens_per_second))

    def _forget_old(self, now: float) -> None:
        while self._left and self._left[0][0] < now - _RATE_SECONDS:
            self._left.popleft()
