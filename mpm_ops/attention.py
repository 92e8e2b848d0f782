"""Self-attention over packed tokens, with the weights of a timm block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._timm import Attention, Block
from .packed import PackedTokens


def block_forward(block: Block, tokens: PackedTokens, key_bias: Tensor | None = None) -> PackedTokens:
    """Run one pre-norm transformer block on packed tokens.

    Args:
        block: a timm `Block`.
        tokens: [T, D] packed tokens.
        key_bias: [T], added to every attention logit of a key, or None. log(n) makes a token count
            as n equal ones.

    Returns:
        Packed tokens of the same lengths.
    """
    x = tokens.values
    x = x + block.drop_path1(block.ls1(attend(block.attn, tokens.with_values(block.norm1(x)), key_bias)))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return tokens.with_values(x)


def attend(attn: Attention, tokens: PackedTokens, key_bias: Tensor | None = None) -> Tensor:
    """Attention of each sequence to itself; returns [T, D].

    Sequences of equal length share one call; ragged ones are attended one by one, which on a CPU
    beats padding and keeps every result independent of its neighbours.
    """
    head_dim = attn.head_dim
    qkv = attn.qkv(tokens.values).view(-1, 3, attn.num_heads, head_dim)
    dropout = attn.attn_drop.p if attn.training else 0.0

    def one_call(qkv: Tensor, num_sequences: int, bias: Tensor | None) -> Tensor:
        length = len(qkv) // num_sequences
        q, k, v = qkv.view(num_sequences, length, 3, attn.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        mask = None if bias is None else bias.view(num_sequences, 1, 1, length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
        return out.transpose(1, 2).reshape(len(qkv), -1)

    if tokens.is_uniform:
        mixed = one_call(qkv, len(tokens.lengths), key_bias)
    else:
        biases = [None] * len(tokens.lengths) if key_bias is None else key_bias.split(tokens.lengths)
        mixed = torch.cat(
            [one_call(part, 1, bias) for part, bias in zip(qkv.split(tokens.lengths), biases, strict=True)]
        )
    return attn.proj_drop(attn.proj(mixed))
