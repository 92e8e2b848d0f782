"""Attention over packed tokens against plain loops, timm's own block, and each sequence alone."""

import math

import pytest
import torch
from torch import Tensor

from mpm_ops._timm import Attention, Block
from mpm_ops.attention import (
    ATTENTIONS,
    attend,
    attend_packed,
    attention_obstacle,
    block_forward,
    run_blocks,
    use_attention,
)
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
def test_a_run_of_blocks_is_one_after_the_other_to_the_last_bit() -> None:
    blocks, tokens = [make_block(), make_block()], make_tokens((9, 4))
    norm = torch.nn.LayerNorm(WIDTH)
    expected = block_forward(blocks[1], block_forward(blocks[0], tokens))
    assert torch.equal(run_blocks(blocks, tokens).values, expected.values)
    assert torch.equal(run_blocks(blocks, tokens, last_norm=norm).values, norm(expected.values))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_norms_do_what_torch_does(dtype: torch.dtype) -> None:
    blocks = [make_block().cuda().to(dtype) for _ in range(2)]
    tokens = PackedTokens(make_tokens((30, 28)).values.cuda().to(dtype), (30, 28))
    norm = torch.nn.LayerNorm(WIDTH).cuda().to(dtype)
    expected = run_blocks(blocks, tokens, last_norm=norm).values.detach()  # with gradients nothing is fused
    with torch.inference_mode():
        found = run_blocks(blocks, tokens, last_norm=norm).values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-2)


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


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """What kernels over ragged sequences do: no bias, no mask."""
    assert longest == bounds.diff().max()
    wide = torch.promote_types(q.dtype, torch.float32)  # as kernels accumulate
    parts = zip(*(part.to(wide).split(bounds.diff().tolist()) for part in (q, k, v)), strict=True)
    out = [(a.transpose(0, 1) @ b.permute(1, 2, 0) * scale).softmax(-1) @ c.transpose(0, 1) for a, b, c in parts]
    return torch.cat([o.transpose(0, 1) for o in out]).to(q.dtype)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_bias_columns_do_what_a_bias_does(biased: bool, dtype: torch.dtype, atol: float) -> None:
    tokens = make_tokens((5, 12, 1, 5))
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(len(tokens.values), 3, HEADS, 64, generator=generator, dtype=torch.float64)
    bias = torch.randint(1, 40, (len(qkv),), generator=generator).double().log() if biased else None
    rows = zip(qkv.split(tokens.lengths), [None] * 4 if bias is None else bias.split(tokens.lengths), strict=True)
    expected = []
    for part, one in rows:
        q, k, v = part.permute(1, 2, 0, 3)
        logits = q @ k.mT / 8 + (0 if one is None else one)
        expected.append((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    found = attend_packed(plain_varlen, qkv.to(dtype), tokens, bias, 1 / 8)
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=atol)


def test_half_precision_keeps_the_bias_to_float32() -> None:
    bias = torch.arange(1, 65).float().log()
    tokens = PackedTokens(torch.zeros(64, 1), (64,))
    qkv = torch.zeros(64, 3, 1, 64, dtype=torch.bfloat16)
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
        seen.append((q.float()[0, 0] @ k.float()[:, 0].T) * scale)
        return v

    attend_packed(spy, qkv, tokens, bias, 1 / 8)
    torch.testing.assert_close(seen[0], bias, rtol=0, atol=4e-5)
    assert (bias.bfloat16().float() - bias).abs().max() > 5e-3


def test_backends_are_chosen_by_name_and_refuse_where_they_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    block = make_block()
    with caplog.at_level("INFO", logger="mpm_ops.attention"):
        assert use_attention(block) == "grouped"
    assert caplog.messages == ["attention: grouped for torch.float32 on cpu"]
    for name in ATTENTIONS[:-1]:
        with pytest.raises(ValueError, match=rf"^attention: {name} needs a CUDA device, got torch.float32 on cpu$"):
            use_attention(block, name)
    with pytest.raises(ValueError, match=r"^attention: expected one of auto, triton, .*, got 'fast'$"):
        use_attention(block, "fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_packed_kernels_do_what_grouped_does(biased: bool, dtype: torch.dtype) -> None:
    block = make_block().cuda().to(dtype)
    lengths = (300, 28, 30, 201)
    tokens = PackedTokens(make_tokens(lengths).values.cuda().to(dtype), lengths)
    bias = torch.randint(1, 9, (len(tokens.values),)).cuda().float().log() if biased else None
    use_attention(block, "grouped")
    expected = attend(block.attn, tokens, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert use_attention(block) != "grouped"
    for name in ATTENTIONS[:-1]:
        if attention_obstacle(name, torch.device("cuda"), dtype) is None:
            use_attention(block, name)
            torch.testing.assert_close(attend(block.attn, tokens, bias), expected, rtol=0, atol=tolerance, msg=name)
