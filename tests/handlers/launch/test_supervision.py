"""Who looks after a server: what it calls ready, and when it gives the server up."""

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from handlers.launch import supervision
from handlers.launch.health import Progress, UnhealthyError
from handlers.launch.readiness import Readiness
from handlers.launch.supervision import supervise

URL = "http://h/predictions/x"


class Story:
    """A server to which something else happens at every look; a look takes a second of a clock of its own.

    Each step is what is seen from outside, what the model says when it is asked ("" is its mask), and how many
    pictures it has answered so far.
    """

    watched: ClassVar = {URL: "http://h/metrics"}

    def __init__(self, *steps: tuple[str, str, int], ends_with: int = 0, patience: int = 3) -> None:
        self._steps: Iterator[tuple[str, str, int]] = iter(steps)
        self._ends_with, self._patience = ends_with, patience
        self.readiness = Readiness()
        self.seen: list[bool] = []
        self.num_asked, self.num_forgotten, self.now = 0, 0, 0.0

    def wait(self, timeout_seconds: float | None = None) -> int:
        if self.now:
            self.seen.append(self.readiness.ready)
        try:
            self._outside, self._inside, self._pictures = next(self._steps)
        except StopIteration:
            return self._ends_with
        self.now += 10
        raise subprocess.TimeoutExpired("server", 1)

    def ailment(self) -> str:
        return self._outside

    def forget(self) -> None:
        self.num_forgotten += 1

    def may_recover(self, num_failures: int, ill_seconds: float) -> bool:
        return num_failures < self._patience

    def check(self, url: str, *, timeout_seconds: float, metrics_url: str) -> None:
        assert (url, metrics_url) == (URL, "http://h/metrics")
        self.num_asked += 1
        if self._inside:
            raise UnhealthyError(self._inside, 404 if self._inside == "unloaded" else 0)

    def progress(self, metrics_url: str, url: str) -> Progress | None:
        return None if self._pictures < 0 else Progress(self._pictures, 0)

    def play(self, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[bool]]:
        monkeypatch.setattr(supervision, "check_model", self.check)
        monkeypatch.setattr(supervision, "read_progress", self.progress)
        monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.readiness.ready = True
        told: Any = self
        return supervise(told, self.readiness), self.seen


def test_a_server_that_ends_by_itself_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Story(("", "", 0)).play(monkeypatch) == (1, [True])
    assert Story(("", "", 0), ends_with=70).play(monkeypatch) == (70, [True])


def test_an_idle_model_is_asked_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, busy = Story(*[("", "", 5)] * 6), Story(("", "", 0), *[("", "never asked", n) for n in range(1, 6)])
    idle.play(monkeypatch)
    assert idle.num_asked == 6
    assert Story(*[("", "", -1)] * 3).play(monkeypatch) == (1, [True] * 3)  # whose metrics can't be had
    busy.play(monkeypatch)
    assert busy.num_asked == 1, "the first look has nothing to compare with"


def test_red_while_it_fails_and_green_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = Story(("", "", 0), ("", "late", 0), ("", "late", 0), ("", "", 0), ("", "late", 0), ("", "", 0))
    assert story.play(monkeypatch) == (1, [True, False, False, True, False, True])
    assert capsys.readouterr().err.splitlines() == ["not ready: late", "ready again"] * 2


def test_given_up_after_as_many_failures_as_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(*[("", "late", 0)] * 10)
    assert story.play(monkeypatch)[0] == 1
    assert story.num_asked == 3


def test_what_is_seen_is_red_at_once_and_asked_about_next(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Story(*[("a worker ended", "late", 0)] * 10, patience=2)
    assert gone.play(monkeypatch)[0] == 1
    assert gone.num_asked == 2
    back = Story(("a worker ended", "late", 0), ("a worker ended", "", 0), ("", "", 0), patience=2)
    assert back.play(monkeypatch) == (1, [False, True, True])
    assert back.num_forgotten == 2


def test_a_model_that_was_unloaded_is_not_ready_and_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(*[("", "unloaded", 0)] * 8, ("", "", 0))
    assert story.play(monkeypatch) == (1, [False] * 8 + [True])
