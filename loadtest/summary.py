"""From records to figures: what was promised, what was kept, and whether the client kept up."""

import importlib.metadata
import math
import os
import platform
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .masks import OK
from .options import LoadSettings
from .run import UNSENT, Pulse, Record
from .server import MemorySample, MetricsSample
from .slo import judge, quantile

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
_MAX_CPU = 0.85  # of a core: one more request would wait for the client
_MIN_BINS, _MAX_BINS = 8, 180
_REQUESTS_OF_A_BIN = 5  # quantiles of fewer say nothing
_BIN_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600)
_MAX_DOTS = 3000
_INFO = ("variant", "schedule", "align", "runtime", "precision", "device")
_STEPS = ("decode", "queue", "labels", "encode", "request")
_PACKAGES = ("mpm-segmenter", "locust", "gevent", "grpcio", "torch", "openvino", "torchserve", "nvidia-pytriton")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What happened.

    Attributes:
        began_at: seconds since the epoch; the time 0 of records and pulses.
        seconds: how long requests became due.
        gave_up: whether it ended early because the promises were broken.
        workers, workers_finished: processes that sent, and how many handed in all their records.
        records: of all requests, in order of their numbers.
        pulses: of all processes that sent.
        samples: of the servers' metrics, from before the beginning.
        num_missed: readings of metrics that failed.
        library: share of pixels that idle servers and the library agreed on at least, by names of pictures.
        memory: of the server's processes, where it was watched.
    """

    began_at: float
    seconds: float
    gave_up: bool = False
    workers: int = 1
    workers_finished: int = 1
    records: Sequence[Record]
    pulses: Sequence[Pulse]
    samples: Sequence[MetricsSample] = ()
    num_missed: int = 0
    library: Mapping[str, float] = field(default_factory=dict)
    memory: Sequence[MemorySample] = ()


def summarize(settings: LoadSettings, result: RunResult) -> dict[str, Any]:
    """A report as plain data; see `loadtest.page` for how it looks.

    `valid` is whether the client kept up, `held` whether the server kept every promise. A run that is not valid says
    nothing about the server. `latency_ms` is that of answers; `at_least_ms` counts failures too, with the time after
    which they failed.
    """
    served, records = ServerView(result), result.records
    memory = [sample for sample in result.memory if sample.at >= result.began_at]
    checks, doubts = list(_checks(settings, result, served, memory)), list(_doubts(settings, result))
    elapsed = max([result.seconds, *(record.at + record.seconds for record in records)])
    bins = Bins(elapsed, len(records))
    asked = [record for record in records if record.kind != "bad"]
    answered = [record for record in asked if record.outcome == OK]
    agreements = [record.agreement for record in records if record.agreement is not None]
    mib = [round(sample.mib, 1) for sample in memory]
    return {
        "began_at": datetime.fromtimestamp(result.began_at, UTC).isoformat(timespec="seconds"),
        "device": served.info().get("device", "unknown"),
        "client": describe_machine(),
        "versions": installed_versions(),
        "served": served.info(),
        "settings": _shown(settings),
        "slo": str(settings.slo),
        "held": all(check["kept"] for check in checks),
        "valid": not doubts,
        "doubts": doubts,
        "checks": checks,
        "requests": len(records),
        "outcomes": dict(Counter(record.outcome for record in records).most_common()),
        "offered_per_second": len(records) / result.seconds,
        "answered_per_second": len(answered) / elapsed,
        "elapsed_seconds": elapsed,
        "latency_ms": latencies_ms(_seconds(answered)),
        "at_least_ms": latencies_ms(_seconds(asked)),
        "kinds": _by(records, lambda record: record.kind),
        "pictures": _by(answered, lambda record: record.name),
        "agreement": {"compared": len(agreements), "least": min(agreements, default=None)},
        "lateness_ms": latencies_ms(_lateness(records)),
        "library": {
            "compared": len(result.library),
            "least": min(result.library.values(), default=None),
            "pictures": dict(sorted(result.library.items())),
        },
        "replicas": served.replicas(),
        "server": served.figures(),
        "memory_growth": served.memory_growth(),
        "memory": {"first_mib": mib[0], "last_mib": mib[-1], "growth": memory_growth(mib)} if mib else None,
        "metrics_missed": result.num_missed,
        "series": {
            **_requests_over_time(bins, records),
            "client": _client_over_time(bins, result.pulses),
            "server": served.series(bins.width),
            "memory": {
                "at": [round(sample.at - result.began_at, 3) for sample in _every(memory, bins.width)],
                "mib": [round(sample.mib, 1) for sample in _every(memory, bins.width)],
            },
            "quantiles_ms": latency_curve(_seconds(answered)),
        },
    }


def describe_machine() -> str:
    """Processor and usable cores, such as `AMD EPYC, 2 cores`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{model}, {cores} cores"


def installed_versions() -> dict[str, str]:
    """Of Python, and of the packages that matter here, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def latencies_ms(ascending: Sequence[float]) -> dict[str, float | None]:
    """`p50` to `p99.9`, `max` and `mean` of seconds in ascending order; None where there are none."""
    named = {f"p{100 * share:g}": quantile(ascending, share) for share in QUANTILES}
    named["max"] = ascending[-1] if ascending else math.nan
    named["mean"] = statistics.fmean(ascending) if ascending else math.nan
    return {name: round(1000 * value, 3) if math.isfinite(value) else None for name, value in named.items()}


def latency_curve(ascending: Sequence[float]) -> list[list[float]]:
    """Milliseconds over share, denser towards the slowest, as far as there are requests."""
    shares = [1 - 10**-nines * (1 - 0.05 * step) for nines in range(6) for step in range(18)]
    resolved = [share for share in shares if len(ascending) * (1 - share) >= 1]
    return [[share, round(1000 * quantile(ascending, share), 2)] for share in resolved]


def _shown(settings: LoadSettings) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    shown = asdict(settings) | {"pictures": str(settings.pictures), "slo": str(settings.slo)}
    for place in (shown, *shown["phases"]):
        place |= {name: None for name, value in place.items() if value == math.inf}
    return shown


def _check(name: str, value: float | None, limit: float, unit: str, kept: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "unit": unit, "kept": kept}


def _checks(
    settings: LoadSettings, result: RunResult, served: "ServerView", memory: Sequence[MemorySample]
) -> Iterator[dict[str, Any]]:
    """Every promise, and whether it was kept."""
    asked = [record for record in result.records if record.kind != "bad"]
    for verdict in judge(settings.slo, [record.seconds if record.outcome == OK else math.inf for record in asked]):
        unit = "share" if verdict.bound.quantile is None else "seconds"
        value = verdict.value if math.isfinite(verdict.value) else None
        yield _check(verdict.bound.name, value, verdict.bound.limit, unit, verdict.kept)
    wrong = sum(record.outcome.startswith("wrong") or _never_refused(record) for record in result.records)
    yield _check("wrong answers", wrong, 0, "count", wrong == 0)
    if settings.max_growth is not None:
        grown = {"memory growth": served.memory_growth()}
        if memory:
            grown["memory growth, total"] = memory_growth([sample.mib for sample in memory])
        for name, growth in grown.items():  # what is not known to be kept is not kept
            kept = growth is not None and growth <= settings.max_growth
            yield _check(name, growth, settings.max_growth, "share", kept)
    if result.gave_up:
        yield _check("gave up early", 1, 0, "count", False)


def _never_refused(record: Record) -> bool:
    """What is bad has to be refused by an answer; without one the server broke on it."""
    return record.kind == "bad" and record.outcome.startswith(("connection", "timeout"))


def _by(records: Iterable[Record], key: Callable[[Record], str]) -> list[dict[str, Any]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    rows = []
    for name, found in sorted(groups.items()):
        good = _seconds(record for record in found if record.outcome == OK)
        tokens = [(r.tokens_in, r.tokens_out) for r in found if r.tokens_in and r.tokens_out]
        before, after = np.mean(tokens, axis=0).tolist() if tokens else (None, None)
        counts = {"requests": len(found), "failed": len(found) - len(good), "latency_ms": latencies_ms(good)}
        rows.append({"name": name, **counts, "tokens_in": before, "tokens_out": after})
    return rows


def _seconds(records: Iterable[Record]) -> list[float]:
    """Latencies in ascending order."""
    return sorted(record.seconds for record in records)


def _lateness(records: Iterable[Record]) -> list[float]:
    return sorted(record.late for record in records if record.outcome != UNSENT)


def _doubts(settings: LoadSettings, result: RunResult) -> Iterator[str]:
    """Why the figures may be the client's rather than the server's."""
    sent = _lateness(result.records)
    if not sent:
        yield "nothing was sent"
    elif (late := quantile(sent, 0.99)) > settings.max_lateness:
        yield f"requests left {1000 * late:.0f} ms late (p99), more than {1000 * settings.max_lateness:.0f} ms"
    for worker in sorted({pulse.worker for pulse in result.pulses}):
        pulses = [pulse for pulse in result.pulses if pulse.worker == worker]
        if (cpu := statistics.fmean(pulse.cpu for pulse in pulses)) > _MAX_CPU:
            yield f"client worker {worker} used {100 * cpu:.0f} % of its core; start more workers"
        if (lag := statistics.median(pulse.lag for pulse in pulses)) > settings.max_lateness:
            yield f"client worker {worker} noticed answers up to {1000 * lag:.0f} ms late, second by second"
    if (lost := result.workers - result.workers_finished) > 0:
        yield f"{lost} of {result.workers} workers were lost"
    due = 0 if result.gave_up or result.seconds < settings.seconds else settings.num_due()
    if (missing := due - len(result.records)) > 0:
        yield f"of {missing} of {due} requests nothing is known"
    if any(record.outcome.startswith("client:") for record in result.records):
        yield "requests failed inside of the client; see its log"


class Bins:
    """Intervals of a run, all of one width but the last; so many requests that a bin says something share one."""

    def __init__(self, elapsed: float, num_requests: int) -> None:
        least = max(elapsed / _MAX_BINS, _REQUESTS_OF_A_BIN * elapsed / max(1, num_requests))
        wanted = min(least, elapsed / _MIN_BINS)
        self.width = next((width for width in _BIN_SECONDS if width >= wanted), _BIN_SECONDS[-1])
        self.number = max(1, math.ceil(elapsed / self.width - 0.5))  # a short rest at the end is no bin of its own
        edges = np.array([*np.arange(self.number) * self.width, elapsed])
        self.widths, self.middles = np.diff(edges), ((edges[:-1] + edges[1:]) / 2).round(3).tolist()

    def index(self, at: float) -> int:
        return max(0, min(self.number - 1, int(at / self.width)))

    def rates(self, times: Iterable[float]) -> list[float]:
        """How many a second there are of something, from when each was."""
        counts = np.bincount([self.index(at) for at in times] or [0], minlength=self.number)
        return (counts / self.widths).tolist()


def _requests_over_time(bins: Bins, records: Sequence[Record]) -> dict[str, Any]:
    """Rates and quantiles by bins, and some requests one by one."""
    ended: dict[str, list[float]] = defaultdict(list)
    seconds: list[list[float]] = [[] for _ in range(bins.number)]
    for record in records:
        ended[record.outcome].append(record.at + record.seconds)
        if record.outcome == OK and record.kind != "bad":
            seconds[bins.index(record.at)].append(record.seconds)
    pictured = [record for record in records if record.kind != "bad"]
    quantiles = [latencies_ms(sorted(found)) for found in seconds]
    return {
        "bin_seconds": bins.width,
        "at": bins.middles,
        "offered": bins.rates(record.at for record in records),
        "answered": bins.rates(ended.pop(OK, [])),
        "failed": {outcome: bins.rates(times) for outcome, times in sorted(ended.items())},
        "latency_ms": {name: [found[name] for found in quantiles] for name in ("p50", "p90", "p99", "max")},
        "requests": [
            [round(record.at, 3), round(1000 * record.seconds, 1), record.outcome == OK]
            for record in pictured[:: max(1, len(pictured) // _MAX_DOTS)]
        ],
    }


def _client_over_time(bins: Bins, pulses: Sequence[Pulse]) -> dict[str, list[float]]:
    """How late and how busy the client was: the worst of its workers; requests in flight of all of them."""
    found: dict[int, list[Pulse]] = defaultdict(list)
    for pulse in pulses:
        found[bins.index(pulse.at)].append(pulse)
    ordered = sorted(found.items())
    return {
        "at": [(i + 0.5) * bins.width for i, _ in ordered],
        "lag_ms": [1000 * max(pulse.lag for pulse in beats) for _, beats in ordered],
        "cpu": [max(pulse.cpu for pulse in beats) for _, beats in ordered],
        "inflight": [
            sum(p.inflight for p in beats) / len(beats) * len({p.worker for p in beats}) for _, beats in ordered
        ],
    }


def memory_growth(readings: Sequence[float]) -> float | None:
    """By what share the median of the last quarter exceeds that of the second, when all is warm.

    None of fewer than eight readings, or where one is 0: there is no such metric.
    """
    quarter = len(readings) // 4
    if quarter < 2 or not all(readings):
        return None
    return statistics.median(readings[-quarter:]) / statistics.median(readings[quarter : 2 * quarter]) - 1


AnySample = TypeVar("AnySample", MetricsSample, MemorySample)


def _every(samples: Sequence[AnySample], seconds: float) -> list[AnySample]:
    """Samples at least so many seconds apart, but for how long a reading takes."""
    chosen = list(samples[:1])
    for sample in samples[1:]:
        if sample.at - chosen[-1].at >= 0.9 * seconds:
            chosen.append(sample)
    return chosen


@dataclass(frozen=True, slots=True)
class _Interval:
    """Between two readings."""

    before: MetricsSample
    after: MetricsSample

    def grown(self, name: str, **labels: str) -> float:
        return self.after.metrics.total(name, **labels) - self.before.metrics.total(name, **labels)

    def rate(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / (self.after.at - self.before.at)

    def mean(self, histogram: str, **labels: str) -> float | None:
        return _share(self.grown(f"{histogram}_sum", **labels), self.grown(f"{histogram}_count", **labels))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


class ServerView:
    """The servers' metrics between the beginning and the end of a run."""

    def __init__(self, result: RunResult) -> None:
        self._began_at = result.began_at
        earlier = [sample for sample in result.samples if sample.at <= result.began_at]
        later = [sample for sample in result.samples if sample.at > result.began_at]
        self.samples = [*earlier[-1:], *later]  # in the second before may lie answers of the idle server
        self._last = self.samples[-1].metrics if self.samples else None
        # Pictures that the server computes without merging, to compare, are not the load's.
        self._lane = {"schedule": schedule} if (schedule := self._label("schedule")) else {}
        self._stages = self._last.labels("mpm_tokens_total", "stage") if self._last else []

    def info(self) -> dict[str, str]:
        """Labels of `mpm_model_info`; all values of one, where servers differ."""
        return {name: value for name in _INFO if (value := self._label(name))}

    def figures(self) -> dict[str, Any]:
        """Totals over the run."""
        if len(self.samples) < 2:
            return {}
        run = _Interval(self.samples[0], self.samples[-1])
        stages = {stage: self._stage_figures(run, stage) for stage in self._stages}
        padding = run.grown("mpm_padding_tokens_total")
        means = {step: run.mean(f"mpm_{step}_seconds") for step in _STEPS}
        return {
            "images": run.grown("mpm_images_total"),
            "requests": run.grown("mpm_request_seconds_count"),
            "stages": stages,
            "padding_share": _share(padding, padding + sum(stage["tokens_in"] for stage in stages.values())),
            "mean_ms": {step: 1000 * mean for step, mean in means.items() if mean is not None},
            "busy_share": run.rate("mpm_stage_seconds_sum"),
        }

    def replicas(self) -> list[dict[str, Any]]:
        """How requests spread over several servers: the pictures that each segmented, by its address."""
        if len(self.samples) < 2:
            return []
        first, last = self.samples[0].images, self.samples[-1].images
        counts = {address: images - first.get(address, 0.0) for address, images in sorted(last.items())}
        total = sum(counts.values())
        rows = [{"name": name, "requests": n, "share": n / total} for name, n in counts.items() if total]
        return rows if len(rows) > 1 else []

    def memory_growth(self) -> float | None:
        """Of the process that computes."""
        return memory_growth([sample.metrics.total("process_resident_memory_bytes") for sample in self.samples])

    def series(self, seconds: float) -> dict[str, list[float | None]]:
        """Gauges, and counters as rates since the reading so many seconds before."""
        found: dict[str, list[float | None]] = defaultdict(list)
        for before, after in pairwise(_every(self.samples, seconds)):
            for name, value in self._point(_Interval(before, after)):
                found[name].append(value)
        return dict(found)

    def _point(self, interval: _Interval) -> Iterator[tuple[str, float | None]]:
        """Everything at one time, by the names of the series."""
        after, rate = interval.after.metrics, interval.rate
        yield "at", round(interval.after.at - self._began_at, 3)
        yield "waiting_tokens", after.total("mpm_waiting_tokens")
        yield "inflight", after.total("mpm_inflight_requests")
        yield "memory_mib", after.total("process_resident_memory_bytes") / 2**20
        yield "cpu", rate("process_cpu_seconds_total")
        yield "busy", rate("mpm_stage_seconds_sum")
        total = 0.0
        for i, stage in enumerate(self._stages):
            into, out = (rate("mpm_tokens_total", point=point, stage=stage, **self._lane) for point in ("in", "out"))
            total += into
            yield f"tokens_into_{stage}", into
            if i < len(self._stages) - 1:
                yield f"merged_{stage}", _share(into - out, into)
        padding = rate("mpm_padding_tokens_total")
        yield "padding", _share(padding, padding + total)

    def _stage_figures(self, run: _Interval, stage: str) -> dict[str, Any]:
        lane = {"stage": stage, **self._lane}
        before, after = (run.grown("mpm_tokens_total", point=point, **lane) for point in ("in", "out"))
        return {
            "tokens_in": before,
            "tokens_out": after,
            "merged_share": _share(before - after, before),
            "seconds": run.grown("mpm_stage_seconds_sum", **lane),
            "mean_group": run.mean("mpm_group_windows", **lane),
        }

    def _label(self, name: str) -> str:
        return ", ".join(self._last.labels("mpm_model_info", name)) if self._last else ""
