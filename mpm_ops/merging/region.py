"""Region-based MPM: mutual pairs within squares of patches only."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from mpm_ops.merge import compose_maps, merge_tokens
from mpm_ops.merge_cpu import can_merge_on_cpu, merge_tokens_cpu
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

from .base import Merger, parameter


@dataclass(frozen=True, kw_only=True)
class Region(Merger):
    """Mutually nearest tokens of a square of patches merge: the paper's negative result, to be measured.

    Attributes:
        schedule: blocks before which tokens merge, strictly increasing.
        side: patches of a square across and down.

    Raises:
        ValueError: the schedule does not fit the encoder, or side < 1.

    Source: MPM's supplement, section 4.2.
    """

    name: ClassVar[str] = "region"
    schedule: tuple[int, ...] = parameter(int, (2, 5))
    side: int = parameter(int, 4)

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side: expected an integer >= 1, got {self.side}")
        super().__post_init__()

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(2 * block for block in self.schedule)

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        special, maps = self.tower.num_special, batch.merge_maps
        sequences, longer = [], []
        for i, sequence in enumerate(batch.tokens.split()):
            before = torch.arange(len(sequence) - special, device=sequence.device) if maps is None else maps[i]
            merged, step = self._merged(sequence[special:], before)
            sequences.append(torch.cat([sequence[:special], merged]))
            longer.append(compose_maps(before, step))
        after = WindowBatch(PackedTokens.pack(sequences), tuple(longer))
        return lambda: after

    def _merged(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [M, D] of what merges, and [N] where each went; rows are those of one square after another."""
        across = isqrt(len(before))
        if across**2 != len(before):
            raise ValueError(f"windows: expected square ones, got {len(before)} patches")
        patch = torch.arange(len(before), device=x.device)
        squares = -(-across // self.side)
        square_of_patch = patch // across // self.side * squares + patch % across // self.side
        square = torch.empty(len(x), dtype=torch.int64, device=x.device).scatter_(0, before, square_of_patch)
        order = square.argsort(stable=True)
        merge = merge_tokens_cpu if can_merge_on_cpu(x) else merge_tokens
        parts, step, length = [], torch.empty_like(order), 0
        for rows in order.split(square.bincount().tolist()):
            part, merge_map = merge(x[rows])
            parts.append(part)
            step[rows] = length + merge_map
            length += len(part)
        return torch.cat(parts), step
