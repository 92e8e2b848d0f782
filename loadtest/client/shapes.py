"""How the offered rate changes over a run: phases of constant rate."""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.checking import check_number

SHAPES = ("steady", "steps", "spike", "soak", "replay")


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of constant rate.

    Attributes:
        seconds: how long it lasts.
        rate: requests per second; 0 for a pause.
    """

    seconds: float
    rate: float

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, above=True)
        check_number("rate", self.rate)


def steady(rate: float, seconds: float) -> tuple[Phase, ...]:
    return (Phase(seconds, rate),)


def steps(rates: Sequence[float], seconds: float) -> tuple[Phase, ...]:
    """One rate after the other, each for an equal part of the time."""
    if not rates:
        raise ValueError("rates: expected at least one rate, got none")
    return tuple(Phase(seconds / len(rates), rate) for rate in rates)


def spike(rate: float, peak: float, seconds: float) -> tuple[Phase, ...]:
    """Calm, a fifth of the time at the peak, and the rest to recover in."""
    return (Phase(0.3 * seconds, rate), Phase(0.2 * seconds, peak), Phase(0.5 * seconds, rate))


def total_seconds(phases: Sequence[Phase]) -> float:
    return sum(phase.seconds for phase in phases)
