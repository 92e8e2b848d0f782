import threading
import time

import pytest
from making import make_picture

from handlers.engine.admission import Admission
from handlers.engine.request import Picture
from handlers.errors import ErrorKind, ServingError


def holding(tokens: int, size: int) -> Picture:
    return make_picture(tokens=tokens, held_bytes=size)


def enter(admission: Admission, *pictures: Picture) -> ServingError | None:
    """The refusal, if there is one."""
    try:
        admission.enter(pictures)
    except ServingError as error:
        return error if error.kind is ErrorKind.OVERLOADED else None
    return None


def test_a_batch_enters_as_one() -> None:
    admission = Admission(100, 10**6, 60)
    alone = holding(40, 0)
    assert not enter(admission, alone)
    assert enter(admission, holding(30, 0), holding(31, 0))
    assert not enter(admission, holding(30, 0), holding(30, 0))
    admission.leave(alone)
    assert not enter(admission, holding(40, 0))


def test_what_is_more_than_a_limit_enters_alone() -> None:
    admission = Admission(100, 100, 60)
    large = holding(1000, 1000)
    assert not enter(admission, large)
    assert "tokens are in flight" in str(enter(admission, holding(1, 0)))
    admission.leave(large)
    heavy = holding(10, 1000)
    assert not enter(admission, heavy)
    assert "hold 1000 bytes" in str(enter(admission, holding(10, 1)))
    admission.resize(heavy, 10)
    assert not enter(admission, holding(10, 90))
    admission.leave(heavy)
    admission.resize(heavy, 50)  # it has left
    assert admission.inflight_bytes == 90


@pytest.mark.parametrize(
    ("capacity", "most"),
    [
        (0.0, 1000),  # unknown
        (100.0, 1000),  # 8000 tokens in time
        (10.0, 800),
        (0.001, 0),
    ],
)
def test_as_much_as_can_be_answered_in_time(capacity: float, most: int) -> None:
    """Of 100 seconds 80 are counted on, and an idle server always takes something."""
    admission = Admission(1000, 10**6, 100, capacity=lambda: capacity)
    first = holding(max(1, most), 0)
    assert not enter(admission, first)
    refused = str(enter(admission, holding(1, 0)))
    assert f"{first.tokens} tokens are in flight, at most {most} may be" in refused
    assert ("is the deadline" in refused) == (most < 1000)


@pytest.mark.parametrize("capacity", [0.0, 10.0])
def test_without_a_deadline(capacity: float) -> None:
    admission = Admission(100, 10**6, float("inf"), capacity=lambda: capacity)
    assert not enter(admission, holding(100, 0))
    assert enter(admission, holding(1, 0))


def test_work_waits_for_memory_but_never_for_nobody() -> None:
    admission = Admission(100, 100, 60)
    steps: list[str] = []

    def work(name: str, size: int, finish: threading.Event) -> None:
        with admission.working(size):
            steps.append(name)
            finish.wait(10)

    first, second = threading.Event(), threading.Event()
    threads = [threading.Thread(target=work, args=("first", 1000, first))]  # more than there is: nobody else works
    threads[0].start()
    while not steps:
        time.sleep(0.001)
    threads.append(threading.Thread(target=work, args=("second", 50, second)))
    threads[1].start()
    time.sleep(0.1)
    assert steps == ["first"]
    assert admission.inflight_bytes == 1000
    other = holding(1, 50)
    assert not enter(admission, other), "decoding keeps nobody out"
    admission.leave(other)
    admission.leave(other)  # counted out once
    first.set()
    while len(steps) < 2:
        time.sleep(0.001)
    second.set()
    for thread in threads:
        thread.join()
    assert admission.inflight_bytes == 0


def test_closed() -> None:
    admission = Admission(100, 100, 60)
    admission.close()
    assert "shutting down" in str(enter(admission, holding(1, 1)))
