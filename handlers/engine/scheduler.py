"""Which group of waiting windows the device runs next. No threads and no clock of its own: time is an argument."""

from collections.abc import Callable, Iterable

from .grouping import choose_group
from .lane import Lane
from .request import Group, Window

_POOL_GROUPS = 4  # groups' worth of the oldest windows from which a group is chosen; bounds the work of choosing


class Scheduler:
    """Holds waiting windows by lane and releases them in groups.

    The lane with the oldest window goes first, so a picture that is half done goes before one that came
    after it, and no lane starves. That window is always in the group; `choose_group` picks its mates.
    While the device is busy only a lane that fills a group, or one whose oldest window has waited long enough, is
    released.

    Args:
        max_batch_tokens: tokens of a group, padding included.
        max_group_windows: windows of a group.
        max_group_delay: seconds that a window waits in a lane for mates while the device has other work.
        bulk_patience: seconds by which a bulk window counts as younger than it is.
        bucket: the length at which the runtime runs a window of some length.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_group_windows: int,
        max_group_delay: float,
        bulk_patience: float,
        bucket: Callable[[int], int] = lambda length: length,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_group_windows = max_group_windows
        self._max_group_delay = max_group_delay
        self._bulk_patience = bulk_patience
        self._bucket = bucket
        self._lanes: dict[Lane, list[Window]] = {}

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def add(self, windows: Iterable[Window], now: float) -> None:
        for window in windows:
            picture = window.picture
            window.entered = now
            window.rank = picture.arrived + (self._bulk_patience if picture.options.bulk else 0.0)
            self._lanes.setdefault(window.lane, []).append(window)

    def remove_ended(self) -> list[Window]:
        """Forget windows whose picture is over; returns them."""
        removed: list[Window] = []
        for lane, windows in list(self._lanes.items()):
            if any(window.picture.is_over for window in windows):
                removed += [window for window in windows if window.picture.is_over]
                self._keep(lane, [window for window in windows if not window.picture.is_over])
        return removed

    def next_group(self, now: float, *, idle: bool = True) -> Group | None:
        """Take the group to run now, if there is one.

        Args:
            now: in seconds, on the clock of `Picture.arrived`.
            idle: the device has nothing else to do, so something is released as long as anything waits.
        """
        urgent = {lane: windows for lane, windows in self._lanes.items() if any(self._urgent(w, now) for w in windows)}
        reasons = {lane: self._reason(windows, now) for lane, windows in (urgent or self._lanes).items()}
        ready = [lane for lane, reason in reasons.items() if idle or reason != "idle"]
        if not ready:
            return None
        lane = min(ready, key=lambda lane: (min(window.rank for window in self._lanes[lane]), -lane.stage))
        return self._release(lane, reasons[lane])

    def _reason(self, windows: list[Window], now: float) -> str:
        """Why a lane would be released now."""
        if len(windows) >= self._max_group_windows:
            return "full"
        return "delay" if now - windows[0].entered >= self._max_group_delay else "idle"

    def _release(self, lane: Lane, reason: str) -> Group:
        candidates = sorted(self._lanes[lane], key=lambda window: window.rank)[
            : _POOL_GROUPS * self._max_group_windows
        ]
        chosen = choose_group(
            [window.length for window in candidates],
            self._bucket,
            max_batch_tokens=self._max_batch_tokens,
            max_group_windows=self._max_group_windows,
        )
        windows = tuple(candidates[i] for i in chosen)
        taken = set(map(id, windows))
        self._keep(lane, [window for window in self._lanes[lane] if id(window) not in taken])
        return Group(lane, windows, reason)

    def _keep(self, lane: Lane, windows: list[Window]) -> None:
        if windows:
            self._lanes[lane] = windows
        else:
            self._lanes.pop(lane, None)

    def _urgent(self, window: Window, now: float) -> bool:
        return not window.picture.options.bulk or now >= window.rank
