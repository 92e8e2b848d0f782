"""Promises."""

import math

import pytest

from loadtest.slo import ErrorBudget, Slo, judge, quantile


def test_parse() -> None:
    slo = Slo.parse("p99=800ms, errors=0.1%,p50=0.2s,max=1m")
    assert [(bound.name, bound.quantile, bound.limit) for bound in slo.bounds] == [
        ("p99", 0.99, 0.8),
        ("errors", None, 0.001),
        ("p50", 0.5, 0.2),
        ("max", 1.0, 60.0),
    ]
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected promises such as"),
        ("p99", "expected NAME=VALUE"),
        ("q99=1s", "expected pNN=TIME"),
        ("p99=fast", "p99: expected a duration"),
        ("p99=-1s", "p99: expected a duration"),
        ("errors=120%", "errors: expected a share"),
        ("p99=1s,p99=2s", "each name once"),
    ],
)
def test_nonsense_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Slo.parse(text)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.995, 100), (1.0, 100)])
def test_quantiles_are_latencies_that_were_measured(share: float, expected: int) -> None:
    assert quantile(range(1, 101), share) == expected


def test_a_promise_is_kept_by_exactly_as_many_as_it_names() -> None:
    slo = Slo.parse("p99=1s")
    assert judge(slo, [0.1] * 99 + [2.0])[0].kept
    assert not judge(slo, [0.1] * 98 + [2.0] * 2)[0].kept


def test_who_is_refused_was_not_served_fast() -> None:
    p50, errors = judge(Slo.parse("p50=1s,errors=40%"), [0.01] * 49 + [math.inf] * 51)
    assert not p50.kept
    assert p50.value == math.inf
    assert not errors.kept
    assert errors.value == 0.51


def test_nothing_keeps_no_promise() -> None:
    assert not judge(Slo.parse("p99=1s"), [])[0].kept


def test_a_budget_is_spent_by_what_failed_and_by_what_waits_too_long() -> None:
    budget = ErrorBudget(Slo.parse("p90=1s"), 20)
    for _ in range(2):  # a tenth
        budget.count(2.0)
    assert not budget.is_spent([])
    assert not budget.is_spent([0.9, 0.5])
    assert budget.is_spent([1.1, 0.5])
    budget.count(math.inf)
    assert budget.is_spent([])


def test_errors_break_no_latency_and_without_promises_nothing_is_spent() -> None:
    budget = ErrorBudget(Slo.parse("errors=5%"), 20)
    budget.count(math.inf)
    assert not budget.is_spent([1000.0])
    budget.count(math.inf)
    assert budget.is_spent([])
    budget = ErrorBudget(None, 0)
    budget.count(math.inf)
    assert not budget.is_spent([9.0])


def test_how_many_may_break_it() -> None:
    p99, errors = Slo.parse("p99=1s,errors=1%").bounds
    assert [p99.allowed(number) for number in (50, 100, 250)] == [0, 1, 2]
    assert [errors.allowed(number) for number in (50, 100, 250)] == [0, 1, 2]
