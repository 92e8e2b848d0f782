"""Which windows to compute together, given how long each one is.

Pure functions: the engine and the simulator share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_EQUAL = 1 + 1e-9  # costs this close are rounding apart, and the larger group is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """Seconds that a padded group of B sequences of length L takes: launch + token·B·L + pair·B·L²."""

    launch: float = 0.0
    token: float = 1.0
    pair: float = 0.0

    def __call__(self, num_sequences: int, length: int) -> float:
        return self.launch + num_sequences * length * (self.token + self.pair * length)

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, int, float]]) -> "GroupCost":
        """Fit to measured (num_sequences, length, seconds), each weighted by its own size.

        No term becomes negative: of the subsets of terms whose least-squares fit is non-negative,
        the best one is taken.

        Raises:
            ValueError: there is no sample, or one is not positive.
        """
        if not samples or any(min(sample) <= 0 for sample in samples):
            raise ValueError(f"samples: expected positive (num_sequences, length, seconds), got {list(samples)}")
        sizes = np.array([(1.0, b * n, b * n * n) for b, n, _ in samples])
        design = sizes / np.array([[seconds] for _, _, seconds in samples])  # relative errors count alike
        best, least = np.zeros(3), np.inf
        for terms in (list(t) for size in (1, 2, 3) for t in combinations(range(3), size)):
            found, *_ = np.linalg.lstsq(design[:, terms], np.ones(len(samples)), rcond=None)
            error = float(np.square(design[:, terms] @ found - 1).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(3), error
                best[terms] = found
        return cls(launch=float(best[0]), token=float(best[1]), pair=float(best[2]))


def plan_groups(
    lengths: Sequence[int],
    cost: GroupCost | None,
    *,
    max_batch_tokens: int,
    max_group_windows: int,
) -> list[list[int]]:
    """Split waiting sequences into groups that run one after the other.

    Padded execution (a cost is given): the split of least total cost, every group padded to its
    longest. Packed execution (no cost): nothing is padded, so groups are filled in order of age.

    Args:
        lengths: tokens of each waiting sequence, oldest first.
        cost: of a padded group; None for packed execution.
        max_batch_tokens: tokens of a group, padding included. A longer sequence runs alone.
        max_group_windows: sequences of a group.

    Returns:
        Groups of indices into `lengths`, the group with the oldest member first, oldest first inside each.

    Raises:
        ValueError: a length or a limit is below 1.
    """
    for name, value in (("max_batch_tokens", max_batch_tokens), ("max_group_windows", max_group_windows)):
        if value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths: expected integers >= 1, got {min(lengths)}")
    if cost is None:
        return _fill_by_age(lengths, max_batch_tokens, max_group_windows)
    groups = _cut_sorted(lengths, cost, max_batch_tokens, max_group_windows)
    return sorted(sorted(group) for group in groups)


def _fill_by_age(lengths: Sequence[int], max_batch_tokens: int, max_group_windows: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not groups or length > room or len(groups[-1]) == max_group_windows:
            groups.append([])
            room = max_batch_tokens
        groups[-1].append(i)
        room -= length
    return groups


def _cut_sorted(
    lengths: Sequence[int], cost: GroupCost, max_batch_tokens: int, max_group_windows: int
) -> list[list[int]]:
    """Dynamic programming over the sorted lengths.

    Some optimal split is contiguous in them: swapping members between two groups until all of one
    are no longer than all of the other keeps both sizes and lengthens neither group.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    least = [0.0] + [np.inf] * len(order)  # of the first n sequences
    start = [0] * (len(order) + 1)  # where the last group of that split begins
    for n in range(1, len(order) + 1):
        longest = lengths[order[n - 1]]
        largest = max(1, min(n, max_group_windows, max_batch_tokens // longest))
        one_more = longest * (cost.token + cost.pair * longest)
        group = cost.launch
        for size in range(1, largest + 1):
            group += one_more
            total = least[n - size] + group
            if total <= least[n] * _EQUAL:
                least[n], start[n] = total, n - size
    groups, n = [], len(order)
    while n:
        groups.append(order[start[n] : n])
        n = start[n]
    return groups
