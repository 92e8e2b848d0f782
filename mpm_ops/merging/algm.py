"""ALGM: adaptive local-then-global token merging."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops.stages import WindowBatch

from .base import Merger, parameter
from .bipartite import Find, Matches, Step, merge_windows

ALGM_THRESHOLDS = {192: 0.90, 384: 0.88, 768: 0.94, 1024: 0.95}  # by encoder width: Ti, S, B, L
_BLOCKS = (0, 4)


@dataclass(frozen=True, kw_only=True)
class Algm(Merger):
    """Merges similar 2 x 2 patches in block 0, and by bipartite matching in block 4.

    How many merge depends on the window. (Upstream takes the least of a batch, and the batch's mean as the second
    threshold; here a window's answer must not depend on its mates.) Attention and decoder count every token once, as
    upstream's do.

    Attributes:
        threshold: cosine from which four patches merge; ALGM_THRESHOLDS' for the width by default.

    Raises:
        ValueError: the network is distilled or has fewer than five blocks; or threshold is left out and the width is
            none of Ti, S, B and L.

    Source: tue-mps/algm-segmenter@674eaa2, `algm/algm`.
    """

    name: ClassVar[str] = "algm"
    decoder_counts: ClassVar[bool] = False
    threshold: float | None = parameter(float, None)

    def __post_init__(self) -> None:
        if self.tower.num_special != 1:
            raise ValueError("model: expected one special token, as ALGM does, got a distilled network")
        if self.threshold is None:
            if self.tower.width not in ALGM_THRESHOLDS:
                raise ValueError(f"threshold: expected a number for a width of {self.tower.width}, got None")
            object.__setattr__(self, "threshold", ALGM_THRESHOLDS[self.tower.width])
        super().__post_init__()

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(2 * block + 1 for block in _BLOCKS)

    def lengths_after(self, number: int) -> range:
        return range(number // 4, number + 1)

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        assert self.threshold is not None
        if batch.merge_maps is None:
            assert batch.grid is not None
            find: Find = partial(_squares, threshold=self.threshold, grid=batch.grid)
        else:
            find = _similar
        merged = merge_windows(batch, 1, find)
        return lambda: merged


def _squares(x: Tensor, keys: Tensor | None, *, threshold: float, grid: tuple[int, int]) -> Step:
    return local_step(x[:, 1:], threshold, grid)


def _similar(x: Tensor, keys: Tensor | None) -> Step:
    return global_step(x)


def local_step(x: Tensor, threshold: float, grid: tuple[int, int]) -> Step:
    """Merge the most similar 2 x 2 squares of [B, N, D] patches: step [B, 1 + N], the special token in front.

    Raises:
        ValueError: grid, patches down and across, is odd.
    """
    if grid[0] % 2 or grid[1] % 2:
        raise ValueError(f"windows: expected an even number of patches each way, got {grid[0]} x {grid[1]}")
    patch = torch.arange(x.shape[1], device=x.device).view(grid[0] // 2, 2, grid[1] // 2, 2)
    square = patch.permute(0, 2, 1, 3).reshape(-1, 4)  # [N / 4, 4] patches of each square
    corners = F.normalize(x, dim=-1)[:, square]  # [B, N / 4, 4, D]
    # The mean of six cosines from the length of the sum of four unit vectors.
    similarity = (corners.sum(dim=2).square().sum(dim=-1) - corners.square().sum(dim=(2, 3))) / 12
    num_merged = int((similarity >= threshold).sum(dim=1).min())
    chosen = similarity.topk(num_merged, dim=1).indices  # [B, r], the most similar first

    is_merged = torch.zeros(similarity.shape, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
    alone = torch.empty(x.shape[:2], dtype=torch.bool, device=x.device)
    alone[:, square.flatten()] = ~is_merged.repeat_interleave(4, dim=1)
    step = num_merged + alone.cumsum(dim=1)  # the special token is row 0, then squares, then single patches
    rank = torch.empty(similarity.shape, dtype=torch.int64, device=x.device)
    rank.scatter_(1, chosen, torch.arange(1, 1 + num_merged, device=x.device).expand_as(chosen))
    by_square = torch.where(is_merged[..., None], rank[..., None], step[:, square])
    step[:, square] = by_square
    return F.pad(step, (1, 0)), 1 + x.shape[1] - 3 * num_merged


def global_step(x: Tensor) -> Step:
    """Merge the bipartite matches of [B, L, D] tokens above their mean and a fifth of their deviation."""
    matches = Matches.find(x, num_special=1)
    best = matches.best[:, 1:]
    threshold = best.mean(dim=1).mean() + best.std(dim=1).mean() / (_BLOCKS[1] + 1)  # upstream counts from 1
    num_merged = int((matches.best >= threshold).sum(dim=1).min())
    return matches.step(num_merged, x.shape[1], 1)
