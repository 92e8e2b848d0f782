"""Tokens computed for nothing, by how windows are grouped."""

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.engine.grouping import GroupCost
from handlers.engine.scheduler import Lane, Waiting

from .simulate import Rules

Groups = list[list[int]]  # indices of windows

BATCH = 32  # of the paper's throughput, and of Infinity
POOL_BATCHES = 4  # what Infinity sorts at once


@dataclass(frozen=True, slots=True)
class Overhead:
    """Tokens computed beyond those of align 1, as shares of all tokens computed.

    Attributes:
        padding: added to reach the longest of a group.
        held_back: not merged for the sake of aligning.
        mean_group: windows in a group.
        shapes: different (windows, length) among the groups.
    """

    padding: float
    held_back: float
    mean_group: float
    shapes: int


def overhead(groups: Groups, lengths: Sequence[int], unaligned: Sequence[int], *, padded: bool = True) -> Overhead:
    """Count the tokens of groups of windows.

    Args:
        lengths: of the windows that the groups index.
        unaligned: what align 1 leaves of the same windows.
    """
    own = sum(lengths[i] for group in groups for i in group)
    least = sum(unaligned[i] for group in groups for i in group)
    shapes = [(len(group), max(lengths[i] for i in group)) for group in groups]
    computed = sum(size * longest for size, longest in shapes) if padded else own
    num_windows = sum(map(len, groups))
    return Overhead((computed - own) / computed, (own - least) / computed, num_windows / len(groups), len(set(shapes)))


def batches_by_arrival(lengths: Sequence[int], size: int = BATCH) -> Groups:
    """As the paper measures: whoever comes next."""
    return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]


def sorted_slices(lengths: Sequence[int], size: int = BATCH, pool: int = BATCH * POOL_BATCHES) -> Groups:
    """As Infinity does: sort what waits, cut it into slices."""
    groups = []
    for start in range(0, len(lengths), pool):
        order = sorted(range(start, min(start + pool, len(lengths))), key=lambda i: lengths[i])
        groups += [order[i : i + size] for i in range(0, len(order), size)]
    return groups


def scheduled_groups(lengths: Sequence[int], rules: Rules, cost: GroupCost) -> Groups:
    """As our scheduler does, on a lane that is refilled to its pool before every group."""
    scheduler = rules.scheduler(cost)
    arrivals = (Waiting(Lane(1, ()), length, float(i), False, i) for i, length in enumerate(lengths))
    groups: Groups = []
    while True:
        while len(scheduler) < rules.pool_windows and (window := next(arrivals, None)):
            scheduler.add([window], 0.0)
        group = scheduler.next_group(0.0)
        if group is None:
            return groups
        groups.append([member.payload for member in group.members])
