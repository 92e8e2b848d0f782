"""When a run can't keep its promises any more."""

import math

from loadtest.client.hope import Hope
from loadtest.client.masks import OK
from loadtest.client.records import Record


def record(seconds: float, outcome: str = OK, kind: str = "png") -> Record:
    return Record(0, 0.0, 0.0, seconds, outcome, kind, "a.jpg")


def test_a_promise_allows_some_to_break_it() -> None:
    hope = Hope("p90=1s", 20)
    for _ in range(2):  # a tenth
        hope.learn(record(2.0))
    assert hope.holds([])
    assert hope.holds([0.9, 0.5])
    assert not hope.holds([1.1, 0.5])  # what is in flight is too old already
    hope.learn(record(0.1, "status 503"))  # fast, but no answer
    assert not hope.holds([])


def test_errors_break_no_latency_and_what_is_bad_no_promise() -> None:
    hope = Hope("errors=5%", 20)
    hope.learn(record(math.inf, "timeout"))
    hope.learn(record(9.0, "wrong: status 200", kind="bad"))
    assert hope.holds([1000.0])
    hope.learn(record(0.1, "status 500"))
    assert not hope.holds([])


def test_nothing_promised() -> None:
    hope = Hope("", 0)
    hope.learn(record(9.0, "timeout"))
    assert hope.holds([9.0])
