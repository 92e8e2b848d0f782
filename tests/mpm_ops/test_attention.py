"""Attention over packed tokens against plain loops, timm's own block, and each sequence alone."""

import math

import pytest
import torch
from torch import Tensor

from mpm_ops._timm import Attention, Block
from mpm_ops.attention import attend, block_forward
from mpm_ops.packed import PackedTokens

WIDTH, HEADS = 128, 2


def make_block() -> Block:
    torch.manual_seed(0)
    return Block(WIDTH, HEADS, qkv_bias=True, init_values=0.5).eval()


def make_tokens(lengths: tuple[int, ...]) -> PackedTokens:
    generator = torch.Generator().manual_seed(1)
    return PackedTokens(torch.randn(sum(lengths), WIDTH, generator=generator), lengths)


def plain_attention(attn: Attention, x: Tensor, key_bias: Tensor | None) -> Tensor:
    """One sequence [L, D], one head and one query at a time."""
    head_dim = WIDTH // HEADS
    q, k, v = attn.qkv(x).chunk(3, dim=1)
    mixed = torch.empty_like(x)
    for head in range(HEADS):
        part = slice(head * head_dim, (head + 1) * head_dim)
        for i in range(len(x)):
            logits = k[:, part] @ q[i, part] / math.sqrt(head_dim)
            if key_bias is not None:
                logits = logits + key_bias
            weights = logits.exp() / logits.exp().sum()
            mixed[i, part] = weights @ v[:, part]
    return attn.proj(mixed)


@pytest.mark.parametrize("lengths", [(9,), (1,), (7, 7, 7), (5, 12, 1, 5)])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_each_sequence_attends_to_itself_only(lengths: tuple[int, ...], biased: bool) -> None:
    attn, tokens = make_block().attn, make_tokens(lengths)
    bias = torch.randn(len(tokens.values)) if biased else None
    biases = [None] * len(lengths) if bias is None else bias.split(lengths)
    expected = [plain_attention(attn, x, b) for x, b in zip(tokens.split(), biases, strict=True)]
    torch.testing.assert_close(attend(attn, tokens, bias), torch.cat(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", [(40,), (33, 33), (50, 28, 41)])
@torch.inference_mode()
def test_a_block_does_what_timm_does_with_each_sequence(lengths: tuple[int, ...]) -> None:
    block, tokens = make_block(), make_tokens(lengths)
    expected = torch.cat([block(sequence[None])[0] for sequence in tokens.split()])
    output = block_forward(block, tokens)
    assert output.lengths == lengths
    torch.testing.assert_close(output.values, expected, rtol=0, atol=2e-6)


@torch.inference_mode()
def test_a_key_counted_n_times_equals_n_copies_of_it() -> None:
    block, tokens = make_block().double(), make_tokens((6,))
    sizes = torch.tensor([1, 3, 1, 2, 5, 1])
    origin = torch.arange(6).repeat_interleave(sizes)
    x = tokens.values.double()
    merged = block_forward(block, PackedTokens(x, (6,)), sizes.double().log()).values
    copies = block_forward(block, PackedTokens(x[origin], (len(origin),))).values
    torch.testing.assert_close(merged[origin], copies, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [(64, 64), (64, 64, 64, 64, 64), (300, 28, 30, 201)])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_no_bit_depends_on_the_neighbours(lengths: tuple[int, ...], biased: bool, threads: int) -> None:
    block, tokens = make_block(), make_tokens(lengths)
    bias = torch.randint(1, 9, (len(tokens.values),)).float().log() if biased else None
    biases = [None] * len(lengths) if bias is None else bias.split(lengths)
    alone = [
        block_forward(block, PackedTokens(sequence, (len(sequence),)), b).values
        for sequence, b in zip(tokens.split(), biases, strict=True)
    ]
    assert torch.equal(block_forward(block, tokens, bias).values, torch.cat(alone))
