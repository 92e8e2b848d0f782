"""What ToMe and ALGM share: merging between segments, bookkeeping by integer maps, and the Segmenter's decoder."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpm_ops.labels import label_map
from mpm_ops.packed import PackedTokens
from mpm_ops.segmenter import Segmenter
from mpm_ops.windows import cut_windows, plan_windows

from .segments import cut_segments


@dataclass(frozen=True, slots=True)
class MergedWindows:
    """Windows of one length on their way through the encoder.

    Attributes:
        x: [B, L, D] tokens, special tokens first.
        sizes: [B, L], how many tokens each stands for.
        rows: [B, N] int64 with special tokens, the row of x in which each token has ended up.
    """

    x: Tensor
    sizes: Tensor
    rows: Tensor

    @classmethod
    def start(cls, x: Tensor) -> "MergedWindows":
        """Every token for itself."""
        rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return cls(x, x.new_ones(x.shape[:2]), rows)

    def merged(self, step: Tensor, length: int) -> "MergedWindows":
        """Average tokens, weighted by size.

        Args:
            step: [B, L] int64 onto 0..length-1, the new row of each row.
        """
        num_windows, _, width = self.x.shape
        offsets = length * torch.arange(num_windows, device=step.device)[:, None]
        target = (step + offsets).flatten()
        sums = self.x.new_zeros(num_windows * length, width)
        sums.index_add_(0, target, (self.x * self.sizes[..., None]).flatten(0, 1))
        sizes = self.sizes.new_zeros(num_windows * length).index_add_(0, target, self.sizes.flatten())
        return MergedWindows(
            (sums / sizes[:, None]).view(num_windows, length, width),
            sizes.view(num_windows, length),
            step.gather(1, self.rows),
        )


class RivalSegmenter(ABC):
    """A Segmenter that merges tokens inside some of its blocks, the same number for every window of a batch.

    Attributes:
        model: whose weights, decoder and inference are used; its own schedule plays no part.
        segments: what runs between merges.
        proportional: attention counts each token as often as its size.
    """

    proportional: bool

    def __init__(self, model: Segmenter, cuts: tuple[int, ...]) -> None:
        self.model = model
        self.segments = cut_segments(model, cuts)

    @abstractmethod
    def merge(self, cut: int, windows: MergedWindows, keys: Tensor, grid: tuple[int, int]) -> MergedWindows:
        """Merge after the attention of a cut block.

        Args:
            cut: 0 for the first cut.
            keys: [B, L, Dh] mean over heads of that attention's keys.
            grid: patches down and across.
        """

    @torch.inference_mode()
    def window_logits(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] normalised windows -> [B, K, Gh, Gw] logits, as `Segmenter.window_logits`.

        Raises:
            ValueError: windows is not a float [B, 3, H, W] tensor with at least one window, or its grid does not fit.
        """
        if windows.ndim != 4 or windows.shape[1] != 3 or 0 in windows.shape or not windows.is_floating_point():
            raise ValueError(f"windows: expected float [B, 3, H, W], got {windows.dtype} {list(windows.shape)}")
        patch = self.model.config.patch_size
        grid = (-(-windows.shape[2] // patch), -(-windows.shape[3] // patch))
        merged = self.encode(windows, grid)
        return self.decode(merged).transpose(1, 2).unflatten(2, grid)

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Label every pixel of a picture, as `Segmenter.segment`; all its windows are one batch."""
        inference = self.model.inference
        plan = plan_windows(image.shape[0], image.shape[1], inference)
        windows = cut_windows(image, plan, inference).to(self.model.encoder.pos_embed.device)
        logits = self.window_logits(windows)
        return label_map(logits, plan, self.model.config.patch_size).labels

    def encode(self, windows: Tensor, grid: tuple[int, int]) -> MergedWindows:
        """The encoder without its final norm."""
        merged = MergedWindows.start(self.model.encoder.embed(windows).values.unflatten(0, (len(windows), -1)))
        for cut, segment in enumerate(self.segments):
            # Without a merge so far every size is 1, and attention needs no mask.
            log_sizes = merged.sizes.log() if self.proportional and cut else None
            x, keys = segment(merged.x, log_sizes)
            merged = MergedWindows(x, merged.sizes, merged.rows)
            if segment.attention is not None:
                merged = self.merge(cut, merged, keys, grid)
        return merged

    def decode(self, merged: MergedWindows) -> Tensor:
        """[B, N, K] logits, decoded on merged tokens and copied back last.

        With proportional attention the decoder counts each token as often as its size, which equals copying tokens
        back before the decoder. Without, it counts each once.
        """
        model, special = self.model, self.model.encoder.num_special
        tokens = PackedTokens.from_batch(model.encoder.norm(merged.x)[:, special:])
        sizes = merged.sizes[:, special:].flatten() if self.proportional else None
        logits = model.decoder(tokens, sizes).unflatten(0, (len(merged.x), -1))
        rows = merged.rows[:, special:] - special  # special tokens stay in front
        return logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[2]))


@dataclass(frozen=True, slots=True)
class Matches:
    """Each token of the even positions and its most similar one of the odd positions, best match first.

    Attributes:
        best: [B, ceil(L / 2)] cosines by even token; -inf for special tokens.
        order: [B, ceil(L / 2)] even tokens, the most similar first.
        odd: [B, ceil(L / 2)] the odd token of each even one.
    """

    best: Tensor
    order: Tensor
    odd: Tensor

    @classmethod
    def find(cls, metric: Tensor, num_special: int) -> "Matches":
        """Match by cosine; special tokens match nobody. metric: [B, L, C]."""
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        scores[:, 0] = -torch.inf
        if num_special == 2:
            scores[:, :, 0] = -torch.inf
        best, odd = scores.max(dim=-1)
        return cls(best, best.argsort(dim=-1, descending=True, stable=True), odd)

    def step(self, num_merged: int, length: int, num_special: int) -> tuple[Tensor, int]:
        """Merge the best matches into their odd tokens.

        Returns:
            step [B, length] int64, the new row of each row (even ones that stay, then odd ones, special tokens in
            front), and the new length.
        """
        source = self.order[:, :num_merged]
        staying = self.order[:, num_merged:].sort(dim=1).values
        num_staying = staying.shape[1]
        step = torch.empty(len(self.best), length, dtype=torch.int64, device=self.best.device)
        step[:, 1::2] = num_staying + torch.arange(length // 2, device=step.device)
        even = torch.empty_like(self.order)
        even.scatter_(1, staying, torch.arange(num_staying, device=step.device).expand_as(staying))
        even.scatter_(1, source, num_staying + self.odd.gather(1, source))
        step[:, ::2] = even
        if num_special == 2:  # the second special token is the first odd one: bring it to the front
            step = torch.where(step == num_staying, 1, step + ((step > 0) & (step < num_staying)))
        return step, length - num_merged
