"""Service level objectives of a run: `p99=800ms,errors=0.1%`."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .checks import parse_pairs, parse_seconds, parse_share


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

    @classmethod
    def parse(cls, name: str, limit: str) -> "Bound":
        if name == "errors":
            return cls(name, None, parse_share("slo: errors", limit))
        matched = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)", name)
        if not matched and name != "max":
            raise ValueError(f"slo: expected pNN=TIME, max=TIME or errors=SHARE, got {name}={limit}")
        return cls(name, float(matched[1]) / 100 if matched else 1.0, parse_seconds(f"slo: {name}", limit))

    def allowed(self, num_requests: int) -> int:
        """How many of so many requests may exceed it."""
        if self.quantile is None:
            return math.floor(self.limit * num_requests + 1e-9)
        return num_requests - rank(self.quantile, num_requests)

    def broken_by(self, seconds: float) -> bool:
        """Whether a request with this latency counts against it; infinity is a failure."""
        return seconds == math.inf if self.quantile is None else seconds > self.limit

    def __str__(self) -> str:
        return (
            f"{self.name}={100 * self.limit:g}%" if self.quantile is None else f"{self.name}={1000 * self.limit:g}ms"
        )


@dataclass(frozen=True, slots=True)
class Slo:
    """Promises that all have to be kept."""

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Read promises, separated by commas.

        Raises:
            ValueError: one is unknown, given twice or without a sensible limit, or there is none.
        """
        bounds = tuple(Bound.parse(name, limit) for name, limit in parse_pairs("slo", text).items())
        if not bounds:
            raise ValueError(f"slo: expected promises such as p99=800ms,errors=0.1%, got {text!r}")
        return cls(bounds)

    def __str__(self) -> str:
        return ",".join(map(str, self.bounds))


def rank(share: float, number: int) -> int:
    """Position of the quantile among so many ascending values, counted from 1: the first with `share` up to it."""
    return max(1, math.ceil(share * number - 1e-9))


def quantile(ascending: Sequence[float], share: float) -> float:
    """Nearest rank without interpolation, a latency that some request had; NaN if there is none."""
    return ascending[rank(share, len(ascending)) - 1] if ascending else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """A promise, what was measured, and whether it was kept."""

    bound: Bound
    value: float
    kept: bool


def judge(slo: Slo, latencies: Sequence[float]) -> list[Verdict]:
    """Compare a run with its promises.

    Args:
        latencies: seconds of all requests that should have got a mask, in any order; infinity for those that did not,
            so that a server can't become fast by refusing.
    """
    ascending, verdicts = sorted(latencies), []
    for bound in slo.bounds:
        broken = sum(map(bound.broken_by, ascending))
        share = broken / len(ascending) if ascending else math.nan
        value = share if bound.quantile is None else quantile(ascending, bound.quantile)
        verdicts.append(Verdict(bound, value, bool(ascending) and broken <= bound.allowed(len(ascending))))
    return verdicts


class ErrorBudget:
    """Counts requests that break promises, to end a run early once it can't keep them any more.

    Args:
        slo: None for no promises, whose budget is never spent.
        num_requests: of the whole run; each promise allows some of them to break it.
    """

    def __init__(self, slo: Slo | None, num_requests: int) -> None:
        self._left = {bound: bound.allowed(num_requests) for bound in (slo.bounds if slo else ())}

    def count(self, seconds: float) -> None:
        """A request is over after so many seconds; infinity if it failed."""
        for bound in self._left:
            self._left[bound] -= bound.broken_by(seconds)

    def is_spent(self, ages: Iterable[float]) -> bool:
        """Whether a promise is broken, given the ages in seconds of the requests in flight, oldest first."""
        waiting = list(ages)
        return any(len(list(takewhile(bound.broken_by, waiting))) > left for bound, left in self._left.items())
