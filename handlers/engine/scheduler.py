"""Which group of waiting windows the device runs next. No threads and no clock of its own: time is an argument."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .grouping import GroupCost, plan_groups

Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """Windows that can share a group: the same schedule, at the same stage."""

    stage: int
    schedule: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Waiting(Generic[Payload]):
    """A window between two stages.

    Attributes:
        lane: what it waits for.
        length: its tokens, special ones included.
        arrived: when its request came, in seconds.
        bulk: it gives way to interactive windows that came up to `bulk_patience` later.
        payload: whatever the caller needs back.
        entered: when it joined its lane, in seconds; set by the scheduler.
    """

    lane: Lane
    length: int
    arrived: float
    bulk: bool
    payload: Payload
    entered: float = field(default=0.0)


@dataclass(frozen=True, slots=True)
class Group(Generic[Payload]):
    """Windows to compute together, oldest first, and why now: "full", "delay" or "idle"."""

    lane: Lane
    members: tuple[Waiting[Payload], ...]
    reason: str


class Scheduler(Generic[Payload]):
    """Holds waiting windows by lane and releases them in groups.

    The lane with the oldest window goes first, so a picture that is half done goes before one that came
    after it, and no lane starves. That window is always in the group; the planner chooses its mates.
    While the device is busy only a lane that holds enough windows to choose from, or one whose oldest has
    waited long enough, is released.

    Args:
        max_batch_tokens: tokens of a group, padding included.
        max_group_windows: windows of a group.
        pool_windows: a lane with so many is released; more than a group lets padded execution choose mates.
        max_group_delay: seconds that a window waits in a lane for mates while the device has other work.
        bulk_patience: seconds by which a bulk window counts as younger than it is.
        cost: of padded groups; None for packed execution.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_group_windows: int,
        pool_windows: int,
        max_group_delay: float,
        bulk_patience: float,
        cost: GroupCost | None = None,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_group_windows = max_group_windows
        self._pool_windows = pool_windows
        self._max_group_delay = max_group_delay
        self._bulk_patience = bulk_patience
        self._cost = cost
        self._lanes: dict[Lane, list[Waiting[Payload]]] = {}

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def add(self, windows: Iterable[Waiting[Payload]], now: float) -> None:
        for window in windows:
            window.entered = now
            self._lanes.setdefault(window.lane, []).append(window)

    def remove(self, unwanted: Callable[[Payload], bool]) -> list[Waiting[Payload]]:
        """Forget windows whose request was cancelled, failed or ran out of time; returns them."""
        removed: list[Waiting[Payload]] = []
        for lane, windows in list(self._lanes.items()):
            kept: list[Waiting[Payload]] = []
            for window in windows:
                (removed if unwanted(window.payload) else kept).append(window)
            self._keep(lane, kept)
        return removed

    def next_group(self, now: float, *, idle: bool = True) -> Group[Payload] | None:
        """Take the group to run now, if there is one.

        Args:
            now: in seconds, on the clock of `arrived`.
            idle: the device has nothing else to do, so something is released as long as anything waits.
        """
        urgent = {lane: windows for lane, windows in self._lanes.items() if any(self._urgent(w, now) for w in windows)}
        reasons = {lane: self._reason(windows, now) for lane, windows in (urgent or self._lanes).items()}
        ready = [lane for lane, reason in reasons.items() if idle or reason != "idle"]
        if not ready:
            return None
        lane = min(ready, key=lambda lane: (min(map(self._rank, self._lanes[lane])), -lane.stage))
        return self._release(lane, reasons[lane])

    def _reason(self, windows: list[Waiting[Payload]], now: float) -> str:
        """Why a lane would be released now."""
        if len(windows) >= self._pool_windows:
            return "full"
        return "delay" if now - windows[0].entered >= self._max_group_delay else "idle"

    def _release(self, lane: Lane, reason: str) -> Group[Payload]:
        windows = sorted(self._lanes[lane], key=self._rank)
        candidates = windows[: max(self._max_group_windows, self._pool_windows)]  # bounds the planner's work
        groups = plan_groups(
            [window.length for window in candidates],
            self._cost,
            max_batch_tokens=self._max_batch_tokens,
            max_group_windows=self._max_group_windows,
        )
        members = tuple(candidates[i] for i in groups[0])
        chosen = {id(member) for member in members}
        self._keep(lane, [window for window in self._lanes[lane] if id(window) not in chosen])
        return Group(lane, members, reason)

    def _keep(self, lane: Lane, windows: list[Waiting[Payload]]) -> None:
        if windows:
            self._lanes[lane] = windows
        else:
            self._lanes.pop(lane, None)

    def _rank(self, window: Waiting[Payload]) -> float:
        return window.arrived + (self._bulk_patience if window.bulk else 0.0)

    def _urgent(self, window: Waiting[Payload], now: float) -> bool:
        return not window.bulk or now - window.arrived >= self._bulk_patience
