import numpy as np
import pytest

from handlers.bench.padding import batches_by_arrival, overhead, scheduled_groups, sorted_slices
from handlers.bench.simulate import Rules
from handlers.engine.grouping import GroupCost

LENGTHS = [4, 1, 3, 2, 4, 1]


def test_padding_is_what_the_longest_adds() -> None:
    found = overhead([[0, 1, 2], [3, 4, 5]], LENGTHS, LENGTHS)
    assert found.padding == pytest.approx((24 - 15) / 24)
    assert (found.held_back, found.mean_group, found.shapes) == (0, 3, 1)


def test_held_back_is_what_aligning_left_unmerged() -> None:
    found = overhead([[0, 1], [2]], [4, 4, 8], [3, 4, 6])
    assert (found.padding, found.held_back) == (0, pytest.approx(3 / 16))
    assert found.shapes == 2


def test_packed_groups_have_no_padding() -> None:
    assert overhead([[0, 1, 2, 3, 4, 5]], LENGTHS, LENGTHS, padded=False).padding == 0


def test_arrival_order_takes_whoever_comes_next() -> None:
    assert batches_by_arrival(LENGTHS, 4) == [[0, 1, 2, 3], [4, 5]]


def test_sorted_slices_sort_one_pool_at_a_time() -> None:
    assert sorted_slices(LENGTHS, 2, 4) == [[1, 3], [2, 0], [5, 4]]


def test_the_scheduler_picks_equal_mates_from_its_pool() -> None:
    rules = Rules(padded=True, max_group_windows=2, pool_windows=6)
    assert scheduled_groups(LENGTHS, rules, GroupCost()) == [[0, 4], [1, 5], [2], [3]]


@pytest.mark.parametrize("padded", [False, True])
def test_the_scheduler_groups_every_window_once(padded: bool) -> None:
    lengths = np.random.default_rng(0).integers(500, 600, 100).tolist()
    rules = Rules(padded=padded, max_group_windows=8, pool_windows=16)
    groups = scheduled_groups(lengths, rules, GroupCost(launch=100.0))
    assert sorted(i for group in groups for i in group) == list(range(100))
