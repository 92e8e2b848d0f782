"""The release rule of groups."""

from itertools import combinations

import numpy as np
import pytest

from handlers.engine.grouping import choose_group, worth_streams

FREE = {"max_batch_tokens": 10**6, "max_group_windows": 100}


def packed(length: int) -> int:
    return length


def by_32(length: int) -> int:
    return -(-length // 32) * 32


def test_a_runtime_that_packs_gets_the_oldest() -> None:
    lengths = [5, 4, 3, 9, 1, 1]
    assert choose_group(lengths, packed, max_batch_tokens=10, max_group_windows=3) == [0, 1]
    assert choose_group(lengths, packed, max_batch_tokens=100, max_group_windows=3) == [0, 1, 2]
    assert choose_group(lengths, packed, **FREE) == [0, 1, 2, 3, 4, 5]


def test_windows_of_one_bucket_run_together_first() -> None:
    lengths = [60, 10, 64, 100, 40, 64]
    assert choose_group(lengths, by_32, max_batch_tokens=10**6, max_group_windows=4) == [0, 2, 4, 5]
    assert choose_group(lengths, by_32, max_batch_tokens=3 * 64, max_group_windows=100) == [0, 2, 4]


def test_the_nearest_buckets_fill_the_room_that_is_left() -> None:
    assert choose_group([60, 10, 300, 90, 64], by_32, max_batch_tokens=10**6, max_group_windows=4) == [0, 1, 3, 4]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_mates_are_nearer_to_the_oldest(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 7).tolist()
    chosen = choose_group(lengths, by_32, max_batch_tokens=10**6, max_group_windows=4)

    def distance(group: tuple[int, ...]) -> int:
        return sum(abs(by_32(lengths[i]) - by_32(lengths[0])) for i in group)

    least = min(distance((0, *mates)) for mates in combinations(range(1, 7), 3))
    assert chosen[0] == 0
    assert distance(tuple(chosen)) == least


@pytest.mark.parametrize("bucket", [packed, by_32])
def test_a_window_over_the_budget_runs_alone(bucket: type) -> None:
    assert choose_group([50, 4, 4], bucket, max_batch_tokens=10, max_group_windows=8) == [0]


def test_nothing_waiting_gives_no_group() -> None:
    assert choose_group([], by_32, **FREE) == []


@pytest.mark.parametrize(
    ("num_streams", "least"),
    [(0, None), (1, None), (2, 2), (3, 2), (4, 3), (16, 9)],
)
def test_streams_are_worth_it_where_most_have_something_to_do(num_streams: int, least: int | None) -> None:
    worth = [number for number in range(33) if worth_streams(number, num_streams)]
    assert worth == ([] if least is None else [*range(least, 33)])
