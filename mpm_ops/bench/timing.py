"""Times on any device, medians in turn, and a report that keeps what was measured whatever happens next."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from . import environment


class Timer:
    """Marks in the order of a device's work: events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        if not self._on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Between two marks; the device must have passed both, see `synchronize`."""
        return float(start.elapsed_time(stop)) if self._on_cuda else 1000 * (stop - start)


class Laps:
    """The steps of one piece of work: everything since the last lap is a lap's."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._marks: list[tuple[str, Any]] = [("", timer.mark())]

    def lap(self, name: str) -> None:
        self._marks.append((name, self._timer.mark()))

    def milliseconds(self) -> dict[str, float]:
        """Of each lap, those of one name added up, and of all as "total"."""
        self._timer.synchronize()
        found = {"total": self._timer.milliseconds(self._marks[0][1], self._marks[-1][1])}
        for (_, start), (name, stop) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + self._timer.milliseconds(start, stop)
        return found


Work = Callable[[Laps], object]


def in_turn(
    works: Mapping[str, Work], timer: Timer, *, repeats: int, warm_ups: int = 2
) -> dict[str, dict[str, float]]:
    """Median milliseconds of every lap of every work, measured one after the other, round by round."""
    for work in works.values():
        for _ in range(warm_ups):
            work(Laps(timer))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            timer.synchronize()
            laps = Laps(timer)
            work(laps)
            laps.lap("rest")
            samples[name].append(laps.milliseconds())
    return {name: _medians(rounds) for name, rounds in samples.items()}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {lap: round(statistics.median(r[lap] for r in rounds), 4) for lap in rounds[0]}


class Report:
    """Sections of a benchmark, each written down when it is over; one that fails leaves its error.

    Args:
        facts: what the figures depend on.
        out: where the JSON goes, or None.
        seconds: no section is started after these.
    """

    def __init__(self, facts: Mapping[str, Any], out: Path | None, seconds: float) -> None:
        self._out = out
        self._start = perf_counter()
        self._stop = self._start + seconds
        self.content: dict[str, Any] = {"environment": environment(), **facts, "sections": [], "left_out": []}
        self._write()

    def section(self, kind: str, name: str, measure: Callable[[], dict[str, Any]]) -> bool:
        """Run one section; returns whether it gave figures."""
        if perf_counter() > self._stop:
            self.content["left_out"].append(f"{kind} {name}")
            self._write()
            return False
        start = perf_counter()
        row: dict[str, Any] = {"kind": kind, "name": name}
        try:
            row |= measure()
        except Exception as error:  # whatever a GPU, a compiler or a missing package does
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        row["seconds"] = round(perf_counter() - start, 1)
        self.content["sections"].append(row)
        self._write()
        if torch.cuda.is_initialized():
            _free_memory()
        return "error" not in row

    def _write(self) -> None:
        self.content["seconds"] = round(perf_counter() - self._start, 1)
        if self._out:
            self._out.write_text(json.dumps(self.content, indent=2) + "\n")


def _free_memory() -> None:
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # a poisoned device: the sections to come will say so
        return
