"""The loop with a device that only pretends: in which order it does what, and what becomes of failures."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from making import make_picture, make_window

from handlers.engine.computing import Times
from handlers.engine.lane import Lane
from handlers.engine.loop import Loop
from handlers.engine.request import Group, Picture, Window
from handlers.engine.scheduler import Scheduler
from handlers.observe.metrics import Metrics

CPU = torch.device("cpu")
LANE = Lane(0, "off", 1)
MERGES = Lane(0, "1", 2)
NEVER = 1e9  # seconds


def waiting(number: int, lane: Lane = LANE) -> Window:
    """The only window of a picture."""
    return make_window(make_picture(str(number), lane=lane, arrived=float(number)), lane)


def numbers(group: Group) -> tuple[int, ...]:
    return tuple(int(window.picture.arrived) for window in group.windows)


class Bench:
    """A loop, what it had computed, and what it handed on.

    Args:
        lookahead: of the loop.
        run: what the device does with a group, in a thread that runs one after the other, as a stream does.
        start: what the host does to launch one; it may raise.
        delay: how long windows wait for mates while the device is busy.
        streams: beside each other, instead of the device, if enough waits; each has a thread of the loop's.
    """

    def __init__(
        self,
        lookahead: int,
        *,
        run: Callable[[tuple[int, ...]], object] = lambda group: None,
        start: Callable[[tuple[int, ...]], object] = lambda group: None,
        delay: float = NEVER,
        streams: int = 0,
    ) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.groups: list[tuple[tuple[int, ...], str]] = []
        self.computed: list[int] = []
        self.lost: list[str] = []
        self._run, self._start = run, start
        self._stream = ThreadPoolExecutor(1, "stream")
        most = 1 if streams else 2
        scheduler = Scheduler(max_batch_tokens=10**6, max_group_windows=most, max_group_delay=delay, bulk_patience=0)
        self.metrics = Metrics("test", grid=3, info={})
        self.loop = Loop(
            CPU,
            scheduler,
            self._launch,
            self.metrics,
            streams=[partial(self._launch_on, i) for i in range(streams)],
            lookahead=lookahead,
            on_group=lambda group, seconds: self.groups.append((numbers(group), group.reason)),
            on_computed=self._computed,
            on_lost=self.lost.append,
        )

    def _launch(self, group: Group) -> Callable[[], Times]:
        who = numbers(group)
        self.events.append(("launch", *who))
        self._start(who)
        done = self._stream.submit(self._run, who)

        def finish() -> Times:
            self.events.append(("finish", *who))
            done.result(30)
            if group.lane.merges:
                for window in group.windows:
                    window.lengths.append(4)
                return 1.0, 0.25
            return 1.0, None

        return finish

    def _launch_on(self, stream: int, group: Group) -> Callable[[], Times]:
        who = numbers(group)
        self.events.append(("stream", *who))
        self._start(who)
        self._run(who)
        if group.lane.merges:
            group.windows[0].lengths.append(4)
        return lambda: (1.0, 0.25 if group.lane.merges else None)

    def _computed(self, pictures: Sequence[Picture]) -> None:
        self.computed += [int(picture.arrived) for picture in pictures]

    def compute(self, *windows: Window) -> None:
        """Compute all of them, which wait before the thread starts, and end."""
        self.loop.add(list(windows))
        self.loop.start()
        self.close()

    def close(self) -> None:
        self.loop.close()
        self._stream.shutdown()

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model": "test"} | labels)


def errors_of(windows: Sequence[Window]) -> dict[int, str]:
    return {
        int(window.picture.arrived): str(window.picture.request.exception())
        for window in windows
        if window.picture.request.done()
    }


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for one in made:
        if one.loop._thread.is_alive():
            one.close()


def test_where_groups_are_launched_ahead() -> None:
    scheduler = Scheduler(max_batch_tokens=1, max_group_windows=1, max_group_delay=0, bulk_patience=0)
    nothing: Any = lambda *_: None  # noqa: E731
    for device, expected in (("cuda:1", 1), ("cpu", 0)):
        loop = Loop(torch.device(device), scheduler, nothing, nothing, on_computed=nothing, on_lost=nothing)
        assert loop.lookahead == expected


def test_without_lookahead_a_group_is_through_before_the_next_is_launched(bench: Callable[..., Bench]) -> None:
    device = bench(0)
    device.compute(*map(waiting, range(5)))
    assert device.events == [(step, *group) for group in ((0, 1), (2, 3), (4,)) for step in ("launch", "finish")]
    assert device.groups == [((0, 1), "full"), ((2, 3), "full"), ((4,), "idle")]
    assert device.computed == [0, 1, 2, 3, 4]


def test_the_next_group_is_launched_before_the_one_that_runs_is_through(bench: Callable[..., Bench]) -> None:
    launched = threading.Event()

    def run(group: tuple[int, ...]) -> None:
        if group == (0, 1):
            assert launched.wait(20), "nothing was launched behind the first group"

    def start(group: tuple[int, ...]) -> None:
        if group == (2, 3):
            launched.set()

    device = bench(1, run=run, start=start)
    device.compute(*map(waiting, range(6)))
    assert device.events == [
        ("launch", 0, 1),
        ("launch", 2, 3),
        ("finish", 0, 1),
        ("launch", 4, 5),
        ("finish", 2, 3),
        ("finish", 4, 5),
    ]
    assert device.computed == [0, 1, 2, 3, 4, 5]


def test_what_would_gain_from_waiting_is_not_launched_behind(bench: Callable[..., Bench]) -> None:
    device = bench(1)
    device.compute(*map(waiting, range(3)))
    assert device.events == [("launch", 0, 1), ("finish", 0, 1), ("launch", 2), ("finish", 2)]
    assert device.groups[-1] == ((2,), "idle")


def test_what_has_waited_long_enough_is_launched_behind(bench: Callable[..., Bench]) -> None:
    device = bench(1, delay=0)
    device.compute(*map(waiting, range(3)))
    assert device.events == [("launch", 0, 1), ("launch", 2), ("finish", 0, 1), ("finish", 2)]
    assert device.groups[-1] == ((2,), "delay")


def test_what_a_group_merged_can_go_on_behind_the_next(bench: Callable[..., Bench]) -> None:
    device = bench(1)
    windows = [waiting(n, MERGES) for n in range(4)]
    device.compute(*windows)
    assert device.events == [
        ("launch", 0, 1),
        ("launch", 2, 3),
        ("finish", 0, 1),
        ("launch", 0, 1),
        ("finish", 2, 3),
        ("launch", 2, 3),
        ("finish", 0, 1),
        ("finish", 2, 3),
    ]
    assert device.computed == [0, 1, 2, 3]
    assert {(window.lane, window.length) for window in windows} == {(Lane(1, "1", 2), 5)}
    for window in windows:
        assert (window.picture.seconds["compute"], window.picture.seconds["merge"]) == (1.75, 0.25)
    for stage, tokens in (("0", 36), ("1", 16)):
        assert device.value("mpm_tokens_total", point="in", stage=stage, schedule="1") == tokens
        assert device.value("mpm_tokens_total", point="out", stage=stage, schedule="1") == 16
        assert device.value("mpm_waiting_windows", stage=stage, schedule="1") == 0
    assert device.value("mpm_waiting_tokens") == 0


def test_a_picture_goes_on_with_its_last_window(bench: Callable[..., Bench]) -> None:
    device = bench(0)
    picture = make_picture("0", lane=LANE)
    device.compute(*(make_window(picture, LANE) for _ in range(5)))
    assert [len(group) for group, _ in device.groups] == [2, 2, 1]
    assert device.computed == [0]
    assert picture.seconds["compute"] == 3.0


def test_a_window_without_finite_logits_fails_its_picture(bench: Callable[..., Bench]) -> None:
    device = bench(0)
    windows = [waiting(n) for n in range(3)]
    windows[1].is_finite = False
    device.compute(*windows)
    assert device.computed == [0, 2]
    assert errors_of(windows) == {1: "the network found no finite answer"}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_padding_of_each_group_is_counted_once(lookahead: int, bench: Callable[..., Bench]) -> None:
    device = bench(lookahead)
    launch = device.loop._launch_group

    def padded(group: Group) -> Callable[[], Times]:
        group.padding_tokens = 10 ** min(numbers(group))
        return launch(group)

    device.loop._launch_group = padded
    device.compute(*map(waiting, range(4)))
    assert device.value("mpm_padding_tokens_total") == 101


def fail_together(group: tuple[int, ...]) -> None:
    """A window that spoils every group that it is in."""
    if 3 in group:
        raise RuntimeError("three")


@pytest.mark.parametrize("where", ["start", "run"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_only_the_window_at_fault_fails(bench: Callable[..., Bench], lookahead: int, where: str) -> None:
    device = bench(lookahead, **{where: fail_together})
    windows = [waiting(n) for n in range(8)]
    device.compute(*windows)
    assert errors_of(windows) == {3: "computing the picture failed"}
    assert sorted(device.computed) == [0, 1, 2, 4, 5, 6, 7]
    finished = [event[1:] for event in device.events if event[0] == "finish"]
    assert finished.count((0, 1)) == 1, "the group before was left alone"
    assert device.lost == []


def test_what_failed_behind_another_group_is_tried_alone_before_it_is_halved(bench: Callable[..., Bench]) -> None:
    """The group in flight may have had the memory that was missing."""
    device = bench(1)

    def start(group: tuple[int, ...]) -> None:
        if device.loop._running:
            raise torch.OutOfMemoryError("no room for two")

    device._start = start
    windows = [*map(waiting, range(4)), waiting(9)]
    device.compute(*windows)
    assert errors_of(windows) == {}
    assert device.computed == [0, 1, 2, 3, 9]
    assert device.events[:4] == [("launch", 0, 1), ("launch", 2, 3), ("finish", 0, 1), ("launch", 2, 3)]


def test_nothing_is_launched_behind_what_is_left_of_a_failed_group(bench: Callable[..., Bench]) -> None:
    device = bench(1, run=fail_together)
    device.compute(*map(waiting, range(2, 6)))
    assert device.events == [
        ("launch", 2, 3),
        ("launch", 4, 5),
        ("finish", 2, 3),  # fails
        ("finish", 4, 5),
        ("launch", 2),
        ("finish", 2),
        ("launch", 3),
        ("finish", 3),
    ]


@pytest.mark.parametrize("where", ["start", "run"])
def test_a_poisoned_device_is_given_up_at_once(bench: Callable[..., Bench], where: str) -> None:
    def poison(group: tuple[int, ...]) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    device = bench(1, **{where: poison})
    windows = [*map(waiting, range(2))]
    device.compute(*windows)
    assert device.lost == ["the device failed: an illegal memory access was encountered"]
    assert errors_of(windows) == {}, "all of them fail together"
    assert len([event for event in device.events if event[0] == "launch"]) == 1


def test_requests_that_are_over_are_not_launched_but_what_runs_is_finished(bench: Callable[..., Bench]) -> None:
    windows = [waiting(n) for n in range(6)]

    def start(group: tuple[int, ...]) -> None:
        if group == (2, 3):
            for n in (0, 3, 4):
                windows[n].picture.request.cancel()

    device = bench(1, start=start)
    device.compute(*windows)
    assert [event[1:] for event in device.events if event[0] == "finish"] == [(0, 1), (2, 3), (5,)]
    assert device.computed == [1, 2, 5]
    assert device.value("mpm_waiting_tokens") == 0


def test_the_watchdog_sees_the_oldest_group_in_flight(bench: Callable[..., Bench]) -> None:
    gates = {(0, 1): threading.Event(), (2, 3): threading.Event()}
    launched = threading.Event()
    since: list[float | None] = []

    def start(group: tuple[int, ...]) -> None:
        since.append(device.loop.busy_since)
        if group == (2, 3):
            launched.set()

    device = bench(1, run=lambda group: gates[group].wait(20), start=start)
    device.loop.add([waiting(n) for n in range(4)])
    before = time.monotonic()
    device.loop.start()
    assert launched.wait(20)
    both = since[0]
    assert device.loop.busy_since == since[1] == both, "a launch behind another group is no progress"
    assert both is not None
    assert before <= both < time.monotonic()
    through = time.monotonic()
    gates[0, 1].set()
    while (later := device.loop.busy_since) == both:
        time.sleep(0.001)
    assert later is not None, "the second group runs"
    assert later >= through, "its time counts from the end of the one before"
    gates[2, 3].set()
    while device.loop.busy_since is not None:
        time.sleep(0.001)
    device.close()
    assert not device.loop.died


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_told_from_one_that_ended(bench: Callable[..., Bench]) -> None:
    def die(group: tuple[int, ...]) -> None:
        raise SystemExit

    device = bench(1, start=die)
    device.loop.add([waiting(0)])
    assert device.events == []
    device.loop.start()
    device.loop._thread.join(20)
    assert device.loop.died
    ended = bench(1)
    ended.compute(waiting(0))
    assert not ended.loop.died


def test_closing_computes_what_was_added_and_what_follows_from_it(bench: Callable[..., Bench]) -> None:
    device = bench(1, run=lambda group: time.sleep(0.01))
    device.compute(*(waiting(n, MERGES) for n in range(20)))
    assert sorted(device.computed) == [*range(20)]
    assert len([event for event in device.events if event[0] == "finish"]) == 20
    assert not device.loop._running


# Streams


class Gates:
    """Holds groups up until they are let go; says who computes."""

    def __init__(self) -> None:
        self.inside: set[tuple[int, ...]] = set()
        self._open: set[tuple[int, ...]] = set()
        self._changed = threading.Condition()

    def __call__(self, group: tuple[int, ...]) -> None:
        with self._changed:
            self.inside.add(group)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: group in self._open, 20)
            self._open.remove(group)
            self.inside.remove(group)

    def wait(self, *groups: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.inside == {(group,) for group in groups}, 20), self.inside

    def let(self, *groups: int) -> None:
        with self._changed:
            self._open |= {(group,) for group in groups}
            self._changed.notify_all()


def test_a_window_alone_has_all_cores_and_several_have_one_each(bench: Callable[..., Bench]) -> None:
    gates = Gates()
    device = bench(0, run=gates, streams=2)
    device.loop.start()
    device.loop.add([waiting(0)])
    gates.wait(0)
    device.loop.add([waiting(1), waiting(2), waiting(3)])
    gates.let(0)
    gates.wait(1, 2)
    gates.let(2)
    gates.wait(1, 3)  # which stream is through makes no difference
    gates.let(1, 3)
    gates.wait()
    while device.loop.busy_since is not None:
        time.sleep(0.001)
    device.loop.add([waiting(4)])
    gates.let(4)
    device.close()
    assert [event for event in device.events if event[0] != "finish"] == [
        ("launch", 0),
        ("stream", 1),
        ("stream", 2),
        ("stream", 3),
        ("launch", 4),
    ]
    assert sorted(device.computed) == [*range(5)]
    assert device.computed.index(2) < device.computed.index(1)
    seconds = device.value("mpm_stage_seconds_sum", stage="0", schedule="off")
    assert seconds == 2 * 1.0 + 3 * 0.5, "a stream's second is half of the device's"


def test_what_comes_while_a_stream_is_free_starts_at_once(bench: Callable[..., Bench]) -> None:
    gates = Gates()
    device = bench(0, run=gates, streams=2)
    device.loop.add([waiting(0), waiting(1)])
    device.loop.start()
    gates.wait(0, 1)
    gates.let(0)
    gates.wait(1)
    device.loop.add([waiting(2)])
    gates.wait(1, 2)
    gates.let(1, 2)
    device.close()
    assert sorted(device.computed) == [0, 1, 2]


def test_what_merged_on_a_stream_goes_on_and_closing_waits_for_all_streams(bench: Callable[..., Bench]) -> None:
    device = bench(0, run=lambda group: time.sleep(0.002), streams=3)
    device.compute(*(waiting(n, MERGES) for n in range(20)))
    assert sorted(device.computed) == [*range(20)]
    assert not device.loop._running
    assert device.value("mpm_tokens_total", point="in", stage="1", schedule="1") == 20 * 4
    assert device.value("mpm_waiting_tokens") == 0


@pytest.mark.parametrize("where", ["start", "run"])
def test_a_window_that_fails_on_a_stream_fails_alone(bench: Callable[..., Bench], where: str) -> None:
    device = bench(0, streams=2, **{where: fail_together})
    windows = [waiting(n) for n in range(8)]
    device.compute(*windows)
    assert errors_of(windows) == {3: "computing the picture failed"}
    assert sorted(device.computed) == [0, 1, 2, 4, 5, 6, 7]
    assert device.lost == []


def test_what_failed_beside_others_is_tried_again_on_the_whole_device(bench: Callable[..., Bench]) -> None:
    """They may have had the memory that was missing, whichever began first."""
    gates = Gates()

    def run(group: tuple[int, ...]) -> None:
        gates(group)
        if group == (0,) and len(device.loop._running) > 1:
            raise MemoryError

    device = bench(0, run=run, streams=2)
    windows = [waiting(0), waiting(1)]
    device.loop.add(windows)
    device.loop.start()
    gates.wait(0, 1)
    gates.let(0)
    gates.wait(1)
    gates.let(1)
    gates.wait(0)
    gates.let(0)
    device.close()
    assert errors_of(windows) == {}
    assert device.events[-2:] == [("launch", 0), ("finish", 0)]
    assert device.value("mpm_stage_seconds_sum", stage="0", schedule="off") == 1.5


def test_a_device_poisoned_on_a_stream_is_given_up(bench: Callable[..., Bench]) -> None:
    def poison(group: tuple[int, ...]) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    device = bench(0, run=poison, streams=2)
    device.compute(waiting(0), waiting(1))
    assert set(device.lost) == {"the device failed: an illegal memory access was encountered"}


def test_the_watchdog_sees_the_oldest_stream(bench: Callable[..., Bench]) -> None:
    gates = Gates()
    device = bench(0, run=gates, streams=2)
    device.loop.add([waiting(n) for n in range(5)])
    before = time.monotonic()
    device.loop.start()
    gates.wait(0, 1)
    began = device.loop.busy_since
    assert began is not None
    assert before <= began
    for n in (1, 2, 3):  # the other stream makes progress
        gates.let(n)
        gates.wait(0, n + 1)
        assert device.loop.busy_since == began
    gates.let(0)
    gates.wait(4)
    while (later := device.loop.busy_since) == began:
        time.sleep(0.001)
    assert later is not None
    assert later > began
    gates.let(4)
    device.close()


def test_requests_that_end_while_they_run_on_a_stream_are_not_handed_on(bench: Callable[..., Bench]) -> None:
    gates = Gates()
    device = bench(0, run=gates, streams=2)
    windows = [waiting(n, MERGES) for n in range(3)]
    device.loop.add(windows)
    device.loop.start()
    gates.wait(0, 1)
    for n in (0, 2):
        windows[n].picture.request.cancel()
    gates.let(0, 1)
    gates.wait(1)  # its last stage
    gates.let(1)
    device.close()
    assert device.computed == [1]


def test_a_picture_s_windows_side_by_side_take_their_time_once(bench: Callable[..., Bench]) -> None:
    device = bench(0, streams=2)
    picture = make_picture("0", lane=LANE)
    device.compute(*(make_window(picture, LANE) for _ in range(2)))
    assert device.computed == [0]
    assert 1.0 <= picture.seconds["compute"] < 1.9, "both took a second, from about the same moment"


def test_nobody_starves_on_a_virtual_clock() -> None:
    """A device of one second a group: two stages of three windows each, and a window a second."""
    scheduler = Scheduler(max_batch_tokens=40, max_group_windows=3, max_group_delay=2.0, bulk_patience=30.0)
    arrivals = [waiting(n, MERGES) for n in range(200)]
    now, longest = 0.0, 0.0
    done: list[int] = []
    while len(done) < 200:
        due = [window for window in arrivals if window.picture.arrived <= now]
        arrivals = arrivals[len(due) :]
        scheduler.add(due, now)
        group = scheduler.next_group(now)
        if group is None:
            now += 0.5
            continue
        now += 1.0
        if group.lane.stage == 1:
            longest = max(longest, *(now - window.picture.arrived for window in group.windows))
            done += numbers(group)
            continue
        for window in group.windows:
            window.lane, window.length = Lane(1, "1", 2), 5
        scheduler.add(group.windows, now)
    assert sorted(done) == [*range(200)]
    assert longest < 30, "nobody starves at two thirds of capacity"
