"""Narrow down the highest rate that holds, of several configurations in turns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_CLOSE = 0.15  # of the upper end: what is left when an end that no trial confirmed moves on


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one rate."""

    rate: float
    held: bool
    p50_ms: float | None
    p99_ms: float | None
    doubts: Sequence[str] = ()


@dataclass(slots=True)
class Bisection:
    """Narrows down the highest rate that holds, from a guess: an end that no trial confirms moves on.

    Attributes:
        low: a rate that held, or the guess of one.
        high: a rate that did not, or the guess of one.
        trials: all so far.
    """

    low: float
    high: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def next_rate(self) -> float:
        return (self.low + self.high) / 2

    def learn(self, trial: Trial) -> None:
        """Take the outcome of `next_rate` over."""
        self.trials.append(trial)
        close = _CLOSE * self.high
        if trial.held:
            self.low = trial.rate
            if self.high - self.low < close and all(other.held for other in self.trials):
                self.high *= 1.25
        else:
            self.high = trial.rate
            if self.high - self.low < close and not any(other.held for other in self.trials):
                self.low /= 4

    @property
    def best(self) -> Trial | None:
        """The trial at the highest rate that held."""
        return max((trial for trial in self.trials if trial.held), key=lambda trial: trial.rate, default=None)

    @property
    def rate(self) -> float:
        """The highest that held; 0 if none did."""
        return self.best.rate if self.best else 0.0


def bisect_interleaved(
    guesses: Sequence[tuple[float, float]], try_rate: Callable[[int, float, int], Trial], *, repeats: int, trials: int
) -> list[list[Bisection]]:
    """Search for several at once, in turns.

    Args:
        guesses: for each a rate that should hold and one that should not.
        try_rate: of the index of a configuration, a rate and the repeat.

    Returns:
        For each its bisections, one a repeat.
    """
    found: list[list[Bisection]] = [[] for _ in guesses]
    for repeat in range(repeats):
        for bisections, (low, high) in zip(found, guesses, strict=True):
            bisections.append(Bisection(low, high))
        for step in range(trials):
            for turn in range(len(found)):
                i = (turn + step + repeat) % len(found)  # none is always the first
                found[i][-1].learn(try_rate(i, found[i][-1].next_rate, repeat))
    return found


def summarize_search(bisections: Sequence[Bisection], first: Sequence[Bisection]) -> dict[str, Any]:
    """A configuration's result, and its ratio to the first one, repeat by repeat."""
    rates = [bisection.rate for bisection in bisections]
    best = sorted(bisections, key=lambda bisection: bisection.rate)[(len(bisections) - 1) // 2].best
    ratios = [mine.rate / other.rate for mine, other in zip(bisections, first, strict=True) if other.rate]
    return {
        "rate_per_second": round(statistics.median(rates), 4),
        "low": round(min(rates), 4),
        "high": round(max(bisection.high for bisection in bisections), 4),
        "p50_ms": best.p50_ms if best else None,
        "p99_ms": best.p99_ms if best else None,
        "repeats": [round(rate, 4) for rate in rates],
        "doubtful_trials": sum(bool(trial.doubts) for bisection in bisections for trial in bisection.trials),
        "ratio_to_first": {
            "median": round(statistics.median(ratios), 4),
            "low": round(min(ratios), 4),
            "high": round(max(ratios), 4),
        }
        if ratios
        else None,
        "trials": [
            {"repeat": i, "rate": round(trial.rate, 4), "held": trial.held, "p99_ms": trial.p99_ms}
            for i, bisection in enumerate(bisections)
            for trial in bisection.trials
        ],
    }
