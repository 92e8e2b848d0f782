"""What ToMe and ALGM share: bipartite matching, and averages weighted by what tokens stand for.

Everything here is dense, [B, L, ...]: windows of one length, each independent of the others. A step says where rows
go: step [B, L] int64 onto the rows 0..length-1 of what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch

Step = tuple[Tensor, int]
Find = Callable[[Tensor, Tensor | None], Step]


def merge_windows(batch: WindowBatch, num_special: int, find: Find, *, together: bool = False) -> WindowBatch:
    """Merge windows by the steps that are found for them.

    Args:
        batch: a stage's output, with keys where `find` wants them.
        num_special: special tokens of each window; steps leave them in front.
        find: takes tokens [B, L, D] and keys [B, L, C] or None.
        together: find steps for all windows at once on a GPU, where they have one length. Without it, and on a CPU
            in any case, they are merged one by one, and each keeps every bit whatever its mates.
    """
    lengths, maps, keys = batch.tokens.lengths, batch.merge_maps, batch.keys
    if together and batch.tokens.values.is_cuda and batch.tokens.is_uniform:
        return merge_together(batch, num_special, find)
    nothing = (None,) * len(lengths)
    sequences, longer = [], []
    for sequence, its_keys, its_map in zip(
        batch.tokens.split(), keys.split(lengths) if keys is not None else nothing, maps or nothing, strict=True
    ):
        merged, after = _merged(sequence[None], _one(its_keys), _one(its_map), num_special, find)
        sequences.append(merged[0])
        longer.append(after[0])
    return WindowBatch(PackedTokens.pack(sequences), tuple(longer))


def merge_together(batch: WindowBatch, num_special: int, find: Find) -> WindowBatch:
    """Merge windows of one length by steps that are found for all of them at once.

    Raises:
        ValueError: windows differ in length, as those do that merged apart.
    """
    lengths, values, keys = batch.tokens.lengths, batch.tokens.values, batch.keys
    if not batch.tokens.is_uniform:
        raise ValueError(f"windows: expected those of one length, which merged together before, got {lengths}")
    dense = (len(lengths), lengths[0], -1)
    stacked = None if batch.merge_maps is None else torch.stack(batch.merge_maps)
    merged, after = _merged(values.view(dense), None if keys is None else keys.view(dense), stacked, num_special, find)
    return WindowBatch(PackedTokens.from_batch(merged), after)


def _one(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[None]


def _merged(
    x: Tensor,
    keys: Tensor | None,
    maps: Tensor | None,
    num_special: int,
    find: Callable[[Tensor, Tensor | None], Step],
) -> tuple[Tensor, Tensor]:
    step, length = find(x, keys)
    merged = average(x, None if maps is None else sizes_of(maps, x.shape[1], num_special), step, length)
    image = step[:, num_special:] - num_special
    return merged, image if maps is None else image.gather(1, maps)


def sizes_of(maps: Tensor, length: int, num_special: int) -> Tensor:
    """[B, length] float32, how many patches each token stands for; 1 for special tokens. maps: [B, N]."""
    sizes = torch.zeros(len(maps), length, device=maps.device)
    sizes.scatter_add_(1, maps + num_special, torch.ones(maps.shape, device=maps.device))
    sizes[:, :num_special] = 1
    return sizes


def average(x: Tensor, sizes: Tensor | None, step: Tensor, length: int) -> Tensor:
    """Average the rows of x [B, L, D] that a step sends to one row, weighted by their sizes [B, L]."""
    work = x if x.dtype == torch.float64 else x.float()
    weights = work.new_ones(x.shape[:2]) if sizes is None else sizes.to(work.dtype)
    target = (step + length * torch.arange(len(x), device=x.device)[:, None]).flatten()
    sums = work.new_zeros(len(x) * length, x.shape[2])
    sums.index_add_(0, target, (work * weights[..., None]).flatten(0, 1))
    totals = work.new_zeros(len(sums)).index_add_(0, target, weights.flatten())
    return (sums / totals[:, None]).view(len(x), length, -1).to(x.dtype)


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

    def step(self, num_merged: int, length: int, num_special: int) -> Step:
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
