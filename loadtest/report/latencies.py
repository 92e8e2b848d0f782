"""Latencies as milliseconds by the names of quantiles."""

import math
import statistics
from collections.abc import Sequence

from loadtest.slo import quantile

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def latencies_ms(ascending: Sequence[float]) -> dict[str, float | None]:
    """`p50` to `p99.9`, `max` and `mean` of seconds in ascending order; None where there are none."""
    named = {f"p{100 * share:g}": quantile(ascending, share) for share in QUANTILES}
    named["max"] = ascending[-1] if ascending else math.nan
    named["mean"] = statistics.fmean(ascending) if ascending else math.nan
    return {name: round(1000 * value, 3) if math.isfinite(value) else None for name, value in named.items()}


def latency_curve(ascending: Sequence[float]) -> list[list[float]]:
    """Milliseconds over share, denser towards the slowest, as far as there are requests."""
    shares = []
    for nines in range(6):
        for part in range(18):
            shares.append(1 - 10**-nines * (1 - 0.05 * part))
    resolved = [share for share in shares if len(ascending) * (1 - share) >= 1]
    return [[share, round(1000 * quantile(ascending, share), 2)] for share in resolved]
