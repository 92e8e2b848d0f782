"""Mutual Pair Merging for any timm VisionTransformer, in one line."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ._timm import Block, VisionTransformer
from .attention import block_forward, block_obstacle, use_attention
from .merge import compose_maps, merge_tokens
from .merge_gpu import can_merge_on_gpu, merge_windows_gpu
from .merging import Mpm, Tower
from .packed import PackedTokens


def patch_timm(vit: VisionTransformer, schedule: Sequence[int] = (2, 5), *, align: int = 1) -> VisionTransformer:
    """Merge mutually most similar tokens before some blocks of a timm ViT, in place.

    Features come back at full length, so heads, pooling and `forward_intermediates` work as before;
    parameter names do not change. Patching again replaces the schedule; an empty one turns merging off.

    Args:
        vit: any timm `VisionTransformer`, with whatever special tokens and blocks it has. Gradient checkpointing may
            be on, or be switched on later.
        schedule: block numbers, 0-based, strictly increasing.
        align: see `merge_tokens`.

    Returns:
        The same model.

    Raises:
        ValueError: vit is no VisionTransformer, drops patches, or does not have the blocks of the schedule; or
            align < 1.

    Source: MPM, sections 3.2-3.4 (arXiv 2604.05718).
    """
    if not isinstance(vit, VisionTransformer):
        kind = type(vit).__name__
        raise ValueError(f"vit: expected a timm VisionTransformer, got {kind}{_reason(kind)}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError("vit: expected a model without patch dropout")
    blocks = OrderedDict(vit.blocks.named_children())
    merging = MergingBlocks(blocks, schedule, num_special=vit.num_prefix_tokens, align=align)
    vit.blocks = merging if schedule else nn.Sequential(blocks)
    return vit


def _reason(kind: str) -> str:
    """Why a class of timm's is refused, where its users would expect it to work."""
    return next((f", which {reason}" for reason, kinds in _REASONS.items() if kind in kinds.split()), "")


_REASONS = {
    "attends in windows of a fixed grid of tokens, at a cost linear in them: merging made Swin no faster and every "
    "metric worse (MPM, supplement, table 10)": "SwinTransformer SwinTransformerV2 SwinTransformerV2Cr "
    "VisionTransformerSAM MaxxVit DaVit Twins GlobalContextVit Hiera HieraDet TinyVit",
    "has relative positions, and a merged token has none": "VisionTransformerRelPos Beit MultiScaleVit Levit",
    "rotates queries and keys by their positions (as EVA-02 and DINOv3 do), and a merged token has none": "Eva",
}


class MergingBlocks(nn.Module):
    """Transformer blocks between which tokens merge. Takes and returns [B, L, D] of full length.

    Iterating gives one callable per block instead of the block itself, because timm walks the blocks that way when it
    collects intermediate features or checkpoints gradients; each takes and returns full length too, and gives the same
    when it is called again. (Of an `nn.Sequential` timm would checkpoint the blocks themselves, without merging.)
    """

    def __init__(
        self, blocks: "OrderedDict[str, nn.Module]", schedule: Sequence[int], *, num_special: int, align: int
    ) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)
        tower = Tower(num_blocks=len(blocks), width=0, num_special=num_special)
        Mpm(tower=tower, schedule=tuple(schedule), align=align)  # refuses what doesn't fit
        self.schedule = tuple(schedule)
        self.num_special = num_special
        self.align = align

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return nn.Sequential(*self.children())(x)
        walk = _Walk(self, list(x))
        for block in self.children():
            walk.step(block)
        return walk.full_length()

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        maps: dict[int, list[Tensor] | None] = {0: None}  # before each block

        def step(x: Tensor, *, depth: int, block: nn.Module, **options: Any) -> Tensor:
            if any(option is not None and option is not False for option in options.values()):
                raise ValueError(f"merging blocks take no {', '.join(options)}")
            if not len(x):
                return block(x)
            walk = _Walk.resume(self, x, maps[depth], depth)
            walk.step(block)
            maps[depth + 1] = walk.maps
            return walk.full_length()

        for depth, block in enumerate(self.children()):
            yield partial(step, depth=depth, block=block)

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

    def __init__(
        self, blocks: MergingBlocks, sequences: list[Tensor], maps: list[Tensor] | None = None, depth: int = 0
    ) -> None:
        self.blocks = blocks
        self.sequences = sequences
        self.maps = maps
        self.depth = depth

    @classmethod
    def resume(cls, blocks: MergingBlocks, x: Tensor, maps: list[Tensor] | None, depth: int) -> "_Walk":
        """Go on before a block, from what `full_length` gave after the one before it."""
        if maps is None:
            return cls(blocks, list(x), None, depth)
        special, sequences = blocks.num_special, []
        for sequence, merge_map in zip(x, maps, strict=True):
            token = torch.arange(len(merge_map), device=x.device)
            first = token.scatter_reduce(0, merge_map, token, "amin", include_self=False)[: int(merge_map.max()) + 1]
            sequences.append(torch.cat([sequence[:special], sequence[special:][first]]))
        return cls(blocks, sequences, maps, depth)

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
    return block_obstacle(block) is None and not block.training


def _choose_attention(block: Block, device: torch.device) -> None:
    """Once for each device and type of number that the block is moved to."""
    chosen_for = (device, block.attn.qkv.weight.dtype)
    if getattr(block, "attention_chosen_for", None) != chosen_for:
        use_attention(block, "auto")
        block.attention_chosen_for = chosen_for
