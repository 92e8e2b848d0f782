from collections.abc import Callable

from making import make_picture, make_window

from handlers.engine.lane import Lane
from handlers.engine.request import Group, Window
from handlers.engine.scheduler import Scheduler

FIRST, SECOND = Lane(0, "2,5", 3), Lane(1, "2,5", 3)


def scheduler(bucket: Callable[[int], int] = lambda length: length) -> Scheduler:
    return Scheduler(
        max_batch_tokens=1000, max_group_windows=4, max_group_delay=0.02, bulk_patience=10.0, bucket=bucket
    )


def window(name: str, lane: Lane = FIRST, *, arrived: float = 0.0, length: int = 10, bulk: bool = False) -> Window:
    return make_window(make_picture(name, lane=lane, arrived=arrived, bulk=bulk), lane, length)


def names(group: Group | None) -> list[str]:
    assert group is not None
    return [window.picture.options.request_id for window in group.windows]


def test_nothing_waiting_releases_nothing() -> None:
    assert scheduler().next_group(0.0) is None


def test_a_busy_device_waits_for_mates_until_the_delay_is_over() -> None:
    s = scheduler()
    s.add([window("a")], now=0.0)
    assert s.next_group(0.01, idle=False) is None
    group = s.next_group(0.03, idle=False)
    assert names(group) == ["a"]
    assert group is not None
    assert group.reason == "delay"
    assert len(s) == 0


def test_an_idle_device_takes_what_there_is() -> None:
    s = scheduler()
    s.add([window("a")], now=0.0)
    group = s.next_group(0.001)
    assert group is not None
    assert (names(group), group.reason) == (["a"], "idle")


def test_a_busy_device_takes_a_full_lane_before_a_lane_that_may_still_gain_mates() -> None:
    s = scheduler()
    s.add([window("alone", SECOND, arrived=0.0), *(window(f"full{i}", arrived=0.001) for i in range(4))], now=0.001)
    group = s.next_group(0.002, idle=False)
    assert group is not None
    assert (names(group), group.reason) == (["full0", "full1", "full2", "full3"], "full")
    assert s.next_group(0.002, idle=False) is None


def test_what_is_half_done_goes_before_what_came_later() -> None:
    s = scheduler()
    s.add([window(f"later{i}", FIRST, arrived=0.5) for i in range(5)], now=0.5)  # full, and overdue by now
    s.add([window("half done", SECOND, arrived=0.1)], now=1.0)  # has only just been merged
    assert names(s.next_group(1.001)) == ["half done"]


def test_of_windows_that_came_together_the_deepest_goes_first() -> None:
    s = scheduler()
    s.add([window("first"), window("second", SECOND)], now=0.0)
    assert names(s.next_group(0.0)) == ["second"]


def test_an_older_window_in_an_earlier_stage_is_not_starved() -> None:
    s = scheduler()
    s.add([window("younger", SECOND, arrived=0.5)], now=1.0)
    s.add([window("older", FIRST, arrived=0.1)], now=1.0)
    assert names(s.next_group(2.0)) == ["older"]


def test_the_oldest_window_is_in_the_group_and_mates_of_its_bucket_come_first() -> None:
    s = scheduler(bucket=lambda length: -(-length // 32) * 32)
    lengths = [90, 10, 11, 91, 92, 12, 93]
    s.add([window(f"{n}.{i}", arrived=i, length=n) for i, n in enumerate(lengths)], now=0.0)
    assert names(s.next_group(0.0)) == ["90.0", "91.3", "92.4", "93.6"]
    assert names(s.next_group(0.0)) == ["10.1", "11.2", "12.5"]


def test_mergers_do_not_share_a_group() -> None:
    s = scheduler()
    s.add([window("merged", Lane(0, "2,5", 3)), window("plain", Lane(0, "off", 1))], now=0.0)
    assert len(names(s.next_group(0.0))) == 1
    assert len(names(s.next_group(0.0))) == 1


def test_bulk_gives_way_but_is_not_starved() -> None:
    s = scheduler()
    s.add([window("bulk", SECOND, arrived=0.0, bulk=True)], now=0.0)
    taken: list[str] = []
    now = 0.0
    while "bulk" not in taken:
        s.add([window("interactive", FIRST, arrived=now)], now=now)
        taken += names(s.next_group(now))
        now += 0.5
    assert taken.count("interactive") == 20  # half-second steps until its patience of 10 s is over


def test_bulk_fills_the_room_that_interactive_leaves() -> None:
    s = scheduler()
    s.add([window("bulk", arrived=0.0, bulk=True), window("interactive", arrived=1.0)], now=1.0)
    assert names(s.next_group(1.0)) == ["interactive", "bulk"]


def test_windows_of_pictures_that_are_over_are_forgotten() -> None:
    s = scheduler()
    stays, goes = window("stays"), window("goes")
    s.add([stays, goes], now=0.0)
    goes.picture.request.cancel()
    assert s.remove_ended() == [goes]
    assert names(s.next_group(0.0)) == ["stays"]
    assert s.next_group(0.0) is None
