"""What a run is held against: `p99=800ms,errors=0.1%`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .checking import parse_seconds, parse_share

_QUANTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Bound:
    """One promise.

    Attributes:
        name: `p50`, `p99.9`, `max` or `errors`.
        quantile: of latency, within 0..1; None for the share of errors.
        limit: seconds, or a share.
    """

    name: str
    quantile: float | None
    limit: float

    def allowed(self, num_requests: int) -> int:
        """How many of so many requests may break it."""
        if self.quantile is None:
            return math.floor(self.limit * num_requests + 1e-9)
        return num_requests - rank(self.quantile, num_requests)

    def broken_by(self, seconds: float) -> bool:
        """Whether a request that took so long (infinity: that failed) counts against it."""
        return seconds == math.inf if self.quantile is None else seconds > self.limit

    def told(self) -> str:
        return (
            f"{self.name}={100 * self.limit:g}%" if self.quantile is None else f"{self.name}={self.limit * 1000:g}ms"
        )


@dataclass(frozen=True, slots=True)
class Slo:
    """Promises that all have to be kept."""

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read promises parted by commas.

        Raises:
            ValueError: one is unknown, given twice or without a sensible limit, or there is none.
        """
        bounds = [_parse_bound(part.strip()) for part in text.split(",") if part.strip()]
        if not bounds:
            raise ValueError(f"slo: expected promises such as p99=800ms,errors=0.1%, got {text!r}")
        names = [bound.name for bound in bounds]
        if len(set(names)) < len(names):
            raise ValueError(f"slo: expected every promise once, got {text!r}")
        return cls(tuple(bounds))

    def __str__(self) -> str:
        return ",".join(bound.told() for bound in self.bounds)


def _parse_bound(text: str) -> Bound:
    name, equals, limit = text.partition("=")
    matched = _QUANTILE.fullmatch(name)
    if not equals or not (matched or name in ("max", "errors")):
        raise ValueError(f"slo: expected pNN=TIME, max=TIME or errors=SHARE, got {text!r}")
    try:
        if name == "errors":
            return Bound(name, None, parse_share(limit))
        return Bound(name, float(matched[1]) / 100 if matched else 1.0, parse_seconds(limit))
    except ValueError as error:
        raise ValueError(f"slo: {name}: {error}") from None


def rank(share: float, number: int) -> int:
    """Which of so many values in ascending order, counted from 1, is the quantile: the first with `share` up to it."""
    return max(1, math.ceil(share * number - 1e-9))


def quantile(ascending: Sequence[float], share: float) -> float:
    """Nearest rank, no interpolation: a latency that some request had. NaN of nothing."""
    return ascending[rank(share, len(ascending)) - 1] if ascending else math.nan


@dataclass(frozen=True, slots=True)
class Kept:
    """How a promise fared."""

    bound: Bound
    value: float
    kept: bool


def hold_against(slo: Slo, latencies: Sequence[float]) -> list[Kept]:
    """Compare a run with its promises.

    Args:
        latencies: seconds of all requests that should have got a mask, in any order; infinity for those that got none,
            so a server can't become fast by refusing.
    """
    ascending = sorted(latencies)
    kept = []
    for bound in slo.bounds:
        broken = sum(bound.broken_by(seconds) for seconds in ascending)
        if bound.quantile is None:
            value = broken / len(ascending) if ascending else math.nan
        else:
            value = quantile(ascending, bound.quantile)
        kept.append(Kept(bound, value, bool(ascending) and broken <= bound.allowed(len(ascending))))
    return kept
