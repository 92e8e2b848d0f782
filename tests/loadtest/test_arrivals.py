"""When requests are due."""

import math
import statistics
from argparse import Namespace
from itertools import islice, pairwise

import pytest

from loadtest.arrivals import FACTORS, Phase, arrivals_of, factor_at, phases_of


def test_even_arrivals_are_in_the_middle_of_their_slots() -> None:
    due = list(arrivals_of([Phase(3, 2)], "even", 0))
    assert due == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75])


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_process() -> None:
    due = list(arrivals_of([Phase(200, 50)], "poisson", 1))
    gaps = [after - before for before, after in pairwise(due)]
    assert len(due) == pytest.approx(10_000, abs=4 * math.sqrt(10_000))
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.04)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.06)  # as large as the mean: memoryless
    assert due == sorted(due)
    assert due[-1] < 200


def test_a_seed_decides() -> None:
    phases = (Phase(30, 1), Phase(20, 5))
    assert list(arrivals_of(phases, "poisson", 3)) == list(arrivals_of(phases, "poisson", 3))
    assert list(arrivals_of(phases, "poisson", 3)) != list(arrivals_of(phases, "poisson", 4))


def test_a_run_without_an_end_has_arrivals_without_an_end() -> None:
    due = list(islice(arrivals_of([Phase(math.inf, 10)], "even", 0), 100))
    assert due[-1] == pytest.approx(9.95)


@pytest.mark.parametrize("process", ["even", "poisson"])
def test_each_phase_has_its_own_rate(process: str) -> None:
    phases = (Phase(100, 10), Phase(50, 0), Phase(100, 40))
    due = list(arrivals_of(phases, process, 0))
    counts = [sum(start <= at < end for at in due) for start, end in ((0, 100), (100, 150), (150, 250))]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1000, abs=130)
    assert counts[2] == pytest.approx(4000, abs=260)


def test_shapes() -> None:
    options = Namespace(steps="1,2", peak=4.0)
    assert phases_of(FACTORS["steps"](options), 3, 10) == (Phase(5, 3), Phase(5, 6))
    spike = phases_of(FACTORS["spike"](options), 1, 10)
    assert [phase.rate for phase in spike] == [1, 4, 1]
    assert sum(phase.seconds for phase in spike) == pytest.approx(10)
    assert [factor_at(FACTORS["spike"](options), share) for share in (0, 0.29, 0.31, 0.49, 0.51, 2)] == [
        1,
        1,
        4,
        4,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="run-time: expected with a shape that changes"):
        phases_of(FACTORS["spike"](options), 1, math.inf)
    with pytest.raises(ValueError, match=r"steps: expected numbers such as 0\.5,1,2, got '1,fast'"):
        FACTORS["steps"](Namespace(steps="1,fast"))
    with pytest.raises(ValueError, match="seconds: expected a number > 0, got 0"):
        Phase(0, 1)
    with pytest.raises(ValueError, match="rate: expected a number >= 0, got -1"):
        Phase(1, -1)
