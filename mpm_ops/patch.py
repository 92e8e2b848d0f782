"""Mutual Pair Merging for any timm VisionTransformer, in one line."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ._timm import Attention, Block, VisionTransformer
from .attention import block_forward, use_attention
from .merge import compose_maps, merge_tokens
from .merge_gpu import can_merge_on_gpu, merge_windows_gpu
from .packed import PackedTokens
from .stages import cut_stages


def patch_timm(vit: VisionTransformer, schedule: Sequence[int] = (2, 5), *, align: int = 1) -> VisionTransformer:
    """Merge mutually most similar tokens before some blocks of a timm ViT, in place.

    Features come back at full length, so heads, pooling and `forward_intermediates` work as before;
    parameter names do not change. Patching again replaces the schedule; an empty one turns merging off.

    Args:
        vit: any timm `VisionTransformer`, with whatever special tokens and blocks it has.
        schedule: block numbers, 0-based, strictly increasing.
        align: see `merge_tokens`.

    Returns:
        The same model.

    Raises:
        ValueError: vit is no VisionTransformer, drops patches, checkpoints gradients, or does not have
            the blocks of the schedule; or align < 1.

    Source: MPM, sections 3.2-3.4 (arXiv 2604.05718).
    """
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"vit: expected a timm VisionTransformer, got {type(vit).__name__}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError("vit: expected a model without patch dropout")
    if vit.grad_checkpointing:  # timm then runs the blocks one by one, past the merging
        raise ValueError("vit: expected a model without gradient checkpointing")
    blocks = OrderedDict(vit.blocks.named_children())
    merging = MergingBlocks(blocks, schedule, num_special=vit.num_prefix_tokens, align=align)
    vit.blocks = merging if schedule else nn.Sequential(blocks)
    return vit


class MergingBlocks(nn.Sequential):
    """Transformer blocks between which tokens merge. Takes and returns [B, L, D] of full length.

    Iterating gives one callable per block instead of the block itself, because timm walks the blocks
    that way when it collects intermediate features; each takes and returns full length too.
    """

    def __init__(
        self, blocks: "OrderedDict[str, nn.Module]", schedule: Sequence[int], *, num_special: int, align: int
    ) -> None:
        super().__init__(blocks)
        cut_stages(len(blocks), schedule)  # refuses what doesn't fit
        if align < 1:
            raise ValueError(f"align: expected an integer >= 1, got {align}")
        self.schedule = tuple(schedule)
        self.num_special = num_special
        self.align = align

    def forward(self, x: Tensor) -> Tensor:
        walk = _Walk(self, x)
        for block in self.children():
            walk.step(block)
        return walk.full_length()

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:  # type: ignore[override]
        walk: _Walk | None = None

        def step(x: Tensor, *, block: nn.Module, **options: Any) -> Tensor:
            nonlocal walk
            if any(option is not None and option is not False for option in options.values()):
                raise ValueError(f"merging blocks take no {', '.join(options)}")
            if walk is None:
                walk = _Walk(self, x)
            walk.step(block)
            return walk.full_length()

        for block in self.children():
            yield lambda x, block=block, **options: step(x, block=block, **options)

    def __getitem__(self, index: int | slice) -> nn.Module:
        blocks = list(self.named_children())
        if isinstance(index, slice):
            if index.start or index.step not in (None, 1):
                raise ValueError(f"merging blocks: expected a slice from the first block on, got {index}")
            kept = OrderedDict(blocks[index])
            schedule = [block for block in self.schedule if block < len(kept)]
            return MergingBlocks(kept, schedule, num_special=self.num_special, align=self.align)
        return blocks[index][1]


class _Walk:
    """One pass over the blocks: ragged sequences, and where each original token went."""

    def __init__(self, blocks: MergingBlocks, x: Tensor) -> None:
        self.blocks = blocks
        self.sequences = list(x)
        self.maps: list[Tensor] | None = None
        self.depth = 0

    def step(self, block: nn.Module) -> None:
        if self.depth in self.blocks.schedule:
            self._merge()
        if can_pack(block, self.sequences[0]):
            _choose_attention(block, self.sequences[0].device)
            self.sequences = list(block_forward(block, PackedTokens.pack(self.sequences)).split())
            self.depth += 1
            return
        # Images of equal length run together; order by length, run, and put back in place.
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        for _, same in groupby(order, key=lambda i: len(self.sequences[i])):
            members = list(same)
            outputs = block(torch.stack([self.sequences[i] for i in members]))
            for i, output in zip(members, outputs, strict=True):
                self.sequences[i] = output
        self.depth += 1

    def full_length(self) -> Tensor:
        if self.maps is None:
            return torch.stack(self.sequences)
        special = self.blocks.num_special
        return torch.stack(
            [
                torch.cat([sequence[:special], sequence[special:][merge_map]])
                for sequence, merge_map in zip(self.sequences, self.maps, strict=True)
            ]
        )

    def _merge(self) -> None:
        special = self.blocks.num_special
        if can_merge_on_gpu(self.sequences[0]):
            tokens = PackedTokens.pack(self.sequences)
            merged, merge_map = merge_windows_gpu(tokens, num_special=special, align=self.blocks.align)
            found = [part[special:] for part in merge_map.split(tokens.lengths)]
            before, self.sequences = self.maps, list(merged.split())
            self.maps = (
                found if before is None else [second[first] for first, second in zip(before, found, strict=True)]
            )
            return
        maps = []
        for i, sequence in enumerate(self.sequences):
            image, merge_map = merge_tokens(sequence[special:], align=self.blocks.align)
            self.sequences[i] = torch.cat([sequence[:special], image])
            maps.append(merge_map if self.maps is None else compose_maps(self.maps[i], merge_map))
        self.maps = maps


def can_pack(block: nn.Module, x: Tensor) -> bool:
    """Whether a block runs ragged images in one call: on a GPU, without gradients, with plain attention."""
    return x.is_cuda and not torch.is_grad_enabled() and is_plain(block)


def is_plain(block: nn.Module) -> bool:
    """Whether `block_forward` computes what the block does; timm's other parts may be set in both."""
    if type(block) is not Block or type(block.attn) is not Attention or block.training:
        return False
    extras = (getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm"))
    return all(extra is None or isinstance(extra, nn.Identity) for extra in extras)


def _choose_attention(block: Block, device: torch.device) -> None:
    """Once for each device and type of number that the block is moved to."""
    chosen_for = (device, block.attn.qkv.weight.dtype)
    if getattr(block, "attention_chosen_for", None) != chosen_for:
        use_attention(block, "auto")
        block.attention_chosen_for = chosen_for
