"""From records to figures: what was promised, what was kept, and whether the client can be believed."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from loadtest.client.masks import OK
from loadtest.client.records import UNSENT, Pulse, Record
from loadtest.machine import describe_machine, installed_versions
from loadtest.running import RunResult
from loadtest.settings import LoadSettings
from loadtest.slo import Slo, hold_against, quantile

from .latencies import latencies_ms, latency_curve
from .series import Bins, client_over_time, good_seconds, requests_over_time
from .server_view import MemoryView, ServerView

_MAX_CPU = 0.85  # of a core: one more request would wait for the client


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Beyond what a run fails, or says nothing about the server.

    Attributes:
        slo: promises of the server.
        max_lateness: seconds by which the client may send late, in 99 of 100 requests.
        max_growth: by what share the server's memory, and that of all its processes where they are watched, may grow
            between the second and the last quarter; None for any.
    """

    slo: Slo
    max_lateness: float = 0.05
    max_growth: float | None = None


def summarize(settings: LoadSettings, result: RunResult, limits: Limits) -> dict[str, Any]:
    """A report as plain data; see `loadtest.report.page` for how it looks.

    `valid` tells whether the client kept up, `held` whether the server kept every promise. A run that is not valid
    tells nothing about the server, good or bad. `latency_ms` is that of answers; `at_least_ms` counts what failed too,
    with the time after which it did.
    """
    served, memory = ServerView(result), MemoryView(result)
    checks = list(_checks(result, limits, served, memory))
    doubts = list(_doubts(settings, result, limits))
    elapsed = max([settings.seconds, *(record.at + record.seconds for record in result.records)])
    return {
        "began_at": datetime.fromtimestamp(result.began_at, UTC).isoformat(timespec="seconds"),
        "device": served.device(),
        "client": describe_machine(),
        "versions": installed_versions(),
        "served": served.info(),
        "settings": asdict(settings) | {"trace": len(settings.trace), "library": sorted(settings.library)},
        "slo": str(limits.slo),
        "held": all(bool(check["kept"]) for check in checks),
        "valid": not doubts,
        "doubts": doubts,
        "checks": checks,
        **_request_figures(settings, result.records, elapsed),
        "library": {
            "compared": len(result.library),
            "least": min(result.library.values(), default=None),
            "pictures": dict(sorted(result.library.items())),
        },
        "replicas": _replicas(result.records, served),
        "server": served.figures(),
        "memory_growth": served.memory_growth(),
        "memory": memory.figures(),
        "metrics_missed": result.num_missed,
        "series": _series(result, served, memory, elapsed),
    }


def _checks(result: RunResult, limits: Limits, served: ServerView, memory: MemoryView) -> Iterator[dict[str, Any]]:
    """Every promise, and how it fared."""
    asked = [record for record in result.records if record.kind != "bad"]
    for kept in hold_against(limits.slo, [record.seconds if record.outcome == OK else math.inf for record in asked]):
        yield {
            "name": kept.bound.name,
            "value": kept.value if math.isfinite(kept.value) else None,
            "limit": kept.bound.limit,
            "unit": "share" if kept.bound.quantile is None else "seconds",
            "kept": kept.kept,
        }
    wrong = sum(record.outcome.startswith("wrong") or _never_refused(record) for record in result.records)
    yield {"name": "wrong answers", "value": wrong, "limit": 0, "unit": "count", "kept": wrong == 0}
    if limits.max_growth is not None:
        yield _growth_check("memory growth", served.memory_growth(), limits.max_growth)
        if memory.samples:
            yield _growth_check("memory growth, total", memory.growth(), limits.max_growth)
    if result.gave_up:
        yield {"name": "gave up early", "value": 1, "limit": 0, "unit": "count", "kept": False}


def _growth_check(name: str, growth: float | None, limit: float) -> dict[str, Any]:
    """What is not known to be kept is not kept."""
    kept = growth is not None and growth <= limit
    return {"name": name, "value": growth, "limit": limit, "unit": "share", "kept": kept}


def _never_refused(record: Record) -> bool:
    """What is bad has to be refused by an answer; one that never came is a server that broke on it."""
    return record.kind == "bad" and record.outcome.startswith(("connection", "timeout"))


def _request_figures(settings: LoadSettings, records: Sequence[Record], elapsed: float) -> dict[str, Any]:
    asked = [record for record in records if record.kind != "bad"]
    answered = [record for record in asked if record.outcome == OK]
    agreements = [record.agreement for record in records if record.agreement is not None]
    return {
        "requests": len(records),
        "outcomes": dict(Counter(record.outcome for record in records).most_common()),
        "offered_per_second": len(records) / settings.seconds,
        "answered_per_second": len(answered) / elapsed,
        "elapsed_seconds": elapsed,
        "latency_ms": latencies_ms(good_seconds(records)),
        "at_least_ms": latencies_ms(sorted(record.seconds for record in asked)),
        "kinds": _by(records, lambda record: record.kind),
        "pictures": _by(answered, lambda record: record.name),
        "agreement": {"compared": len(agreements), "least": min(agreements, default=None)},
        "lateness_ms": latencies_ms(_lateness(records)),
    }


def _replicas(records: Sequence[Record], served: ServerView) -> list[dict[str, Any]]:
    """How requests spread: by who answered where a proxy tells, or by the metrics of several servers."""
    counts: Mapping[str, float] = Counter(record.replica for record in records if record.replica)
    counts = counts or served.images_by_replica()
    total = sum(counts.values())
    if not total or len(counts) < 2:
        return []
    return [{"name": name, "requests": counts[name], "share": counts[name] / total} for name in sorted(counts)]


def _by(records: Iterable[Record], key: Callable[[Record], str]) -> list[dict[str, Any]]:
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
                "latency_ms": latencies_ms(good),
                "tokens_in": statistics.fmean(before for before, _ in tokens) if tokens else None,
                "tokens_out": statistics.fmean(after for _, after in tokens) if tokens else None,
            }
        )
    return rows


def _lateness(records: Iterable[Record]) -> list[float]:
    return sorted(record.late for record in records if record.outcome != UNSENT)


def _doubts(settings: LoadSettings, result: RunResult, limits: Limits) -> Iterator[str]:
    """Why the figures may be the client's rather than the server's."""
    sent = _lateness(result.records)
    late = quantile(sent, 0.99)
    if not sent:
        yield "nothing was sent"
    elif late > limits.max_lateness:
        yield f"requests left {1000 * late:.0f} ms late (p99), more than {1000 * limits.max_lateness:.0f} ms"
    for worker in sorted({pulse.worker for pulse in result.pulses}):
        yield from _doubts_of_worker([pulse for pulse in result.pulses if pulse.worker == worker], worker, limits)
    if (lost := settings.num_workers - result.workers_finished) > 0:
        yield f"{lost} of {settings.num_workers} workers were lost"
    due = 0 if settings.closed or result.gave_up else len(settings.arrivals())
    if (missing := due - len(result.records)) > 0:
        yield f"of {missing} of {due} requests nothing is known"
    if any(record.outcome.startswith("client:") for record in result.records):
        yield "requests failed inside of the client; see its log"


def _doubts_of_worker(pulses: Sequence[Pulse], worker: int, limits: Limits) -> Iterator[str]:
    cpu = statistics.fmean(pulse.cpu for pulse in pulses)
    if cpu > _MAX_CPU:
        yield f"client worker {worker} used {100 * cpu:.0f} % of its core; start more workers"
    lag = statistics.median(pulse.lag for pulse in pulses)
    if lag > limits.max_lateness:
        yield f"client worker {worker} noticed answers up to {1000 * lag:.0f} ms late, second by second"


def _series(result: RunResult, served: ServerView, memory: MemoryView, elapsed: float) -> dict[str, Any]:
    """Everything over time, in bins."""
    bins = Bins(elapsed, len(result.records))
    return {
        **requests_over_time(bins, result.records),
        "client": client_over_time(bins, result.pulses),
        "server": served.series(bins.width),
        "memory": memory.series(bins.width),
        "quantiles_ms": latency_curve(good_seconds(result.records)),
    }
