"""The device's thread with a device that only pretends: in which order it does what, and what becomes of failures."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from handlers.api.options import RequestOptions
from handlers.engine.admission import Ticket
from handlers.engine.computing import Times
from handlers.engine.loop import DeviceThread
from handlers.engine.scheduler import Group, Lane, Scheduler, Waiting
from handlers.engine.work import Request, Window
from handlers.observe.tracing import NO_SPAN

CPU = torch.device("cpu")
LANE = Lane(0, (1,))
NEVER = 1e9  # seconds


def waiting(number: int, lane: Lane = LANE) -> Waiting[Window]:
    request = Request(
        RequestOptions(request_id=str(number)), lane.schedule, Future(), float(number), Ticket(0, 0), NO_SPAN
    )
    return Waiting(lane, 10, request.arrived, False, Window(request, None, [10]))


def numbers(group: Group[Window]) -> tuple[int, ...]:
    return tuple(int(member.arrived) for member in group.members)


class Bench:
    """A device's thread, what it was told to compute, and what it told.

    Args:
        lookahead: of the thread.
        run: what the device does with a group, in a thread that runs one after the other, as a stream does.
        start: what the host does to launch one; it may raise.
        delay: how long windows wait for mates while the device is busy.
    """

    def __init__(
        self,
        lookahead: int,
        *,
        run: Callable[[tuple[int, ...]], object] = lambda group: None,
        start: Callable[[tuple[int, ...]], object] = lambda group: None,
        delay: float = NEVER,
    ) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.computed: list[tuple[int, ...]] = []
        self.failed: list[tuple[int, int, str]] = []
        self.removed: list[int] = []
        self.released: list[tuple[tuple[int, ...], str]] = []
        self.lost: list[str] = []
        self.route: Callable[[Group[Window]], None] = lambda group: None
        self._run, self._start = run, start
        self._stream = ThreadPoolExecutor(1, "stream")
        self.scheduler: Scheduler[Window] = Scheduler(
            max_batch_tokens=10**6, max_group_windows=2, pool_windows=2, max_group_delay=delay, bulk_patience=0
        )
        self.thread = DeviceThread(
            CPU,
            self.scheduler,
            self._launch,
            lookahead=lookahead,
            on_removed=lambda windows: self.removed.extend(int(w.arrived) for w in windows),
            on_released=lambda group, now: self.released.append((numbers(group), group.reason)),
            on_computed=self._computed,
            on_failed=lambda window, stage, error: self.failed.append(
                (int(window.request.arrived), stage, str(error))
            ),
            on_lost=self.lost.append,
        )

    def _launch(self, group: Group[Window]) -> Callable[[], Times]:
        who = numbers(group)
        self.events.append(("launch", *who))
        self._start(who)
        done = self._stream.submit(self._run, who)

        def finish() -> Times:
            self.events.append(("finish", *who))
            done.result(30)
            return 1.0, None

        return finish

    def _computed(self, group: Group[Window], times: Times) -> None:
        assert times == (1.0, None)
        self.computed.append(numbers(group))
        self.route(group)

    def compute(self, *windows: Waiting[Window]) -> None:
        """Compute all of them, which wait before the thread starts, and end."""
        self.thread.add(list(windows))
        self.thread.start()
        self.close()

    def close(self) -> None:
        self.thread.close()
        self._stream.shutdown()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for one in made:
        if one.thread._thread.is_alive():
            one.close()


def test_where_groups_are_launched_ahead(bench: Callable[..., Bench]) -> None:
    scheduler = bench(0).scheduler
    hooks: dict[str, Any] = dict.fromkeys(
        ("on_removed", "on_released", "on_computed", "on_failed", "on_lost"), lambda *_: None
    )
    for device, expected in (("cuda:1", 1), ("cpu", 0)):
        assert DeviceThread(torch.device(device), scheduler, bench(0)._launch, **hooks).lookahead == expected


def test_without_lookahead_a_group_is_through_before_the_next_is_launched(bench: Callable[..., Bench]) -> None:
    device = bench(0)
    device.compute(*map(waiting, range(5)))
    assert device.events == [(step, *group) for group in ((0, 1), (2, 3), (4,)) for step in ("launch", "finish")]
    assert device.released == [((0, 1), "full"), ((2, 3), "full"), ((4,), "idle")]


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
    assert device.computed == [(0, 1), (2, 3), (4, 5)]


def test_what_would_gain_from_waiting_is_not_launched_behind(bench: Callable[..., Bench]) -> None:
    device = bench(1)
    device.compute(*map(waiting, range(3)))
    assert device.events == [("launch", 0, 1), ("finish", 0, 1), ("launch", 2), ("finish", 2)]
    assert device.released[-1] == ((2,), "idle")


def test_what_has_waited_long_enough_is_launched_behind(bench: Callable[..., Bench]) -> None:
    device = bench(1, delay=0)
    device.compute(*map(waiting, range(3)))
    assert device.events == [("launch", 0, 1), ("launch", 2), ("finish", 0, 1), ("finish", 2)]
    assert device.released[-1] == ((2,), "delay")


def test_what_a_group_computed_can_go_on_behind_the_next(bench: Callable[..., Bench]) -> None:
    device = bench(1)
    second = Lane(1, (1,))

    def route(group: Group[Window]) -> None:
        if group.lane.stage == 0:
            device.scheduler.add([waiting(10 + n, second) for n in numbers(group)], time.monotonic())

    device.route = route
    device.compute(*map(waiting, range(4)))
    assert device.events == [
        ("launch", 0, 1),
        ("launch", 2, 3),
        ("finish", 0, 1),
        ("launch", 10, 11),
        ("finish", 2, 3),
        ("launch", 12, 13),
        ("finish", 10, 11),
        ("finish", 12, 13),
    ]


def fail_together(group: tuple[int, ...]) -> None:
    """A window that spoils every group that it is in."""
    if 3 in group:
        raise RuntimeError("three")


@pytest.mark.parametrize("where", ["start", "run"])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_only_the_window_at_fault_fails(bench: Callable[..., Bench], lookahead: int, where: str) -> None:
    device = bench(lookahead, **{where: fail_together})
    device.compute(*map(waiting, range(8)))
    assert device.failed == [(3, 0, "three")]
    assert sorted(n for group in device.computed for n in group) == [0, 1, 2, 4, 5, 6, 7]
    finished = [event[1:] for event in device.events if event[0] == "finish"]
    assert finished.count((0, 1)) == 1, "the group before was left alone"
    assert device.lost == []


def test_what_failed_behind_another_group_is_tried_alone_before_it_is_halved(bench: Callable[..., Bench]) -> None:
    """The group in flight may have had the memory that was missing."""
    device = bench(1)

    def start(group: tuple[int, ...]) -> None:
        if device.thread._flying:
            raise torch.OutOfMemoryError("no room for two")

    device._start = start
    device.compute(*map(waiting, range(4)), waiting(9))
    assert device.failed == []
    assert device.computed == [(0, 1), (2, 3), (9,)]
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
    device.compute(*map(waiting, range(2)))
    assert device.lost == ["the device failed: an illegal memory access was encountered"]
    assert device.failed == []
    assert len([event for event in device.events if event[0] == "launch"]) == 1


def test_requests_that_are_over_are_not_launched_but_what_runs_is_finished(bench: Callable[..., Bench]) -> None:
    windows = [waiting(n) for n in range(6)]

    def start(group: tuple[int, ...]) -> None:
        if group == (2, 3):
            for n in (0, 3, 4):
                windows[n].payload.request.answer.cancel()

    device = bench(1, start=start)
    device.compute(*windows)
    assert device.computed == [(0, 1), (2, 3), (5,)]
    assert device.removed == [4]


def test_the_watchdog_sees_the_oldest_group_in_flight(bench: Callable[..., Bench]) -> None:
    gates = {(0, 1): threading.Event(), (2, 3): threading.Event()}
    launched = threading.Event()
    since: list[float | None] = []

    def start(group: tuple[int, ...]) -> None:
        since.append(device.thread.busy_since)
        if group == (2, 3):
            launched.set()

    device = bench(1, run=lambda group: gates[group].wait(20), start=start)
    device.thread.add([waiting(n) for n in range(4)])
    before = time.monotonic()
    device.thread.start()
    assert launched.wait(20)
    both = since[0]
    assert device.thread.busy_since == since[1] == both, "a launch behind another group is no progress"
    assert both is not None
    assert before <= both < time.monotonic()
    through = time.monotonic()
    gates[0, 1].set()
    while (later := device.thread.busy_since) == both:
        time.sleep(0.001)
    assert later is not None, "the second group runs"
    assert later >= through, "its time counts from the end of the one before"
    gates[2, 3].set()
    while device.thread.busy_since is not None:
        time.sleep(0.001)
    device.close()
    assert not device.thread.died


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_told_from_one_that_ended(bench: Callable[..., Bench]) -> None:
    def die(group: tuple[int, ...]) -> None:
        raise SystemExit

    device = bench(1, start=die)
    device.thread.add([waiting(0)])
    assert device.events == []
    device.thread.start()
    device.thread._thread.join(20)
    assert device.thread.died
    ended = bench(1)
    ended.compute(waiting(0))
    assert not ended.thread.died


def test_closing_computes_what_was_added_and_what_follows_from_it(bench: Callable[..., Bench]) -> None:
    device = bench(1, run=lambda group: time.sleep(0.01))
    last = Lane(1, (1,))

    def route(group: Group[Window]) -> None:
        if group.lane.stage == 0:
            device.scheduler.add([waiting(100 + n, last) for n in numbers(group)], time.monotonic())

    device.route = route
    device.compute(*map(waiting, range(20)))
    assert sorted(n for group in device.computed for n in group) == [*range(20), *range(100, 120)]
    assert not device.thread._flying
