"""The device's thread: takes what came, launches groups one behind the other, and waits for the oldest of them."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

import torch

from .computing import Times
from .scheduler import Group, Scheduler, Waiting
from .work import Window


@dataclass(frozen=True, slots=True)
class InFlight:
    """A group on the device.

    Attributes:
        group: its windows.
        finish: waits for it, see `Computer.launch`.
        alone: nothing was in flight before it, which might have taken its memory.
    """

    group: Group[Window]
    finish: Callable[[], Times]
    alone: bool


class DeviceThread:
    """Keeps the device busy with what waits. It runs from `start` to `close`, and it alone calls what it is given.

    A GPU runs on while the host waits for nothing, so there the next group is launched behind the one that runs,
    if it would not gain from waiting: a lane is full, or its oldest window has waited long enough. Elsewhere what a
    group computed is in the scheduler before the next is chosen.

    Args:
        device: that computes.
        scheduler: what waits.
        launch: see `Computer.launch`.
        lookahead: groups launched behind the one that runs; None for one on a GPU and none elsewhere.
        on_removed: told of windows that no longer wait, because their request is over.
        on_released: told of a group before it is launched, and when that is.
        on_computed: given a group that is through, and its times.
        on_failed: given a window that fails even alone, its stage and the error.
        on_lost: told why the device is beyond help.
    """

    def __init__(
        self,
        device: torch.device,
        scheduler: Scheduler[Window],
        launch: Callable[[Group[Window]], Callable[[], Times]],
        *,
        lookahead: int | None = None,
        on_removed: Callable[[list[Waiting[Window]]], None],
        on_released: Callable[[Group[Window], float], None],
        on_computed: Callable[[Group[Window], Times], None],
        on_failed: Callable[[Window, int, Exception], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.scheduler = scheduler
        self.lookahead = int(device.type == "cuda") if lookahead is None else lookahead
        self.busy_since: float | None = None  # since when the oldest group in flight has been that; None when idle
        self._device = device
        self._launch_group = launch
        self._on_removed = on_removed
        self._on_released = on_released
        self._on_computed = on_computed
        self._on_failed = on_failed
        self._on_lost = on_lost
        self._inbox: queue.SimpleQueue[list[Waiting[Window]] | None] = queue.SimpleQueue()
        self._flying: deque[InFlight] = deque()  # oldest first
        self._again: deque[Group[Window]] = deque()  # what failed, in smaller groups
        self._draining = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, windows: list[Waiting[Window]]) -> None:
        """Have windows computed that come from another thread."""
        self._inbox.put(windows)

    def close(self) -> None:
        """Compute what was added, then end."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def died(self) -> bool:
        """The thread ended, and nobody had asked for it."""
        return not self._thread.is_alive() and not self._draining

    def _serve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # events and kernels of this thread are the current device's
        while self._take_work():
            self._on_removed(self.scheduler.remove(lambda window: window.request.answer.done()))
            group = self._next_group()
            if group is not None:
                self._launch(group)
            if self._flying and (group is None or len(self._flying) > self.lookahead):
                self._finish()

    def _take_work(self) -> bool:
        """Move what came into the scheduler, waiting if there is nothing else to do; False when all is done."""
        if not self._flying:
            self.busy_since = None
        while not self._inbox.empty() or not (self._has_work() or self._draining):
            arrivals = self._inbox.get()
            if arrivals is None:
                self._draining = True
            else:
                self.scheduler.add(arrivals, monotonic())
        return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._flying or self._again or len(self.scheduler))

    def _next_group(self) -> Group[Window] | None:
        """What to launch now, if anything; what failed goes first, when nothing else holds memory."""
        if self._again:
            return None if self._flying else self._again.popleft()
        now = monotonic()
        group = self.scheduler.next_group(now, idle=not self._flying)
        if group is not None:
            self._on_released(group, now)
        return group

    def _launch(self, group: Group[Window]) -> None:
        alone = not self._flying
        if alone:
            self.busy_since = monotonic()
        try:
            self._flying.append(InFlight(group, self._launch_group(group), alone))
        except Exception as error:
            self._retry(group, alone, error)

    def _finish(self) -> None:
        """Wait for the oldest group."""
        oldest = self._flying.popleft()
        try:
            times = oldest.finish()
        except Exception as error:
            self._retry(oldest.group, oldest.alone, error)
        else:
            self._on_computed(oldest.group, times)
        self.busy_since = monotonic()  # for the next one, which ran behind it

    def _retry(self, group: Group[Window], alone: bool, error: Exception) -> None:
        """Have a group that failed run alone, or else its halves, so that only the windows at fault fail.

        Not now: the error's traceback keeps all that the attempt had allocated.
        """
        members, half = group.members, len(group.members) // 2
        if isinstance(error, torch.AcceleratorError):  # every further call on the device fails too
            self._on_lost(f"the device failed: {error}")
        elif not alone:
            self._again.append(group)
        elif half == 0:
            self._on_failed(members[0].payload, group.lane.stage, error)
        else:
            self._again.extendleft(replace(group, members=part) for part in (members[half:], members[:half]))
