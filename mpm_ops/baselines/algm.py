"""ALGM: adaptive local-then-global token merging."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops.segmenter import Segmenter

from .rivals import Matches, MergedWindows, RivalSegmenter

ALGM_THRESHOLDS = {192: 0.90, 384: 0.88, 768: 0.94, 1024: 0.95}  # by encoder width: Ti, S, B, L
_BLOCKS = (0, 4)


class Algm(RivalSegmenter):
    """A Segmenter that merges similar 2 x 2 patches in block 0, and by bipartite matching in block 4.

    How many merge depends on the batch: the least of its windows in both steps, and a threshold of its mean in the
    second. Attention and decoder count every token once, as upstream's do.

    Raises:
        ValueError: the network is distilled or has fewer than five blocks; or threshold is None and the width is none
            of Ti, S, B and L.

    Source: tue-mps/algm-segmenter@674eaa2, `algm/algm`.
    """

    proportional = False

    def __init__(self, model: Segmenter, *, threshold: float | None = None) -> None:
        super().__init__(model, _BLOCKS)
        if model.encoder.num_special != 1:
            raise ValueError("model: expected one special token, as ALGM does, got a distilled network")
        if threshold is None and model.config.d_model not in ALGM_THRESHOLDS:
            raise ValueError(f"threshold: expected a number for a width of {model.config.d_model}, got None")
        self.threshold = ALGM_THRESHOLDS[model.config.d_model] if threshold is None else threshold

    def merge(self, cut: int, windows: MergedWindows, keys: Tensor, grid: tuple[int, int]) -> MergedWindows:
        if cut == 0:
            return windows.merged(*self._local(windows.x[:, 1:], grid))
        return windows.merged(*self._global(windows.x))

    def _local(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """Merge the most similar 2 x 2 squares: [B, N, D] patches -> step [B, 1 + N] and new length."""
        if grid[0] % 2 or grid[1] % 2:
            raise ValueError(f"windows: expected an even number of patches each way, got {grid[0]} x {grid[1]}")
        patch = torch.arange(x.shape[1], device=x.device).view(grid[0] // 2, 2, grid[1] // 2, 2)
        square = patch.permute(0, 2, 1, 3).reshape(-1, 4)  # [N / 4, 4] patches of each square
        corners = F.normalize(x, dim=-1)[:, square]  # [B, N / 4, 4, D]
        # The mean of six cosines from the length of the sum of four unit vectors.
        similarity = (corners.sum(dim=2).square().sum(dim=-1) - corners.square().sum(dim=(2, 3))) / 12
        num_merged = int((similarity >= self.threshold).sum(dim=1).min())
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

    @staticmethod
    def _global(x: Tensor) -> tuple[Tensor, int]:
        matches = Matches.find(x, num_special=1)
        best = matches.best[:, 1:]
        threshold = best.mean(dim=1).mean() + best.std(dim=1).mean() / (_BLOCKS[1] + 1)  # upstream counts from 1
        num_merged = int((matches.best >= threshold).sum(dim=1).min())
        return matches.step(num_merged, x.shape[1], 1)
