"""Lengths after each merge for networks with random weights, whose own would mean nothing."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

_Imposed = tuple[tuple[int, ...], Tensor, tuple[Tensor, ...]]  # lengths, rows that stay, and maps


@dataclass(frozen=True, slots=True)
class Injected:
    """Lengths that stand in for those of trained weights, drawn anew for each window.

    Attributes:
        means: image tokens after each merge; the paper's for 512 x 512 by default.
        spread: most that a window differs from the mean, as on natural pictures.
        period: draws of a merge, which then come again, imposed by one operation; 0 for new ones in every call.
    """

    means: tuple[int, ...] = (765, 604)
    spread: int = 20
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    period: int = 0
    _imposed: dict[tuple[object, ...], _Imposed] = field(default_factory=dict)
    _calls: Counter[int] = field(default_factory=Counter)  # of each merge

    def apply(self, batch: WindowBatch, before: WindowBatch, merge: int, align: int) -> WindowBatch:
        """Keep as many tokens as are drawn, whatever was merged, spread evenly over the patches.

        Args:
            batch: as it was merged; not used, so that merging may be timed beside it.
            before: as it was before.
            merge: 0 for the first.
            align: lengths are multiples of it.
        """
        turn = self._calls[merge] % self.period if self.period else 0
        self._calls[merge] += 1
        key = (merge, align, turn, before.tokens.lengths, before.tokens.values.device)
        imposed = self._imposed.get(key) or self._draw(before, merge, align)
        if self.period:
            self._imposed[key] = imposed
        lengths, rows, maps = imposed
        return WindowBatch(PackedTokens(before.tokens.values.index_select(0, rows), lengths), maps)

    def _draw(self, before: WindowBatch, merge: int, align: int) -> _Imposed:
        special = 1
        num_windows, device = len(before.tokens.lengths), before.tokens.values.device
        draws = self.random.integers(-self.spread, self.spread + 1, num_windows)
        lengths = [-(-(self.means[merge] + int(draw)) // align) * align for draw in draws]
        starts = np.cumsum([0, *before.tokens.lengths[:-1]])
        kept = np.concatenate([start + np.arange(special + n) for start, n in zip(starts, lengths, strict=True)])
        after, old = _column(lengths, device), _column([n - special for n in before.tokens.lengths], device)
        rows = (
            torch.arange(before.tokens.lengths[0] - special, device=device).expand(num_windows, -1)
            if before.merge_maps is None
            else torch.stack(before.merge_maps)
        )
        maps = (rows * after // old).unbind()
        return tuple(special + n for n in lengths), torch.from_numpy(kept).to(device), maps


def _column(numbers: list[int], device: torch.device) -> Tensor:
    """[B, 1] int64; on a GPU without waiting for it."""
    column = torch.tensor(numbers, pin_memory=device.type == "cuda")[:, None]
    return column.to(device, non_blocking=True)
