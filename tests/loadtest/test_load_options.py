"""Options: what they ask for, and what is said of wrong ones."""

import argparse
import math
from typing import Any

import pytest

from loadtest.arrivals import Phase
from loadtest.options import SOAK_GROWTH, SOAK_SECONDS, LoadSettings, add_arguments


def read(*flags: str, host: str | None = None, run_time: int | None = None) -> LoadSettings:
    parser: Any = argparse.ArgumentParser()
    add_arguments(parser)
    return LoadSettings.read(parser.parse_args(flags, argparse.Namespace(run_time=run_time)), host)


def test_defaults_wait_for_answers_until_somebody_ends_the_run() -> None:
    settings = read()
    assert (settings.is_open, settings.seconds, settings.num_due()) == (False, math.inf, 0)
    assert settings.hosts == ("http://127.0.0.1:8080",)
    assert settings.metrics == ("http://127.0.0.1:8090/metrics",)


def test_a_rate_is_open_and_shapes_change_it() -> None:
    settings = read("--rate=10", "--shape=spike", "--peak=4", run_time=20)
    assert settings.is_open
    assert settings.phases == (Phase(6.0, 10.0), Phase(4.0, 40.0), Phase(10.0, 10.0))


def test_a_soak_has_a_time_and_a_limit_of_its_own() -> None:
    settings = read("--rate=1", "--shape=soak")
    assert (settings.seconds, settings.max_growth) == (SOAK_SECONDS, SOAK_GROWTH)
    assert read("--rate=1", "--shape=soak", "--max-growth=10%", run_time=5).max_growth == 0.1


def test_shares_add_up() -> None:
    assert read("--accept=png=75%,json=25%", "--raw=20%").shares == pytest.approx(
        {"png": 0.6, "json": 0.2, "raw": 0.2, "bad": 0.0}
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--host=ftp://example.org", "host: expected http://HOST:PORT, got 'ftp://example.org'"),
        ("--accept=gif=1", "accept: expected shares of png and json"),
        ("--raw=60% --bad=50%", "raw, bad: expected at most 1 in sum, got 1.1"),
        ("--weights=*=-1", "weights: *: expected a number >= 0, got -1"),
        ("--weights=0=heavy", "weights: 0: expected a number, got 'heavy'"),
        ("--metrics=127.0.0.1:8090", "metrics: expected http://HOST:PORT/metrics, got '127.0.0.1:8090'"),
        ("--seed=-1", "seed: expected an integer >= 0, got -1"),
        ("--request-timeout=0s", "request-timeout: expected a number > 0, got 0"),
        ("--rate=1 --shape=spike", "run-time: expected with a shape that changes, got none"),
    ],
)
def test_what_is_wrong_is_named(flag: str, message: str) -> None:
    host, *flags = flag.split() if flag.startswith("--host") else ("", *flag.split())
    with pytest.raises(ValueError) as told:  # noqa: PT011
        read(*flags, host=host.removeprefix("--host=") or None)
    assert message in str(told.value)
