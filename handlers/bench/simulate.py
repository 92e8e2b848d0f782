"""What the scheduler does with a device of known speed: the real `Scheduler` on a virtual clock, nothing computed.

A figure from here is a simulation: as good as the costs it is given, and blind to what they leave out
(decoding pictures, labels, the scheduler's own time, which is measured beside it).
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from handlers.engine.grouping import GroupCost
from handlers.engine.scheduler import Group, Lane, Scheduler, Waiting
from mpm_ops.bench import percentile_ms

_PAPER = "MPM (arXiv 2604.05718), supplement"
_LAUNCH_SECONDS = 1e-4  # assumed: about ten kernels of a block or a merge, started one by one from Python
_MERGE_SECONDS = 0.994e-3 / 32  # a window's share of one merge, Table 3
_BLOCKS = (2, 3, 9)  # of ViT-S cut at (2, 5), with the two decoder layers counted as encoder blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How windows are grouped; see the arguments of `Scheduler`. Packed execution unless `padded`."""

    padded: bool = False
    max_batch_tokens: int = 16_384
    max_group_windows: int = 8
    pool_windows: int = 8
    max_group_delay: float = 0.02

    def scheduler(self, cost: GroupCost) -> "Scheduler[Any]":
        return Scheduler(
            max_batch_tokens=self.max_batch_tokens,
            max_group_windows=self.max_group_windows,
            pool_windows=self.pool_windows,
            max_group_delay=self.max_group_delay,
            bulk_patience=10.0,
            cost=cost if self.padded else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device: what a group costs in every stage, and where the figures come from."""

    name: str
    source: str
    stages: tuple[GroupCost, ...]

    def seconds(self, stage: int, lengths: Sequence[int], *, padded: bool) -> float:
        """A group's time: padded to its longest window, or packed."""
        cost = self.stages[stage]
        if padded:
            return cost(len(lengths), max(lengths))
        return cost.launch + sum(cost(1, length) - cost.launch for length in lengths)

    def capacity(self, windows: Sequence[tuple[int, ...]], group: int) -> float:
        """Windows per second if every group had so many windows of its own length."""
        seconds = [cost(group, w[stage]) / group for w in windows for stage, cost in enumerate(self.stages)]
        return len(windows) / sum(seconds)


def paper_profiles() -> tuple[Profile, ...]:
    """An H100 with ViT-S at 512 x 512, from the block times the paper publishes for batches of 32.

    float32 is fitted to Table 3. bfloat16 with FlashAttention-2 is published at 4097 to 3020 tokens only
    (Table 5) and extrapolated down. The time to start kernels is in neither, and assumed.
    """
    float32 = [(32, 1025, 5.73e-3), (32, 789, 4.147e-3), (32, 620, 2.973e-3)]
    bfloat16 = [(32, 4097, 5.239e-3), (32, 3508, 4.495e-3), (32, 3020, 3.876e-3)]
    assumed = f"launch of {1000 * _LAUNCH_SECONDS:g} ms per block assumed"
    return (
        Profile(name="h100-float32", source=f"{_PAPER}, Table 3; {assumed}", stages=_stage_costs(float32)),
        Profile(
            name="h100-bfloat16",
            source=f"{_PAPER}, Table 5 extrapolated from 3020 tokens down, merges from Table 3; {assumed}",
            stages=_stage_costs(bfloat16),
        ),
    )


def _stage_costs(block_samples: Sequence[tuple[int, int, float]]) -> tuple[GroupCost, ...]:
    block = GroupCost.fit(block_samples)
    costs = []
    for num_blocks, length, merges in zip(_BLOCKS, (1025, 789, 620), (1, 1, 0), strict=True):
        launch = (num_blocks + merges) * _LAUNCH_SECONDS
        token = num_blocks * block.token + merges * _MERGE_SECONDS / length
        costs.append(GroupCost(launch=launch, token=token, pair=num_blocks * block.pair))
    return tuple(costs)


def poisson(rate: float, num_windows: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds, `rate` per second on average."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, num_windows)).tolist()


@dataclass(slots=True, eq=False)
class _Passing:
    """A window on its way."""

    lengths: tuple[int, ...]
    arrived: float
    computing: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What happened: windows, seconds on the virtual clock, and for every stage its groups' sizes and tokens."""

    done: int = 0
    refused: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    scheduling: float = 0.0  # real seconds in the scheduler, not on the virtual clock
    waits: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    padding: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def occupancy(self) -> float:
        """Share of the time in which the device computes."""
        return self.busy / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, Any]:
        num_groups = sum(map(len, self.groups))
        tail = {
            f"{name}_ms_p{q}": percentile_ms(values, q) if values else None
            for name, values in (("waited", self.waits), ("latency", self.latencies))
            for q in (50, 99)
        }
        return {
            "windows_per_second": round(self.done / self.seconds, 2) if self.seconds else 0.0,
            "refused_share": round(self.refused / max(1, self.done + self.refused), 4),
            "occupancy": round(self.occupancy, 4),
            "padding_share": [round(p / c, 5) if c else 0.0 for p, c in zip(self.padding, self.computed, strict=True)],
            "mean_group": [round(float(np.mean(sizes)), 2) if sizes else 0.0 for sizes in self.groups],
            "reasons": {reason: round(count / num_groups, 4) for reason, count in sorted(self.reasons.items())},
            "scheduling_ms_per_group": round(1000 * self.scheduling / max(1, num_groups), 4),
            **tail,
        }


class Simulation:
    """One device, one schedule, windows that arrive by themselves or replace those that leave.

    Args:
        profile: the device.
        rules: how windows are grouped.
        windows: tokens of each window in every stage, in order of arrival.
        max_inflight: arrivals beyond so many windows are refused.
    """

    def __init__(
        self, profile: Profile, rules: Rules, windows: Sequence[tuple[int, ...]], *, max_inflight: float = float("inf")
    ) -> None:
        self._profile = profile
        self._rules = rules
        self._windows = deque(windows)
        self._max_inflight = max_inflight
        self._scheduler: Scheduler[_Passing] = rules.scheduler(profile.stages[-1])
        self._inflight = 0
        stages = len(profile.stages)
        self.outcome = Outcome(groups=[[] for _ in range(stages)], computed=[0] * stages, padding=[0] * stages)

    def run(self, arrivals: Sequence[float], *, closed: bool = False) -> Outcome:
        """Serve until nothing is left.

        Args:
            arrivals: in seconds, in order; one window comes with each.
            closed: whoever's window is done sends the next one at once, until no window is left.
        """
        pending = deque(arrivals)
        now = 0.0
        while True:
            start = perf_counter()
            group = self._scheduler.next_group(now)
            self.outcome.scheduling += perf_counter() - start
            if group is not None:
                now, num_done = self._compute(group, now, pending)
                pending.extend([now] * num_done if closed else [])
            elif pending and self._windows:
                now = max(now, pending[0])
            else:
                break
            self._admit(pending, now)
        self.outcome.seconds = now
        return self.outcome

    def _admit(self, pending: deque[float], now: float) -> None:
        while pending and pending[0] <= now and self._windows:
            passing = _Passing(self._windows.popleft(), pending.popleft())
            if self._inflight >= self._max_inflight:
                self.outcome.refused += 1
                continue
            self._inflight += 1
            self._enter(passing, 0, now)

    def _enter(self, passing: _Passing, stage: int, now: float) -> None:
        self._scheduler.add([Waiting(Lane(stage, ()), passing.lengths[stage], passing.arrived, False, passing)], now)

    def _compute(self, group: Group[_Passing], start: float, pending: deque[float]) -> tuple[float, int]:
        """Run a group, admit who came meanwhile, send its windows on; returns the end and how many left."""
        outcome, stage = self.outcome, group.lane.stage
        lengths = [member.length for member in group.members]
        seconds = self._profile.seconds(stage, lengths, padded=self._rules.padded)
        computed = len(lengths) * max(lengths) if self._rules.padded else sum(lengths)
        outcome.busy += seconds
        outcome.groups[stage].append(len(lengths))
        outcome.computed[stage] += computed
        outcome.padding[stage] += computed - sum(lengths)
        outcome.reasons[group.reason] += 1
        end = start + seconds
        self._admit(pending, end)
        num_done = 0
        for member in group.members:
            passing = member.payload
            passing.computing += seconds
            if stage + 1 < len(self._profile.stages):
                self._enter(passing, stage + 1, end)
                continue
            num_done += 1
            self._inflight -= 1
            outcome.done += 1
            outcome.latencies.append(end - passing.arrived)
            outcome.waits.append(end - passing.arrived - passing.computing)
        return end, num_done
