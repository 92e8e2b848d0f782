"""Token Merging: bipartite soft matching in every block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpm_ops.stages import WindowBatch

from .base import Merger, parameter
from .bipartite import Matches, Step, merge_windows

# By encoder width (Ti, S, B, L): about the tokens that MPM keeps, from the supplement of the MPM paper.
TOME_REDUCTIONS = {192: 30, 384: 30, 768: 30, 1024: 15}


@dataclass(frozen=True, kw_only=True)
class ToMe(Merger):
    """Removes r tokens in every block, matched by the mean over heads of the attention's keys.

    Attributes:
        r: tokens that each block removes, at most half of them; TOME_REDUCTIONS' for the width by default.

    Raises:
        ValueError: r < 1, or it is left out and the width is none of Ti, S, B and L.

    Source: facebookresearch/ToMe@af95e4b, `tome/merge.py` and `tome/patch/timm.py`.
    """

    name: ClassVar[str] = "tome"
    wants_keys: ClassVar[bool] = True
    r: int = parameter(int, 0)

    def __post_init__(self) -> None:
        if self.r == 0 and self.tower.width in TOME_REDUCTIONS:
            object.__setattr__(self, "r", TOME_REDUCTIONS[self.tower.width])
        if self.r < 1:
            raise ValueError(f"r: expected an integer >= 1 (for a width of {self.tower.width}), got {self.r}")
        super().__post_init__()

    @property
    def attention_counts(self) -> bool:
        return True

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(range(1, 2 * self.tower.num_blocks, 2))

    def lengths_after(self, number: int) -> range:
        left = number - min(self.r, number // 2)
        return range(left, left + 1)

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        special = self.tower.num_special

        def find(x: Tensor, keys: Tensor | None) -> Step:
            assert keys is not None
            num_merged = max(0, min(self.r, (x.shape[1] - special) // 2))
            return Matches.find(keys, special).step(num_merged, x.shape[1], special)

        merged = merge_windows(batch, special, find, together=True)
        return lambda: merged
