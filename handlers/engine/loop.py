"""The loop on the device: schedule -> run -> route, until all is computed."""

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import torch

from handlers.observe.metrics import Metrics

from .computing import Launch, Times
from .grouping import worth_streams
from .request import Group, Picture, Window, internal_error
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class Loop:
    """Keeps the device busy with what waits, in a thread of its own from `start` to `close`.

    A GPU runs on while the host waits for nothing, so there the next group is launched behind the one that runs,
    if it would not gain from waiting: a lane is full, or its oldest window has waited long enough. Elsewhere what a
    group computed is in the scheduler before the next is chosen, unless groups run side by side on streams, which
    share the device: as long as enough windows wait for that, see `worth_streams`.

    Args:
        device: that computes.
        scheduler: what waits.
        launch: see `Computer.launch`; on the whole device.
        metrics: of the engine; may be replaced at any time.
        streams: the same on a part of the device each; may be replaced while nothing is computed.
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
        launch: Launch,
        metrics: Metrics,
        *,
        streams: Sequence[Launch] = (),
        num_special: int = 1,
        lookahead: int | None = None,
        on_group: Callable[[Group, float], None] = lambda group, seconds: None,
        on_computed: Callable[[Sequence[Picture]], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.metrics = metrics
        self.streams = streams
        self.lookahead = int(device.type == "cuda") if lookahead is None else lookahead
        self.busy_since: float | None = None  # since when the oldest group has been on the device; None when idle
        self._scheduler = scheduler
        self._device = device
        self._launch_group = launch
        self._num_special = num_special
        self._on_group = on_group
        self._on_computed = on_computed
        self._on_lost = on_lost
        self._inbox: queue.SimpleQueue[Sequence[Window] | Group | None] = queue.SimpleQueue()
        self._running: deque[Group] = deque()  # on the device, oldest first
        self._spread = False  # what runs is on streams
        self._through: deque[Group] = deque()  # of those on streams
        self._again: deque[Group] = deque()  # failed groups, in smaller ones
        self._numbers = itertools.count(1)
        self._draining = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        # torch's own threads would compute beside the other streams
        self._threads = ThreadPoolExecutor(len(streams) or 1, "stream", torch.set_num_threads, (1,))

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
        self._threads.shutdown()

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
        """Schedule a group, run it, and route the windows of one that is through."""
        for window in self._scheduler.remove_ended():
            self.metrics.waiting(window.lane, -1, -window.length)

        # schedule
        group = None
        if not self._running:
            self._spread = not self._again and worth_streams(len(self._scheduler), len(self.streams))
        if self._again:  # when nothing else holds memory
            group = None if self._running else self._again.popleft()
        elif self._has_room():
            now = monotonic()
            group = self._scheduler.next_group(now, idle=self._spread or not self._running)
            if group is not None:
                self.metrics.released(group, now)

        # run
        if group is not None:
            self._launch(group)
            if self._has_room():
                return
        group = self._ended()
        times = None if group is None else self._wait(group)
        if group is None or times is None:
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
        """Take what came in, waiting if there is nothing else to do; False when all is done."""
        if not self._running:
            self.busy_since = None
        while not self._inbox.empty() or not (self._can_go_on() or (self._draining and not self._running)):
            came = self._inbox.get()
            if came is None:
                self._draining = True
            elif isinstance(came, Group):
                self._through.append(came)
            else:
                self._scheduler.add(came, monotonic())
        return self._can_go_on()

    def _can_go_on(self) -> bool:
        """A group can be launched, or routed."""
        ended = self._through if self._spread else self._running
        waits = not self._running if self._again else len(self._scheduler) and self._has_room()
        return bool(ended or waits)

    def _has_room(self) -> bool:
        """Another group may run beside those that do, or behind."""
        return len(self._running) < len(self.streams) if self._spread else len(self._running) <= self.lookahead

    def _launch(self, group: Group) -> None:
        group.alone = not self._running
        group.began = monotonic()
        group.stream = self._free_stream() if self._spread else None
        group.share = 1 / len(self.streams) if self._spread else 1.0
        if group.alone:
            self.busy_since = group.began
        try:
            group.finish = self._launch_group(group) if group.stream is None else self._launch_on(group.stream, group)
            self._running.append(group)
        except Exception as error:
            self._retry(group, error)

    def _launch_on(self, stream: int, group: Group) -> Callable[[], Times]:
        for other in self._running:
            other.alone = False
        done = self._threads.submit(lambda: self.streams[stream](group)())
        done.add_done_callback(lambda _: self._inbox.put(group))
        return done.result

    def _free_stream(self) -> int:
        return min({*range(len(self.streams))} - {group.stream for group in self._running})

    def _ended(self) -> Group | None:
        """The group to be waited for next: on streams one that is through, elsewhere the oldest."""
        if not self._spread:
            return self._running.popleft() if self._running else None
        if not self._through:
            return None
        group = self._through.popleft()
        self._running.remove(group)
        return group

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
            # one behind it ran from now on, one beside it runs as long as it does
            self.busy_since = self._running[0].began if self._spread and self._running else monotonic()

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
        """Account for a group; pictures that share one take its whole time each, and what runs side by side once."""
        self._on_group(group, seconds)
        stop, stage = monotonic(), group.lane.stage
        pictures = group.by_picture()
        described = (next(self._numbers), len(group.windows), len(pictures))
        for picture, windows in pictures.items():
            part = 1.0
            if group.stream is not None and seconds:
                end = group.began + seconds
                part = max(0.0, end - max(group.began, picture.computed_until)) / seconds
                picture.computed_until = max(end, picture.computed_until)
            picture.seconds["compute"] += part * (seconds - (merge_seconds or 0.0))
            picture.seconds["merge"] += part * (merge_seconds or 0.0)
            span = picture.request.span
            span.stage(group.lane, described, [window.lengths for window in windows], stop, seconds, merge_seconds)
        tokens_in = [window.lengths[stage] for window in group.windows]
        tokens_out = sum(window.lengths[-1] for window in group.windows)
        self.metrics.computed(
            group.lane,
            tokens_in,
            tokens_out,
            seconds * group.share,
            None if merge_seconds is None else merge_seconds * group.share,
            padding_tokens=group.padding_tokens,
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
