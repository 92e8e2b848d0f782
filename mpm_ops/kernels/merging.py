"""Packed sequences merged in one go: pairs, averages, maps and bounds, without asking the device for a number."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpm_ops.merge import KEEP_STEPS, check_choice, keep_steps

from .nearest import NOTHING, check_packed, nearest

_NOTHING = tl.constexpr(NOTHING)
_KEEP_STEPS = tl.constexpr(KEEP_STEPS)
BLOCK = 64  # tokens of a program that compares pairs; twice that spills registers
CHUNK = 1024  # tokens of a step of the running count
_SEQUENCES = tl.constexpr(128)  # whose lengths are added up at once


@triton.jit
def _pairs(p_best, start, i, length):
    """Nearest token of each token i, and whether it is mutual."""
    best = tl.load(p_best + start + i, mask=i < length, other=_NOTHING)
    found = best != _NOTHING
    nearest = tl.where(found, 0xFFFFFFFF - (best & 0xFFFFFFFF), i)
    back = tl.load(p_best + start + nearest, mask=found, other=_NOTHING)
    mutual = found & (0xFFFFFFFF - (back & 0xFFFFFFFF) == i)
    strength = (best & -0x100000000) | (0xFFFFFFFF - tl.minimum(i, nearest))  # of equal cosines, the first pair
    return nearest, mutual, strength


@triton.jit
def _partners(p_best, p_cu, p_partner, num_special, align, kept_steps, takes_all: tl.constexpr, block: tl.constexpr):
    """Whom each token merges with, itself if nobody; a pair stays whose rank is below the number of pairs wanted."""
    start = tl.load(p_cu + tl.program_id(1)).to(tl.int64) + num_special
    length = tl.load(p_cu + tl.program_id(1) + 1).to(tl.int64) - start
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    if tl.program_id(0) * block < length:
        nearest, mutual, strength = _pairs(p_best, start, i, length)
        if not takes_all:
            rank = tl.zeros([block], tl.int32)
            num_pairs = tl.zeros([], tl.int32)
            for first in range(0, length, block):
                j = first + tl.arange(0, block).to(tl.int64)
                nearest_j, mutual_j, strength_j = _pairs(p_best, start, j, length)
                counted = mutual_j & (j < nearest_j)
                stronger = counted[None, :] & (strength_j[None, :] > strength[:, None])
                rank += tl.sum(stronger.to(tl.int32), axis=1)
                num_pairs += tl.sum(counted.to(tl.int32), axis=0)
            kept = (num_pairs.to(tl.int64) * kept_steps + _KEEP_STEPS - 1) // _KEEP_STEPS
            aligned_length = (length - kept + align - 1) // align * align
            mutual &= rank < length - aligned_length
        tl.store(p_partner + start + i, tl.where(mutual, nearest, i), mask=i < length)


@triton.jit
def _positions(p_partner, p_cu, p_position, p_lengths, num_special, chunk: tl.constexpr):
    """Row of each token that stays, counted over one image, and the image's new length."""
    start = tl.load(p_cu + tl.program_id(0)).to(tl.int64) + num_special
    length = (tl.load(p_cu + tl.program_id(0) + 1) - start).to(tl.int32)
    count = tl.zeros([], tl.int32)
    for first in range(0, length, chunk):
        i = first + tl.arange(0, chunk)
        partner = tl.load(p_partner + start + i, mask=i < length, other=-1)
        kept = (partner >= i).to(tl.int32)
        tl.store(p_position + start + i, count + tl.cumsum(kept, axis=0) - kept, mask=i < length)
        count += tl.sum(kept, axis=0)
    tl.store(p_lengths + tl.program_id(0), count + num_special)


@triton.jit
def _average(
    p_x, p_cu, p_partner, p_position, p_lengths, p_cu_merged, p_merged, p_map, p_sizes, num_special, width,
    is_weighted: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Means of pairs and copies of all else, each where it belongs, the map, and the new bounds."""
    start = tl.load(p_cu + tl.program_id(1)).to(tl.int64)
    length = (tl.load(p_cu + tl.program_id(1) + 1) - start).to(tl.int32)
    out = tl.zeros([], tl.int32)
    for first in range(0, tl.program_id(1), _SEQUENCES):
        before = first + tl.arange(0, _SEQUENCES)
        out += tl.sum(tl.load(p_lengths + before, mask=before < tl.program_id(1), other=0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(p_cu_merged + tl.program_id(1), out)
        tl.store(p_cu_merged + tl.program_id(1) + 1, out + tl.load(p_lengths + tl.program_id(1)))
    out = out.to(tl.int64)
    row = tl.program_id(0) * block + tl.arange(0, block)
    i = row - num_special
    image = (row < length) & (i >= 0)
    p_token = start + num_special + i
    partner = tl.load(p_partner + p_token, mask=image, other=0).to(tl.int32)
    first = tl.minimum(i, partner)
    position = tl.load(p_position + start + num_special + first, mask=image, other=0)
    tl.store(p_map + p_token, position.to(tl.int64), mask=image)
    tl.store(p_map + start + row, row.to(tl.int64), mask=(row < length) & (i < 0))

    written = (row < length) & ((i < 0) | (partner >= i))
    other = tl.where(image, partner + num_special, row)
    target = out + tl.where(image, position + num_special, row)
    d = tl.arange(0, block_width)
    mask = written[:, None] & (d < width)[None, :]
    one = tl.load(p_x + (start + row)[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
    two = tl.load(p_x + (start + other)[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
    share = tl.full([block], 0.5, tl.float32)
    if is_weighted:
        size = tl.load(p_sizes + start + row, mask=written, other=1.0)
        share = size / (size + tl.load(p_sizes + start + other, mask=written, other=1.0))
    mean = share[:, None] * one + (1 - share)[:, None] * two
    tl.store(p_merged + target[:, None] * width + d[None, :], mean.to(p_merged.dtype.element_ty), mask=mask)


@torch.library.custom_op("mpm::merge_packed", mutates_args=())
def merge_packed(
    values: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_special: int,
    align: int,
    keep: float = 1.0,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do to every sequence what `merge_tokens` does to one, and choose the same pairs.

    Pairs may differ where two cosines are closer than float32 rounding (1e-6). Nothing here waits for the
    device: how long the sequences became stays there, in the new bounds.

    Args:
        values: [T, D] packed float32, bfloat16 or float16 tokens, contiguous, special tokens first in each sequence.
        cu_seqlens: [B + 1] int32 on the same device, where each sequence starts.
        max_seqlen: an upper bound of the sequences' lengths, special tokens included.
        num_special: tokens at the start of each sequence that are copied.
        align, keep: see `merge_tokens`; special tokens are not counted.
        sizes: [T], see `merge_tokens`; those of special tokens may be anything.

    Returns:
        merged [T, D], of which rows below the last bound are written;
        merge_map [T] int64: of a special token its own number, of an image token the row among the image
        tokens that its sequence has left; and the new bounds, [B + 1] int32.

    Raises:
        ValueError: an argument has another type, shape or device, or as `merge_tokens`.

    Source: MPM, Algorithm 1 (arXiv 2604.05718); `align` and `keep` are ours, weighted means are ToMe's.
    """
    check_packed(values, cu_seqlens, max_seqlen, num_special)
    check_choice(values, align, keep, sizes)
    num_tokens, width = values.shape
    num_sequences = len(cu_seqlens) - 1
    merged = torch.empty_like(values)
    merge_map = torch.empty(num_tokens, dtype=torch.int64, device=values.device)
    if num_tokens == 0:
        return merged, merge_map, torch.zeros_like(cu_seqlens)

    cu_merged = torch.empty_like(cu_seqlens)
    best = nearest(values, cu_seqlens, max_seqlen, num_special)
    partner = torch.empty(num_tokens, dtype=torch.int32, device=values.device)
    position = torch.empty_like(partner)
    lengths = torch.empty_like(cu_seqlens[1:])
    blocks = triton.cdiv(max(max_seqlen - num_special, 1), BLOCK)
    with torch.cuda.device_of(values):  # kernels start on the current device, whatever their tensors are on
        _partners[(blocks, num_sequences)](
            best, cu_seqlens, partner, num_special, align, keep_steps(keep),
            takes_all=align == 1 and keep_steps(keep) == KEEP_STEPS, block=BLOCK,
        )  # fmt: skip
        _positions[(num_sequences,)](partner, cu_seqlens, position, lengths, num_special, chunk=CHUNK)
        block_width = triton.next_power_of_2(width)
        block = max(1, 4096 // block_width)
        _average[(triton.cdiv(max_seqlen, block), num_sequences)](
            values, cu_seqlens, partner, position, lengths, cu_merged, merged, merge_map,
            values if sizes is None else sizes.float().contiguous(), num_special, width,
            is_weighted=sizes is not None, block=block, block_width=block_width,
        )  # fmt: skip
    return merged, merge_map, cu_merged


@merge_packed.register_fake
def _(
    values: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_special: int,
    align: int,
    keep: float = 1.0,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(values),
        values.new_empty(len(values), dtype=torch.int64),
        torch.empty_like(cu_seqlens),
    )
