"""How the load changes over a run, as shapes of locust.

A shape multiplies what the command line asks for: `--rate` where that is given, otherwise the users (`-u`). Choose one
with `--shape`, or on locust's page with `--class-picker`. Time counts from when the first request may be sent.
"""

import math
from typing import ClassVar

from locust import LoadTestShape

from .arrivals import FACTORS, factor_at


class RunShape(LoadTestShape):
    """A shape by the factors of its name; `runner.environment.run` knows the clock."""

    abstract = True
    use_common_options: ClassVar[bool] = True

    def tick(self) -> tuple[int, float] | None:
        run = self.runner.environment.run  # type: ignore[union-attr]
        options, settings = run.options, run.settings
        users, spawn_rate = options.num_users or 1, options.spawn_rate or 1.0
        if run.is_over:
            return None
        if settings is None or settings.is_open or settings.seconds == math.inf:
            return users, spawn_rate
        factors = FACTORS[type(self).__name__.lower()](options)
        return max(1, round(users * factor_at(factors, run.elapsed / settings.seconds))), spawn_rate


class Steady(RunShape):
    """The same load all the time."""


class Soak(RunShape):
    """The same, for half an hour unless `-t` says otherwise; the server's memory may grow by 5 % (`--max-growth`)."""


class Steps(RunShape):
    """One factor of `--steps` after the other, each for the same time."""


class Spike(RunShape):
    """Calm, a fifth of the time at `--peak` times the load, and the rest to recover in."""


SHAPES = (Steady, Steps, Spike, Soak)
