"""What the server's metrics say of a run."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from loadtest.running import RunResult
from loadtest.watching.memory import MemorySample
from loadtest.watching.scraping import Sample

_INFO = ("variant", "schedule", "align", "runtime", "precision", "device")
_STEPS = ("decode", "queue", "labels", "encode", "request")

AnySample = TypeVar("AnySample", Sample, MemorySample)


@dataclass(frozen=True, slots=True)
class _Interval:
    """Between two readings."""

    before: Sample
    after: Sample

    def grown(self, name: str, **labels: str) -> float:
        return self.after.total(name, **labels) - self.before.total(name, **labels)

    def rate(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / (self.after.at - self.before.at)


class ServerView:
    """The server's metrics between the beginning and the end of the run."""

    def __init__(self, result: RunResult) -> None:
        self._began_at = result.began_at
        earlier = [sample for sample in result.samples if sample.at <= result.began_at]
        later = [sample for sample in result.samples if sample.at > result.began_at]
        self.samples = [*earlier[-1:], *later]  # in the second before may lie answers of the idle server
        self._last = self.samples[-1] if self.samples else None
        # Pictures that the server computes without merging, to compare, are not the load's.
        self._schedule = {"schedule": schedule} if (schedule := self._told("schedule")) else {}
        self._stages = self._last.labels("mpm_tokens_total", "stage") if self._last else []

    def info(self) -> dict[str, str]:
        """Labels of `mpm_model_info`; all values of one, where servers differ."""
        return {name: value for name in _INFO if (value := self._told(name))}

    def device(self) -> str:
        return self.info().get("device", "unknown")

    def figures(self) -> dict[str, Any]:
        """Totals over the run."""
        if len(self.samples) < 2:
            return {}
        run = _Interval(self.samples[0], self.samples[-1])
        stages = {stage: self._stage_figures(run, stage) for stage in self._stages}
        padding = run.grown("mpm_padding_tokens_total")
        computed = sum(stage["tokens_in"] for stage in stages.values())
        return {
            "images": run.grown("mpm_images_total"),
            "requests": run.grown("mpm_request_seconds_count"),
            "stages": stages,
            "padding_share": padding / (padding + computed) if padding + computed else None,
            "mean_ms": dict(_mean_ms(run)),
            "busy_share": run.rate("mpm_stage_seconds_sum"),
        }

    def images_by_replica(self) -> dict[str, float]:
        """What each server segmented, by its address."""
        if len(self.samples) < 2:
            return {}
        first, last = self.samples[0].images, self.samples[-1].images
        return {address: images - first.get(address, 0.0) for address, images in sorted(last.items())}

    def memory_growth(self) -> float | None:
        """Of the process that computes."""
        return memory_growth([sample.total("process_resident_memory_bytes") for sample in self.samples])

    def series(self, seconds: float) -> dict[str, list[float | None]]:
        """Gauges, and counters as rates since the reading so many seconds before."""
        found: dict[str, list[float | None]] = defaultdict(list)
        for before, after in pairwise(_every(self.samples, seconds)):
            for name, value in self._point(_Interval(before, after)):
                found[name].append(value)
        return dict(found)

    def _point(self, interval: _Interval) -> Iterator[tuple[str, float | None]]:
        """Everything at one time, by the names of the series."""
        after, rate = interval.after, interval.rate
        yield "at", round(after.at - self._began_at, 3)
        yield "waiting_tokens", after.total("mpm_waiting_tokens")
        yield "waiting_windows", after.total("mpm_waiting_windows")
        yield "inflight", after.total("mpm_inflight_requests")
        yield "images", rate("mpm_images_total")
        yield "memory_mib", after.total("process_resident_memory_bytes") / 2**20
        yield "cpu", rate("process_cpu_seconds_total")
        yield "busy", rate("mpm_stage_seconds_sum")
        total = 0.0
        for i, stage in enumerate(self._stages):
            into, out = (self._tokens(interval, stage, point) for point in ("in", "out"))
            into, out = (tokens / (after.at - interval.before.at) for tokens in (into, out))
            total += into
            yield f"tokens_into_{stage}", into
            if i < len(self._stages) - 1:
                yield f"merged_{stage}", 1 - out / into if into else None
        padding = rate("mpm_padding_tokens_total")
        yield "padding", padding / (padding + total) if padding + total else None

    def _stage_figures(self, run: _Interval, stage: str) -> dict[str, Any]:
        lane = {"stage": stage, **self._schedule}
        before, after = (self._tokens(run, stage, point) for point in ("in", "out"))
        groups = run.grown("mpm_group_windows_count", **lane)
        return {
            "tokens_in": before,
            "tokens_out": after,
            "merged_share": 1 - after / before if before else None,
            "seconds": run.grown("mpm_stage_seconds_sum", **lane),
            "mean_group": run.grown("mpm_group_windows_sum", **lane) / groups if groups else None,
        }

    def _tokens(self, interval: _Interval, stage: str, point: str) -> float:
        return interval.grown("mpm_tokens_total", point=point, stage=stage, **self._schedule)

    def _told(self, label: str) -> str:
        return ", ".join(self._last.labels("mpm_model_info", label)) if self._last else ""


class MemoryView:
    """The memory of all of the server's processes, from the beginning of the run on."""

    def __init__(self, result: RunResult) -> None:
        self._began_at = result.began_at
        self.samples = [sample for sample in result.memory if sample.at >= result.began_at]

    def figures(self) -> dict[str, Any] | None:
        """By processes in the beginning and in the end, and how all grew; None if nobody watched."""
        if not self.samples:
            return None
        first, last = (_rounded(self.samples[i].mib) for i in (0, -1))
        return {"first_mib": first, "last_mib": last, "growth": self.growth()}

    def growth(self) -> float | None:
        return memory_growth([sample.total for sample in self.samples])

    def series(self, seconds: float) -> dict[str, Any]:
        """MiB over time, by names of processes."""
        chosen = _every(self.samples, seconds)
        names = sorted({name for sample in chosen for name in sample.mib})
        return {
            "at": [round(sample.at - self._began_at, 3) for sample in chosen],
            "mib": {name: [round(sample.mib.get(name, 0.0), 2) for sample in chosen] for name in names},
        }


def memory_growth(readings: Sequence[float]) -> float | None:
    """By what share the median of the last quarter exceeds that of the second, which is when all is warm.

    None of fewer than eight readings, or where one is 0: there is no such metric.
    """
    quarter = len(readings) // 4
    if quarter < 2 or not all(readings):
        return None
    early = statistics.median(readings[quarter : 2 * quarter])
    return statistics.median(readings[-quarter:]) / early - 1


def _every(samples: Sequence[AnySample], seconds: float) -> list[AnySample]:
    """Those that are so far apart, but for how long a reading takes."""
    chosen = list(samples[:1])
    for sample in samples[1:]:
        if sample.at - chosen[-1].at >= 0.9 * seconds:
            chosen.append(sample)
    return chosen


def _rounded(mib: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size, 1) for name, size in sorted(mib.items())}


def _mean_ms(run: _Interval) -> Iterator[tuple[str, float]]:
    for step in _STEPS:
        if number := run.grown(f"mpm_{step}_seconds_count"):
            yield step, 1000 * run.grown(f"mpm_{step}_seconds_sum") / number
