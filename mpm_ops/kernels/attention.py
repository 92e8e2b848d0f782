"""Self-attention of ragged sequences with a bias of keys, straight from the projection's queries, keys and values.

One program takes some queries of one head of one sequence and walks over the sequence's keys, with the running
maximum and sum of FlashAttention (arXiv 2205.14135). Logits are powers of two: exp2 is the hardware's own.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N = 64, 64  # queries of a program, and keys at once: best of eleven shapes on an H200
WARPS, STAGES = 4, 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
_LOG2_E = math.log2(math.e)
_log2_e = tl.constexpr(_LOG2_E)


@triton.jit
def _step(
    q, p_keys, p_values, p_bias, left, scale, best, total, mixed,
    biased: tl.constexpr, masked: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """Take in the next keys, of which `left` are left; p_keys is [Dh, block_n] and p_values [block_n, Dh]."""
    n = tl.arange(0, block_n)
    keys = tl.load(p_keys, mask=(n < left)[None, :], other=0.0) if masked else tl.load(p_keys)
    logits = tl.dot(q, keys, input_precision="ieee") * scale
    if biased:
        bias = tl.load(p_bias + n, mask=n < left, other=0.0) if masked else tl.load(p_bias + n)
        logits += (bias * _log2_e)[None, :]
    if masked:
        logits = tl.where((n < left)[None, :], logits, float("-inf"))
    now_best = tl.maximum(best, tl.max(logits, axis=1))
    weights = tl.exp2(logits - now_best[:, None])
    shrink = tl.exp2(best - now_best)
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(p_values, mask=(n < left)[:, None], other=0.0) if masked else tl.load(p_values)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return now_best, total, mixed


@triton.jit(do_not_specialize=["num_heads"])  # heads are multiples of sixteen values wide, however many there are
def _attend(
    p_qkv, p_cu, p_bias, p_out, num_heads, scale,
    biased: tl.constexpr, head_dim: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    start = tl.load(p_cu + tl.program_id(1)).to(tl.int64)
    length = (tl.load(p_cu + tl.program_id(1) + 1) - start).to(tl.int32)
    first = tl.program_id(0) * block_m
    if first < length:
        row_stride = 3 * num_heads * head_dim
        m, n, d = first + tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, head_dim)
        p_head = p_qkv + start * row_stride + tl.program_id(2) * head_dim
        q = tl.load(p_head + m[:, None] * row_stride + d[None, :], mask=(m < length)[:, None], other=0.0)
        p_keys = p_head + num_heads * head_dim + n[None, :] * row_stride + d[:, None]
        p_values = p_head + 2 * num_heads * head_dim + n[:, None] * row_stride + d[None, :]
        p_bias += start
        best = tl.full([block_m], -1.0e30, tl.float32)  # finite: keys may be hidden by a bias of -inf
        total = tl.zeros([block_m], tl.float32)
        mixed = tl.zeros([block_m, head_dim], tl.float32)
        whole = length // block_n * block_n
        for key in range(0, whole, block_n):
            best, total, mixed = _step(
                q, p_keys + key * row_stride, p_values + key * row_stride, p_bias + key, length - key,
                scale, best, total, mixed, biased, False, block_n,
            )  # fmt: skip
        if whole < length:
            best, total, mixed = _step(
                q, p_keys + whole * row_stride, p_values + whole * row_stride, p_bias + whole,
                length - whole, scale, best, total, mixed, biased, True, block_n,
            )  # fmt: skip
        p_head_out = p_out + (start + m)[:, None] * (num_heads * head_dim) + tl.program_id(2) * head_dim + d[None, :]
        mixed = mixed / total[:, None]
        tl.store(p_head_out, mixed.to(p_out.dtype.element_ty), mask=(m < length)[:, None])


@torch.library.custom_op("mpm::attend_ragged", mutates_args=())
def attend_ragged(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, key_bias: Tensor | None, scale: float) -> Tensor:
    """Attention of each sequence to itself, accumulated in float32.

    Args:
        qkv: [T, 3, nH, Dh] float16, bfloat16 or float32, contiguous; Dh is one of HEAD_DIMS.
        cu_seqlens: [B + 1] int32 on the same device, where each sequence starts; the last may be below T.
        max_seqlen: an upper bound of the sequences' lengths.
        key_bias: [T] float32, added to every logit of a key, or None; -inf hides a key.
        scale: of the products of queries and keys.

    Returns:
        [T, nH * Dh], of which rows below the last bound are written.

    Raises:
        ValueError: an argument has another type, shape or device.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.dtype not in DTYPES or not qkv.is_contiguous():
        raise ValueError(
            f"qkv: expected contiguous half precision or float32 [T, 3, nH, Dh], got {qkv.dtype} {list(qkv.shape)}"
        )
    num_tokens, _, num_heads, head_dim = qkv.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"qkv: expected heads as wide as one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: expected int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if key_bias is not None and (key_bias.shape != (num_tokens,) or key_bias.dtype != torch.float32):
        raise ValueError(f"key_bias: expected float32 [{num_tokens}], got {key_bias.dtype} {list(key_bias.shape)}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("key_bias", key_bias)):
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(f"{name}: expected it on {qkv.device}, got {tensor.device}")
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    if max_seqlen > 0 and len(cu_seqlens) > 1:
        block_m, block_n = (BLOCK_M, BLOCK_N) if qkv.dtype != torch.float32 else (32, 32)
        with torch.cuda.device_of(qkv):  # kernels start on the current device, whatever their tensors are on
            _attend[(triton.cdiv(max_seqlen, block_m), len(cu_seqlens) - 1, num_heads)](
                qkv, cu_seqlens, qkv if key_bias is None else key_bias.contiguous(), out, num_heads, scale * _LOG2_E,
                biased=key_bias is not None, head_dim=head_dim, block_m=block_m, block_n=block_n,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return out


@attend_ragged.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, key_bias: Tensor | None, scale: float) -> Tensor:
    return qkv.new_empty(len(qkv), qkv.shape[2] * qkv.shape[3])
