"""From records to figures: what was promised, what was kept, and whether the client can be believed."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Any

from .machine import describe_machine, installed_versions
from .masks import OK
from .running import RunResult
from .scraping import Sample
from .session import UNSENT, Record
from .settings import LoadSettings
from .slo import Slo, hold_against, quantile

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
_MIN_BINS, _MAX_BINS = 8, 180
_REQUESTS_OF_A_BIN = 5  # quantiles of fewer say nothing
_BIN_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600)
_MAX_DOTS = 3000
_MAX_CPU = 0.85  # of a core: one more request would wait for the client


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Beyond what a run fails, or says nothing about the server.

    Attributes:
        slo: promises of the server.
        max_lateness: seconds by which the client may send late, in 99 of 100 requests.
        max_growth: by what share the server's memory may grow between the second and the last quarter; None for any.
    """

    slo: Slo
    max_lateness: float = 0.05
    max_growth: float | None = None


def summarize(settings: LoadSettings, result: RunResult, limits: Limits) -> dict[str, Any]:
    """A report as plain data; see `loadtest.report` for how it looks.

    `valid` tells whether the client kept up, `held` whether the server kept every promise. A run that is not valid
    tells nothing about the server, good or bad. `latency_ms` is that of answers; `at_least_ms` counts what failed too,
    with the time after which it did.
    """
    records = result.records
    asked = [record for record in records if record.kind != "bad"]
    latencies = [record.seconds if record.outcome == OK else math.inf for record in asked]
    served = _ServerView(settings, result)
    doubts = _doubts(settings, result, limits)
    checks = [
        {
            "name": kept.bound.name,
            "value": kept.value if math.isfinite(kept.value) else None,
            "limit": kept.bound.limit,
            "unit": "share" if kept.bound.quantile is None else "seconds",
            "kept": kept.kept,
        }
        for kept in hold_against(limits.slo, latencies)
    ]
    wrong = sum(record.outcome.startswith("wrong") or _never_refused(record) for record in records)
    checks.append({"name": "wrong answers", "value": wrong, "limit": 0, "unit": "count", "kept": wrong == 0})
    growth = served.memory_growth()
    if limits.max_growth is not None:
        kept = growth is not None and growth <= limits.max_growth
        limit = limits.max_growth
        checks.append({"name": "memory growth", "value": growth, "limit": limit, "unit": "share", "kept": kept})
    if result.gave_up:
        checks.append({"name": "gave up early", "value": 1, "limit": 0, "unit": "count", "kept": False})
    answered = [record for record in asked if record.outcome == OK]
    elapsed = max([settings.seconds, *(record.at + record.seconds for record in records)])
    good = sorted(record.seconds for record in answered)
    agreements = [record.agreement for record in records if record.agreement is not None]
    return {
        "began_at": datetime.fromtimestamp(result.began_at, UTC).isoformat(timespec="seconds"),
        "device": served.device(),
        "client": describe_machine(),
        "versions": installed_versions(),
        "served": served.info(),
        "settings": asdict(settings) | {"trace": len(settings.trace)},
        "slo": str(limits.slo),
        "held": all(bool(check["kept"]) for check in checks),
        "valid": not doubts,
        "doubts": doubts,
        "checks": checks,
        "requests": len(records),
        "outcomes": dict(Counter(record.outcome for record in records).most_common()),
        "offered_per_second": len(records) / settings.seconds,
        "answered_per_second": len(answered) / elapsed,
        "elapsed_seconds": elapsed,
        "latency_ms": _latencies(good),
        "at_least_ms": _latencies(sorted(record.seconds for record in asked)),
        "kinds": _by(records, lambda record: record.kind),
        "pictures": _by(answered, lambda record: record.name),
        "agreement": {"compared": len(agreements), "least": min(agreements, default=None)},
        "lateness_ms": _latencies(sorted(record.late for record in records if record.outcome != UNSENT)),
        "server": served.figures(),
        "memory_growth": growth,
        "metrics_missed": result.num_missed,
        "series": _series(settings, result, served, elapsed),
    }


def _latencies(ascending: Sequence[float]) -> dict[str, float | None]:
    """Milliseconds by the names of quantiles; None where nothing was answered."""
    named = {f"p{100 * share:g}": quantile(ascending, share) for share in QUANTILES}
    named["max"] = ascending[-1] if ascending else math.nan
    named["mean"] = statistics.fmean(ascending) if ascending else math.nan
    return {name: round(1000 * value, 3) if math.isfinite(value) else None for name, value in named.items()}


def _by(records: Iterable[Record], key: Any) -> list[dict[str, Any]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    rows = []
    for name, found in sorted(groups.items()):
        good = sorted(record.seconds for record in found if record.outcome == OK)
        tokens = [(r.tokens_in, r.tokens_out) for r in found if r.tokens_in and r.tokens_out]
        rows.append(
            {
                "name": name,
                "requests": len(found),
                "failed": len(found) - len(good),
                "latency_ms": _latencies(good),
                "tokens_in": statistics.fmean(before for before, _ in tokens) if tokens else None,
                "tokens_out": statistics.fmean(after for _, after in tokens) if tokens else None,
            }
        )
    return rows


def _never_refused(record: Record) -> bool:
    """What is bad has to be refused by an answer; one that never came is a server that broke on it."""
    return record.kind == "bad" and record.outcome.startswith(("connection", "timeout"))


def _doubts(settings: LoadSettings, result: RunResult, limits: Limits) -> list[str]:
    """Why the figures may be the client's rather than the server's."""
    found = []
    sent = sorted(record.late for record in result.records if record.outcome != UNSENT)
    late = quantile(sent, 0.99)
    if not sent:
        found.append("nothing was sent")
    elif late > limits.max_lateness:
        found.append(f"requests left {1000 * late:.0f} ms late (p99), more than {1000 * limits.max_lateness:.0f} ms")
    for worker in sorted({pulse.worker for pulse in result.pulses}):
        beats = [pulse for pulse in result.pulses if pulse.worker == worker]
        cpu = statistics.fmean(pulse.cpu for pulse in beats)
        if cpu > _MAX_CPU:
            found.append(f"client worker {worker} used {100 * cpu:.0f} % of its core; start more workers")
        lag = statistics.median(pulse.lag for pulse in beats)
        if lag > limits.max_lateness:
            found.append(f"client worker {worker} noticed answers up to {1000 * lag:.0f} ms late, second by second")
    if result.workers_finished < settings.num_workers:
        found.append(f"{settings.num_workers - result.workers_finished} of {settings.num_workers} workers were lost")
    if any(record.outcome.startswith("client:") for record in result.records):
        found.append("requests failed inside of the client; see its log")
    return found


class _ServerView:
    """The server's metrics between the beginning and the end of the run."""

    def __init__(self, settings: LoadSettings, result: RunResult) -> None:
        self._began_at = result.began_at
        self.samples = [sample for sample in result.samples if sample.at >= result.began_at - 1.5]
        last = self.samples[-1] if self.samples else None
        self._schedule = {"schedule": schedule} if (schedule := self._info(last, "schedule")) else {}
        self._stages = last.labels("mpm_tokens_total", "stage") if last else []

    def info(self) -> dict[str, str]:
        """Labels of `mpm_model_info`, as far as they are the same everywhere."""
        if not self.samples:
            return {}
        names = ("variant", "schedule", "align", "runtime", "precision", "device")
        return {name: value for name in names if (value := self._info(self.samples[-1], name))}

    def device(self) -> str:
        told = self.info().get("device", "unknown")
        return told if self.samples else "unknown"

    def figures(self) -> dict[str, Any]:
        """Totals over the run."""
        if len(self.samples) < 2:
            return {}
        first, last = self.samples[0], self.samples[-1]

        def grown(name: str, **labels: str) -> float:
            return last.total(name, **labels) - first.total(name, **labels)

        stages: dict[str, dict[str, Any]] = {}
        for stage in self._stages:
            lane = {"stage": stage, **self._schedule}
            before, after = (grown("mpm_tokens_total", point=point, **lane) for point in ("in", "out"))
            groups = grown("mpm_group_windows_count", **lane)
            stages[stage] = {
                "tokens_in": before,
                "tokens_out": after,
                "merged_share": 1 - after / before if before else None,
                "seconds": grown("mpm_stage_seconds_sum", **lane),
                "mean_group": grown("mpm_group_windows_sum", **lane) / groups if groups else None,
            }
        padding = grown("mpm_padding_tokens_total")
        computed = sum(stage["tokens_in"] for stage in stages.values())
        requests = grown("mpm_request_seconds_count")
        steps = {}
        for step in ("decode", "queue", "labels", "encode", "request"):
            number = grown(f"mpm_{step}_seconds_count")
            if number:
                steps[step] = 1000 * grown(f"mpm_{step}_seconds_sum") / number
        return {
            "images": grown("mpm_images_total"),
            "requests": requests,
            "stages": stages,
            "padding_share": padding / (padding + computed) if padding + computed else None,
            "mean_ms": steps,
            "busy_share": grown("mpm_stage_seconds_sum") / (last.at - first.at),
        }

    def memory_growth(self) -> float | None:
        """By what share the median of the last quarter exceeds that of the second, which is when all is warm."""
        memory = [sample.total("process_resident_memory_bytes") for sample in self.samples]
        quarter = len(memory) // 4
        if quarter < 2 or not all(memory):
            return None
        early = statistics.median(memory[quarter : 2 * quarter])
        return statistics.median(memory[-quarter:]) / early - 1

    def series(self, seconds: float) -> dict[str, list[float | None]]:
        """Gauges, and counters as rates since the reading so many seconds before."""
        found: dict[str, list[float | None]] = defaultdict(list)
        chosen = self.samples[:1]
        for sample in self.samples[1:]:
            if sample.at - chosen[-1].at >= 0.9 * seconds:
                chosen.append(sample)
        for before, after in pairwise(chosen):
            rate = partial(_rate, before, after)
            found["at"].append(round(after.at - self._began_at, 3))
            found["waiting_tokens"].append(after.total("mpm_waiting_tokens"))
            found["waiting_windows"].append(after.total("mpm_waiting_windows"))
            found["inflight"].append(after.total("mpm_inflight_requests"))
            found["images"].append(rate("mpm_images_total"))
            found["memory_mib"].append(after.total("process_resident_memory_bytes") / 2**20)
            found["cpu"].append(rate("process_cpu_seconds_total"))
            found["busy"].append(rate("mpm_stage_seconds_sum"))
            total = 0.0
            for i, stage in enumerate(self._stages):
                into, out = (
                    rate("mpm_tokens_total", point=point, stage=stage, **self._schedule) for point in ("in", "out")
                )
                total += into
                found[f"tokens_into_{stage}"].append(into)
                if i < len(self._stages) - 1:
                    found[f"merged_{stage}"].append(1 - out / into if into else None)
            padding = rate("mpm_padding_tokens_total")
            found["padding"].append(padding / (padding + total) if padding + total else None)
        return dict(found)

    @staticmethod
    def _info(sample: Sample | None, label: str) -> str:
        values = sample.labels("mpm_model_info", label) if sample else []
        return ", ".join(values)


def _rate(before: Sample, after: Sample, name: str, **labels: str) -> float:
    grown = after.total(name, **labels) - before.total(name, **labels)
    return grown / (after.at - before.at)


def _series(settings: LoadSettings, result: RunResult, served: _ServerView, elapsed: float) -> dict[str, Any]:
    """Everything over time, in bins."""
    least = max(elapsed / _MAX_BINS, _REQUESTS_OF_A_BIN * elapsed / max(1, len(result.records)))
    width = next((width for width in _BIN_SECONDS if width >= min(least, elapsed / _MIN_BINS)), _BIN_SECONDS[-1])
    bins = max(1, math.ceil(elapsed / width - 0.5))  # what is left at the end is no bin of its own
    starts = [i * width for i in range(bins)]
    widths = [*(float(width) for _ in starts[1:]), elapsed - starts[-1]]
    due: list[list[Record]] = [[] for _ in range(bins)]
    done: list[Counter[str]] = [Counter() for _ in range(bins)]
    for record in result.records:
        due[min(bins - 1, int(record.at / width))].append(record)
        done[min(bins - 1, int((record.at + record.seconds) / width))][record.outcome] += 1
    outcomes = sorted({outcome for counted in done for outcome in counted} - {OK})
    latency: dict[str, list[float | None]] = {name: [] for name in ("p50", "p90", "p99", "max")}
    for records in due:
        named = _latencies(sorted(r.seconds for r in records if r.outcome == OK and r.kind != "bad"))
        for name, values in latency.items():
            values.append(named[name])
    pulses = defaultdict(list)
    for pulse in result.pulses:
        pulses[min(bins - 1, int(pulse.at / width))].append(pulse)
    pictured = [record for record in result.records if record.kind != "bad"]
    spread = max(1, len(pictured) // _MAX_DOTS)
    return {
        "bin_seconds": width,
        "at": [round(start + wide / 2, 3) for start, wide in zip(starts, widths, strict=True)],
        "offered": [len(records) / wide for records, wide in zip(due, widths, strict=True)],
        "answered": [counted[OK] / wide for counted, wide in zip(done, widths, strict=True)],
        "failed": {
            outcome: [counted[outcome] / wide for counted, wide in zip(done, widths, strict=True)]
            for outcome in outcomes
        },
        "latency_ms": latency,
        "requests": [
            [round(record.at, 3), round(1000 * record.seconds, 1), record.outcome == OK]
            for record in pictured[::spread]
        ],
        "client": {
            "at": [(i + 0.5) * width for i in sorted(pulses)],
            "lag_ms": [1000 * max(pulse.lag for pulse in pulses[i]) for i in sorted(pulses)],
            "cpu": [max(pulse.cpu for pulse in pulses[i]) for i in sorted(pulses)],
            "inflight": [_inflight(pulses[i]) for i in sorted(pulses)],
        },
        "server": served.series(width),
        "quantiles_ms": _curve(sorted(r.seconds for r in result.records if r.outcome == OK and r.kind != "bad")),
    }


def _inflight(pulses: Sequence[Any]) -> float:
    """Of all workers: the mean of each, added up."""
    by_worker: dict[int, list[int]] = defaultdict(list)
    for pulse in pulses:
        by_worker[pulse.worker].append(pulse.inflight)
    return sum(statistics.fmean(counts) for counts in by_worker.values())


def _curve(ascending: Sequence[float]) -> list[list[float]]:
    """Latency over share, denser towards the slowest, as far as there are requests."""
    shares = []
    for nines in range(6):
        for part in range(18):
            shares.append(1 - 10**-nines * (1 - 0.05 * part))
    resolved = [share for share in shares if len(ascending) * (1 - share) >= 1]
    return [[share, round(1000 * quantile(ascending, share), 2)] for share in resolved]
