"""The loop on the device: schedule -> run -> route, until all is computed."""

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

import torch

from handlers.observe.metrics import Metrics

from .computing import Times
from .request import Group, Picture, Window, internal_error
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class Loop:
    """Keeps the device busy with what waits, in a thread of its own from `start` to `close`.

    A GPU runs on while the host waits for nothing, so there the next group is launched behind the one that runs,
    if it would not gain from waiting: a lane is full, or its oldest window has waited long enough. Elsewhere what a
    group computed is in the scheduler before the next is chosen.

    Args:
        device: that computes.
        scheduler: what waits.
        launch: see `Computer.launch`.
        metrics: of the engine; may be replaced at any time.
        num_special: special tokens of a window.
        lookahead: groups launched behind the one that runs; None for one on a GPU and none elsewhere.
        on_group: called after each group with the group and its seconds, before its pictures go on.
        on_computed: called with the pictures of a group whose windows are all computed.
        on_lost: called with the reason when the device is beyond help.
    """

    def __init__(
        self,
        device: torch.device,
        scheduler: Scheduler,
        launch: Callable[[Group], Callable[[], Times]],
        metrics: Metrics,
        *,
        num_special: int = 1,
        lookahead: int | None = None,
        on_group: Callable[[Group, float], None] = lambda group, seconds: None,
        on_computed: Callable[[Sequence[Picture]], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.metrics = metrics
        self.lookahead = int(device.type == "cuda") if lookahead is None else lookahead
        self.busy_since: float | None = None  # since when the oldest group has been on the device; None when idle
        self._scheduler = scheduler
        self._device = device
        self._launch_group = launch
        self._num_special = num_special
        self._on_group = on_group
        self._on_computed = on_computed
        self._on_lost = on_lost
        self._inbox: queue.SimpleQueue[Sequence[Window] | None] = queue.SimpleQueue()
        self._running: deque[Group] = deque()  # on the device, oldest first
        self._again: deque[Group] = deque()  # failed groups, in smaller ones
        self._numbers = itertools.count(1)
        self._draining = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, windows: Sequence[Window]) -> None:
        """Have the windows of a picture computed; called by other threads."""
        self.metrics.waiting(windows[0].lane, len(windows), sum(window.length for window in windows))
        self._inbox.put(windows)

    def close(self) -> None:
        """Compute what was added, then end."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def died(self) -> bool:
        """The thread ended, and nobody had asked for it."""
        return not self._thread.is_alive() and not self._draining

    def _loop(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # events and kernels of this thread are the current device's
        while self._receive():
            self._step()

    def _step(self) -> None:
        """Schedule a group, run it, and route the windows of the oldest group on the device once it is through."""
        for window in self._scheduler.remove_ended():
            self.metrics.waiting(window.lane, -1, -window.length)

        # schedule
        if self._again:  # when nothing else holds memory
            group = None if self._running else self._again.popleft()
        else:
            now = monotonic()
            group = self._scheduler.next_group(now, idle=not self._running)
            if group is not None:
                self.metrics.released(group, now)

        # run
        if group is not None:
            self._launch(group)
        if not self._running or (group is not None and len(self._running) <= self.lookahead):
            return
        group = self._running.popleft()
        times = self._wait(group)
        if times is None:
            return

        # route
        self._record(group, *times)
        if group.lane.merges:
            lane = group.lane.next
            for window in group.windows:
                window.lane, window.length = lane, window.lengths[-1] + self._num_special
            self.metrics.waiting(lane, len(group.windows), sum(window.length for window in group.windows))
            self._scheduler.add(group.windows, monotonic())
        else:
            self._finish(group)

    def _receive(self) -> bool:
        """Move what came into the scheduler, waiting if there is nothing else to do; False when all is done."""
        if not self._running:
            self.busy_since = None
        while not self._inbox.empty() or not (self._has_work() or self._draining):
            windows = self._inbox.get()
            if windows is None:
                self._draining = True
            else:
                self._scheduler.add(windows, monotonic())
        return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._running or self._again or len(self._scheduler))

    def _launch(self, group: Group) -> None:
        group.alone = not self._running
        if group.alone:
            self.busy_since = monotonic()
        try:
            group.finish = self._launch_group(group)
            self._running.append(group)
        except Exception as error:
            self._retry(group, error)

    def _wait(self, group: Group) -> Times | None:
        """Wait for a group; its times, or None if it failed."""
        assert group.finish is not None
        try:
            return group.finish()
        except Exception as error:
            self._retry(group, error)
            return None
        finally:
            group.finish = None
            self.busy_since = monotonic()  # for the next one, which ran behind it

    def _retry(self, group: Group, error: Exception) -> None:
        """Have a group that failed run alone, or else its halves, so that only the windows at fault fail.

        Not now: the error's traceback keeps all that the attempt had allocated.
        """
        windows, half = group.windows, len(group.windows) // 2
        if isinstance(error, torch.AcceleratorError):  # every further call on the device fails too
            self._on_lost(f"the device failed: {error}")
        elif not group.alone:
            self._again.append(group)
        elif half == 0:
            picture = windows[0].picture
            name = picture.options.request_id
            logger.error("request %s failed at stage %d", name, group.lane.stage, exc_info=error)
            picture.fail(internal_error("computing the picture failed"))
        else:
            self._again.extendleft(Group(group.lane, some, group.reason) for some in (windows[half:], windows[:half]))

    def _record(self, group: Group, seconds: float, merge_seconds: float | None) -> None:
        """Account for a group; pictures that share one take its whole time each."""
        self._on_group(group, seconds)
        stop, stage = monotonic(), group.lane.stage
        pictures = group.by_picture()
        described = (next(self._numbers), len(group.windows), len(pictures))
        for picture, windows in pictures.items():
            picture.seconds["compute"] += seconds - (merge_seconds or 0.0)
            picture.seconds["merge"] += merge_seconds or 0.0
            span = picture.request.span
            span.stage(group.lane, described, [window.lengths for window in windows], stop, seconds, merge_seconds)
        tokens_in = [window.lengths[stage] for window in group.windows]
        tokens_out = sum(window.lengths[-1] for window in group.windows)
        self.metrics.computed(
            group.lane, tokens_in, tokens_out, seconds, merge_seconds, padding_tokens=group.padding_tokens
        )

    def _finish(self, group: Group) -> None:
        """Hand on the pictures that had their last windows in a group."""
        computed = []
        for picture, windows in group.by_picture().items():
            picture.num_left -= len(windows)
            if not all(window.is_finite for window in windows):
                logger.error("request %s: the network gave non-finite logits", picture.options.request_id)
                picture.fail(internal_error("the network found no finite answer"))
            elif not picture.num_left and not picture.is_over:
                busy = picture.seconds["compute"] + picture.seconds["merge"]
                picture.seconds["queue"] = max(0.0, monotonic() - picture.ready_at - busy)
                computed.append(picture)
        if computed:
            self._on_computed(computed)
