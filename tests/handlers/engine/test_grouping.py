from collections.abc import Iterator

import numpy as np
import pytest

from handlers.engine.grouping import GroupCost, plan_groups


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to split items into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for split in partitions(rest):
        yield [[first], *split]
        for i, group in enumerate(split):
            yield [*split[:i], [first, *group], *split[i + 1 :]]


def padded_cost(groups: list[list[int]], lengths: list[int], cost: GroupCost) -> float:
    return sum(cost(len(group), max(lengths[i] for i in group)) for group in groups)


@pytest.mark.parametrize("seed", range(12))
def test_padded_plan_is_the_cheapest_of_all_splits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=7).tolist()
    cost = GroupCost(launch=float(rng.choice([0, 5, 60])), token=1.0, pair=float(rng.choice([0, 0.02, 0.2])))
    max_tokens, max_windows = int(rng.choice([40, 90, 1000])), int(rng.integers(1, 8))

    def allowed(groups: list[list[int]]) -> bool:
        return all(
            len(g) == 1 or (len(g) <= max_windows and len(g) * max(lengths[i] for i in g) <= max_tokens)
            for g in groups
        )

    plan = plan_groups(lengths, cost, max_batch_tokens=max_tokens, max_group_windows=max_windows)

    assert sorted(i for group in plan for i in group) == list(range(7))
    assert allowed(plan)
    cheapest = min(padded_cost(g, lengths, cost) for g in partitions(list(range(7))) if allowed(g))
    assert padded_cost(plan, lengths, cost) == pytest.approx(cheapest)


@pytest.mark.parametrize("seed", range(20))
def test_equal_lengths_share_a_group_whatever_rounding_says(seed: int) -> None:
    cost = GroupCost(token=float(np.random.default_rng(seed).uniform(1e-7, 1e-5)))
    plan = plan_groups([785] * 16, cost, max_batch_tokens=10**6, max_group_windows=8)
    assert [len(group) for group in plan] == [8, 8]


def test_groups_and_members_are_in_order_of_age() -> None:
    lengths = [9, 3, 9, 3, 9, 3]
    plan = plan_groups(lengths, GroupCost(), max_batch_tokens=100, max_group_windows=3)
    assert plan == [[0, 2, 4], [1, 3, 5]]


def test_packed_plan_fills_the_budget_in_order_of_age() -> None:
    plan = plan_groups([5, 4, 3, 9, 1, 1], None, max_batch_tokens=10, max_group_windows=3)
    assert plan == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("cost", [None, GroupCost()])
def test_a_sequence_over_the_budget_runs_alone(cost: GroupCost | None) -> None:
    plan = plan_groups([50, 4, 4], cost, max_batch_tokens=10, max_group_windows=8)
    assert plan == [[0], [1, 2]]


@pytest.mark.parametrize("cost", [None, GroupCost()])
def test_nothing_waiting_gives_no_group(cost: GroupCost | None) -> None:
    assert plan_groups([], cost, max_batch_tokens=1, max_group_windows=1) == []


@pytest.mark.parametrize(
    ("lengths", "limits", "name"),
    [([0], (1, 1), "lengths"), ([1], (0, 1), "max_batch_tokens"), ([1], (1, 0), "max_group_windows")],
)
def test_bad_arguments_are_named(lengths: list[int], limits: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        plan_groups(lengths, None, max_batch_tokens=limits[0], max_group_windows=limits[1])


def test_fit_recovers_the_cost_that_made_the_samples() -> None:
    true = GroupCost(launch=2e-3, token=3e-6, pair=1e-9)
    shapes = [(1, 500), (1, 1000), (4, 500), (4, 1000), (8, 700)]
    fitted = GroupCost.fit([(b, n, true(b, n)) for b, n in shapes])
    assert fitted(6, 800) == pytest.approx(true(6, 800), rel=1e-6)


def test_fit_of_noisy_samples_has_no_negative_term() -> None:
    fitted = GroupCost.fit([(1, 100, 1.0), (2, 100, 1.5), (4, 100, 2.0), (8, 100, 9.0)])
    assert min(fitted.launch, fitted.token, fitted.pair) >= 0


def test_fit_needs_positive_samples() -> None:
    with pytest.raises(ValueError, match="samples"):
        GroupCost.fit([(1, 100, 0.0)])
