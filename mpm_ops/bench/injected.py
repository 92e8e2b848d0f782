"""Lengths after each merge for networks with random weights, whose own would mean nothing."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch


@dataclass(frozen=True, slots=True)
class Injected:
    """Lengths that stand in for those of trained weights, drawn anew for each window.

    Attributes:
        means: image tokens after each merge; the paper's for 512 x 512 by default.
        spread: most that a window differs from the mean, as on natural pictures.
    """

    means: tuple[int, ...] = (765, 604)
    spread: int = 20
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def apply(self, batch: WindowBatch, before: WindowBatch, merge: int, align: int) -> WindowBatch:
        """Keep as many tokens as are drawn, whatever was merged, spread evenly over the patches.

        Args:
            batch: as it was merged; not used, so that merging may be timed beside it.
            before: as it was before.
            merge: 0 for the first.
            align: lengths are multiples of it.
        """
        special = 1
        num_windows, device = len(before.tokens.lengths), before.tokens.values.device
        draws = self.random.integers(-self.spread, self.spread + 1, num_windows)
        lengths = [-(-(self.means[merge] + int(draw)) // align) * align for draw in draws]
        values = torch.cat([s[: special + n] for s, n in zip(before.tokens.split(), lengths, strict=True)])
        after, old = _column(lengths, device), _column([n - special for n in before.tokens.lengths], device)
        rows = (
            torch.arange(before.tokens.lengths[0] - special, device=device).expand(num_windows, -1)
            if before.merge_maps is None
            else torch.stack(before.merge_maps)
        )
        tokens = PackedTokens(values, tuple(special + n for n in lengths))
        return WindowBatch(tokens, (rows * after // old).unbind())


def _column(numbers: list[int], device: torch.device) -> Tensor:
    """[B, 1] int64; on a GPU without waiting for it."""
    column = torch.tensor(numbers, pin_memory=device.type == "cuda")[:, None]
    return column.to(device, non_blocking=True)
