"""A run over time, in bins."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from loadtest.client.masks import OK
from loadtest.client.records import Pulse, Record

from .latencies import latencies_ms

_MIN_BINS, _MAX_BINS = 8, 180
_REQUESTS_OF_A_BIN = 5  # quantiles of fewer say nothing
_BIN_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 3600)
_MAX_DOTS = 3000


class Bins:
    """Parts of a run of equal width, but for the last.

    Args:
        elapsed: seconds of the run.
        num_requests: of it; so many that a bin tells something share one.
    """

    def __init__(self, elapsed: float, num_requests: int) -> None:
        least = max(elapsed / _MAX_BINS, _REQUESTS_OF_A_BIN * elapsed / max(1, num_requests))
        wanted = min(least, elapsed / _MIN_BINS)
        self.width = next((width for width in _BIN_SECONDS if width >= wanted), _BIN_SECONDS[-1])
        self.number = max(1, math.ceil(elapsed / self.width - 0.5))  # what is left at the end is no bin of its own
        starts = [i * self.width for i in range(self.number)]
        self.widths = [*(float(self.width) for _ in starts[1:]), elapsed - starts[-1]]
        self.middles = [round(start + wide / 2, 3) for start, wide in zip(starts, self.widths, strict=True)]

    def index(self, at: float) -> int:
        return min(self.number - 1, int(at / self.width))

    def rates(self, counts: Iterable[int]) -> list[float]:
        """Per second, of what was counted in each."""
        return [count / wide for count, wide in zip(counts, self.widths, strict=True)]


def requests_over_time(bins: Bins, records: Sequence[Record]) -> dict[str, Any]:
    """Rates and quantiles by bins, and some requests one by one."""
    due: list[list[Record]] = [[] for _ in range(bins.number)]
    done: list[Counter[str]] = [Counter() for _ in range(bins.number)]
    for record in records:
        due[bins.index(record.at)].append(record)
        done[bins.index(record.at + record.seconds)][record.outcome] += 1
    failures = sorted({outcome for counted in done for outcome in counted} - {OK})
    pictured = [record for record in records if record.kind != "bad"]
    return {
        "bin_seconds": bins.width,
        "at": bins.middles,
        "offered": bins.rates(len(part) for part in due),
        "answered": bins.rates(counted[OK] for counted in done),
        "failed": {outcome: bins.rates(counted[outcome] for counted in done) for outcome in failures},
        "latency_ms": _quantiles_over_time(due),
        "requests": [
            [round(record.at, 3), round(1000 * record.seconds, 1), record.outcome == OK]
            for record in pictured[:: max(1, len(pictured) // _MAX_DOTS)]
        ],
    }


def client_over_time(bins: Bins, pulses: Sequence[Pulse]) -> dict[str, list[float]]:
    """How late and how busy the client was: the worst of its workers."""
    found: dict[int, list[Pulse]] = defaultdict(list)
    for pulse in pulses:
        found[bins.index(pulse.at)].append(pulse)
    ordered = sorted(found.items())
    return {
        "at": [(i + 0.5) * bins.width for i, _ in ordered],
        "lag_ms": [1000 * max(pulse.lag for pulse in beats) for _, beats in ordered],
        "cpu": [max(pulse.cpu for pulse in beats) for _, beats in ordered],
        "inflight": [_inflight(beats) for _, beats in ordered],
    }


def _quantiles_over_time(due: Sequence[Sequence[Record]]) -> dict[str, list[float | None]]:
    by_bin = [latencies_ms(good_seconds(records)) for records in due]
    return {name: [found[name] for found in by_bin] for name in ("p50", "p90", "p99", "max")}


def good_seconds(records: Iterable[Record]) -> list[float]:
    """Of answers to pictures, in ascending order."""
    return sorted(record.seconds for record in records if record.outcome == OK and record.kind != "bad")


def _inflight(pulses: Sequence[Pulse]) -> float:
    """Of all workers: the mean of each, added up."""
    by_worker: dict[int, list[int]] = defaultdict(list)
    for pulse in pulses:
        by_worker[pulse.worker].append(pulse.inflight)
    return sum(statistics.fmean(counts) for counts in by_worker.values())
