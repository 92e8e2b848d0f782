"""When requests are due. Decided before they are sent, so that no server can slow the clock down."""

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any

from .checks import check_number

PROCESSES = ("poisson", "even")
Factors = Sequence[tuple[float, float]]  # shares of the time, which add up to 1, and what the load is multiplied with


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of constant rate: seconds, infinity for the last one of a run without an end, and requests per second."""

    seconds: float
    rate: float

    def __post_init__(self) -> None:
        if self.seconds != math.inf:
            check_number("seconds", self.seconds, above=True)
        check_number("rate", self.rate)


def _steady(options: Any) -> Factors:
    return [(1.0, 1.0)]


def _steps(options: Any) -> Factors:
    try:
        factors = [float(factor) for factor in options.steps.split(",")]
    except ValueError:
        raise ValueError(f"steps: expected numbers such as 0.5,1,2, got {options.steps!r}") from None
    for factor in factors:
        check_number("steps", factor)
    return [(1 / len(factors), factor) for factor in factors]


def _spike(options: Any) -> Factors:
    check_number("peak", options.peak)
    return [(0.3, 1.0), (0.2, options.peak), (0.5, 1.0)]


FACTORS: Mapping[str, Callable[[Any], Factors]] = {
    "steady": _steady,
    "steps": _steps,
    "spike": _spike,
    "soak": _steady,
}


def phases_of(factors: Factors, rate: float, seconds: float) -> tuple[Phase, ...]:
    """Rates over time; a ValueError if they change over a run that has no end."""
    if len(factors) > 1 and seconds == math.inf:
        raise ValueError("run-time: expected with a shape that changes, got none")
    return tuple(Phase(share * seconds, factor * rate) for share, factor in factors)


def factor_at(factors: Factors, share: float) -> float:
    """The factor after this share of the time."""
    ends = accumulate(part for part, _ in factors)
    return next((factor for end, (_, factor) in zip(ends, factors, strict=True) if share < end), factors[-1][1])


def arrivals_of(phases: Sequence[Phase], process: str, seed: int) -> Iterator[float]:
    """Due times of phases, one after the other, in seconds; without an end where the last phase has none.

    The process, "poisson" or "even", runs at rate 1 in a time that passes faster where the rate is higher, so phases
    need no seams.
    """
    dice = random.Random(seed)
    starts = list(accumulate((phase.seconds for phase in phases), initial=0.0))
    passed = list(accumulate((phase.seconds * phase.rate for phase in phases), initial=0.0))
    gaps = iter(lambda: dice.expovariate(1.0), None) if process == "poisson" else chain([0.5], repeat(1.0))
    for due in accumulate(gaps):
        if due >= passed[-1]:
            return
        i = bisect_right(passed, due) - 1
        yield starts[i] + (due - passed[i]) / phases[i].rate
