"""A Segmenter cut between attention and MLP of some blocks, where ToMe and ALGM merge.

A segment is dense: [B, L, D] tokens in, [B, L, D] tokens out, the same L for the whole batch. So any runtime that
takes a torch module can run it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpm_ops._timm import Attention, Block
from mpm_ops.segmenter import Segmenter


class Segment(nn.Module):
    """What runs between two merges: the MLP of the block that was cut, whole blocks, the attention of the next cut.

    Attributes:
        mlp: the block whose MLP comes first; None where the segment starts with the embedding.
        blocks: whole blocks.
        attention: the block whose attention ends it; None in the last segment.
    """

    def __init__(self, mlp: Block | None, blocks: list[Block], attention: Block | None) -> None:
        super().__init__()
        self.mlp = mlp
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention

    def forward(self, x: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the segment.

        Args:
            x: [B, L, D] tokens.
            log_sizes: [B, L], added to the attention logits of every key, or None.

        Returns:
            x [B, L, D], and the mean over heads of the last attention's keys [B, L, Dh] (empty in the last segment).
        """
        if self.mlp is not None:
            x = _mlp(self.mlp, x)
        for block in self.blocks:
            x = _mlp(block, _attention(block, x, log_sizes)[0])
        if self.attention is None:
            return x, x.new_empty(0)
        return _attention(self.attention, x, log_sizes)


def cut_segments(model: Segmenter, cuts: tuple[int, ...]) -> list[Segment]:
    """Segments of a Segmenter's encoder, cut inside the given blocks; they share its weights.

    Raises:
        ValueError: cuts are not strictly increasing block numbers.
    """
    blocks = list(model.encoder.blocks)
    if any(not 0 <= cut < len(blocks) for cut in cuts) or list(cuts) != sorted(set(cuts)):
        raise ValueError(f"cuts: expected strictly increasing block numbers within 0..{len(blocks) - 1}, got {cuts}")
    bounds: list[int | None] = [None, *cuts, None]
    return [
        Segment(
            None if start is None else blocks[start],
            blocks[0 if start is None else start + 1 : stop],
            None if stop is None else blocks[stop],
        )
        for start, stop in pairwise(bounds)
    ]


def _attention(block: Block, x: Tensor, log_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    attn: Attention = block.attn
    num_windows, length, width = x.shape
    qkv = attn.qkv(block.norm1(x)).view(num_windows, length, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    bias = None if log_sizes is None else log_sizes[:, None, None, :]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
    return x + attn.proj(mixed.transpose(1, 2).reshape(num_windows, length, width)), k.mean(dim=1)


def _mlp(block: Block, x: Tensor) -> Tensor:
    return torch.add(x, block.mlp(block.norm2(x)))
