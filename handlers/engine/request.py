"""Request, Picture, Window and Group: each is one object that carries its own state for the whole way."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from handlers.api.options import RequestOptions
from handlers.errors import ErrorKind, ServingError
from handlers.observe.tracing import NO_SPAN, RequestSpan
from mpm_ops.stages import WindowView
from mpm_ops.windows import WindowPlan

from .lane import Lane

logger = logging.getLogger(__name__)

CANCELLED = 499  # status of a request that its client, or the server in front, gave up


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer for one picture.

    Attributes:
        bodies: encoded, by format, the one in `media_type` first; arrays where the options ask for them.
        media_type: of the body.
        tokens: of the whole picture, at the start and after each merge.
        seconds: that each step took.
        num_windows: of the picture.
        reduced_from: height and width of the picture that came, if it was decoded smaller.
    """

    bodies: Mapping[str, Any]
    media_type: str
    tokens: tuple[int, ...]
    seconds: Mapping[str, float]
    num_windows: int
    reduced_from: tuple[int, int] | None = None

    @property
    def body(self) -> bytes:
        body: bytes = next(iter(self.bodies.values()))
        return body


def only_reply(replies: Sequence[Any]) -> Any:
    (reply,) = replies
    return reply


class Request(Future[Any]):
    """One client request of one or more pictures, and the future of its answer. Thread-safe.

    Ends exactly once: answered, failed, expired or cancelled. `on_end` has returned before anybody who waits for the
    answer is woken. Pictures of a request that has ended are dropped at their next step.

    Args:
        request_id: names it.
        arrived: when it came, on the clock of `time.monotonic`.
        deadline: when it expires, on the same clock.
        span: of the request.
        render: makes the answer from the pictures' replies.
        on_end: called with the request, its HTTP status, its pictures and the message of its error.
    """

    def __init__(
        self,
        request_id: str,
        arrived: float,
        deadline: float,
        *,
        span: RequestSpan = NO_SPAN,
        render: Callable[[Sequence[Any]], Any] = only_reply,
        on_end: "Callable[[Request, int, Sequence[Picture], str], None]" = lambda request, code, pictures, error: None,
    ) -> None:
        super().__init__()
        self.request_id = request_id
        self.arrived = arrived
        self.deadline = deadline
        self.span = span
        self.has_ended = False
        self._render = render
        self._on_end = on_end
        self._lock = threading.Lock()
        self._pictures: Sequence[Picture] = ()
        self._num_left = 0

    def begin(self, pictures: "Sequence[Picture]") -> bool:
        """Wait for these pictures from now on; False if the request has ended."""
        with self._lock:
            if not self.has_ended:
                self._pictures, self._num_left = pictures, len(pictures)
            return not self.has_ended

    def complete(self, picture: "Picture", reply: Any) -> None:
        """A picture has its reply; the last one answers the request."""
        picture.reply = reply
        with self._lock:
            self._num_left -= 1
            is_last = not self._num_left and not self.has_ended
            pictures = self._pictures
        if is_last:
            with self.guarded():
                self.answer(self._render([picture.reply for picture in pictures]))

    def answer(self, value: Any) -> None:
        """End with an answer, unless the request has ended."""
        if self._end(200):
            self.set_result(value)

    def fail(self, error: ServingError) -> None:
        """End with an error, unless the request has ended."""
        if self._end(error.kind.http_status, str(error)):
            self.set_exception(error)

    def fail_picture(self, picture: "Picture", error: ServingError) -> None:
        """End with the error of one picture, which names its place among several."""
        self.fail(error.of_picture(picture.index, picture.num_pictures))

    def expire(self) -> None:
        """End because the deadline is over, unless the request has ended."""
        self.fail(ServingError(ErrorKind.DEADLINE, f"not answered within {self.deadline - self.arrived:g} s"))

    def cancel(self) -> bool:
        """End because nobody waits for the answer; False if the request has ended."""
        return self._end(CANCELLED) and super().cancel()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Errors raised inside end the request."""
        try:
            yield
        except ServingError as error:
            self.fail(error)
        except Exception:
            logger.exception("request %s failed", self.request_id)
            self.fail(internal_error())

    def _end(self, code: int, error: str = "") -> bool:
        """Claim and record the end; False if there was one before."""
        with self._lock:
            if self.has_ended:
                return False
            self.has_ended = True
            pictures, self._pictures = self._pictures, ()  # who keeps the answer keeps no pixels
        for picture in pictures:
            picture.windows = []  # which refer to the picture
        self._on_end(self, code, pictures, error)
        return True


@dataclass(slots=True, eq=False, weakref_slot=True)
class Picture:
    """One picture of a request, from its header to its reply.

    Attributes:
        request: that it belongs to.
        options: of the request, with a name of the picture's own.
        lane: that its windows begin in.
        plan: where its windows lie.
        arrived: when it was admitted, on the clock of `time.monotonic`.
        source: the encoded picture, until it is decoded.
        reduced_from: its height and width, if they are more than may be decoded.
        index, num_pictures: its place in the request.
        tokens: of its windows before merging; what it counts for in admission.
        held_bytes: bytes of it that are kept: its body until it is decoded, its pixels where they are needed later.
        is_admitted: still counted by admission.
        keeps_maps: its windows keep what each merge did.
        keeps_logits: its reply is the network's logits [num_windows, K, Gh, Gw], not encoded.
        image: uint8 RGB [H, W, 3]; without a view it may be smaller than the picture that came.
        windows: of the plan, once it is decoded.
        num_left: windows that are not computed.
        ready_at: when its windows were ready for the first stage.
        seconds: that each step took so far.
        computed_until: end of its latest group on a stream.
        labels, confidence: [H, W] class ids, and their probability if a format needs it.
        reply: once it is encoded.
    """

    request: Request
    options: RequestOptions
    lane: Lane
    plan: WindowPlan
    arrived: float
    source: Any = None
    reduced_from: tuple[int, int] | None = None
    index: int = 0
    num_pictures: int = 1
    tokens: int = 0
    held_bytes: int = 0
    is_admitted: bool = False
    keeps_maps: bool = False
    keeps_logits: bool = False
    image: np.ndarray | None = None
    windows: "list[Window]" = field(default_factory=list)
    num_left: int = 0
    ready_at: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "merge": 0.0})
    computed_until: float = 0.0
    labels: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.uint8))
    confidence: np.ndarray | None = None
    reply: Any = None

    @property
    def num_pixels(self) -> int:
        return self.plan.original_size[0] * self.plan.original_size[1]

    @property
    def is_over(self) -> bool:
        """Nothing more is to be done for it."""
        return self.request.has_ended or self.reply is not None

    @property
    def tokens_per_stage(self) -> tuple[int, ...]:
        """Image tokens of all windows, at the start and after each merge."""
        return tuple(map(sum, zip(*(window.lengths for window in self.windows), strict=True)))

    def fail(self, error: ServingError) -> None:
        self.request.fail_picture(self, error)


@dataclass(slots=True, eq=False)
class Window:
    """One window of a picture, the unit of batching.

    Attributes:
        picture: that it belongs to.
        lane: what it waits for.
        length: its tokens, special ones included.
        state: pixels at first, [3, H, W] or uint8 [H, W, 3], tokens between two stages, None in the end.
        lengths: image tokens at the start and after each merge.
        entered: when it joined its lane, in seconds.
        rank: windows of a lower rank go first, in seconds; set by the scheduler.
        logits: [K, Gh * Gw] in the end.
        merge_map: [N] in the end, the token that stands for each patch; None where nothing merged.
        merge_maps: [N] on the host after each merge, if the picture keeps them.
        is_finite: whether the logits are.
    """

    picture: Picture
    lane: Lane
    length: int
    state: Tensor | WindowView | None
    lengths: list[int]
    entered: float = 0.0
    rank: float = 0.0
    logits: Tensor | None = None
    merge_map: Tensor | None = None
    merge_maps: list[Tensor] = field(default_factory=list)
    is_finite: bool = True


@dataclass(slots=True, eq=False)
class Group:
    """Windows that are computed together.

    Attributes:
        lane: of its windows.
        windows: oldest first.
        reason: why it is computed now: "full", "delay" or "idle".
        alone: nothing was on the device before or beside it that might have taken its memory.
        began: when it was launched.
        stream: that it runs on; None for the whole device.
        share: of the device, that it runs on.
        finish: waits for it once it is launched, see `Computer.launch`.
        padding_tokens: computed for padding alone in its last launch.
    """

    lane: Lane
    windows: tuple[Window, ...]
    reason: str
    alone: bool = True
    began: float = 0.0
    stream: int | None = None
    share: float = 1.0
    finish: Callable[[], tuple[float, float | None]] | None = None
    padding_tokens: int = 0

    def by_picture(self) -> dict[Picture, list[Window]]:
        found: dict[Picture, list[Window]] = {}
        for window in self.windows:
            found.setdefault(window.picture, []).append(window)
        return found


def internal_error(message: str = "the request failed inside the server") -> ServingError:
    return ServingError(ErrorKind.INTERNAL, message)
