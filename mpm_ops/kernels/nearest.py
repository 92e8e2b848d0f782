"""The most similar other token of every token, over ragged batches and without N x N in memory.

Tensor cores multiply half-precision numbers, whose cosines would pair other tokens. So each unit row is written as
the sum of two float16 numbers, which hold 22 of float32's 24 bits, and three of their four products are added up in
float32: the fourth is below its rounding. Similarity is symmetric, so only tiles on and above the diagonal are
computed, each giving the maxima of its rows and of its columns. A maximum is one 64-bit number, the cosine above the
index: the larger of two is the more similar token or, of equals, the lower one, in whatever order tiles finish.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("split", "ieee")
TILE = 128  # tokens
WARPS = 8
DEPTH = 64  # rows are padded to a multiple
NOTHING = -(2**63)
_SCALE = 1024.0  # keeps the lower float16 of a unit row's values out of the subnormals
_OTHER_BYTES = 16 << 10  # of shared memory, for reductions


@triton.jit(do_not_specialize=["num_tokens"])  # of every group; triton would compile again where it divides by 16
def _units(
    p_x, p_cu, p_high, p_low, p_usable, num_tokens, width, padded_width, scale,
    split: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Rows of length `scale`, as the sum of two float16 or as one float32."""
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    d = tl.arange(0, block_width)
    inside = (i < num_tokens)[:, None] & (d < width)[None, :]
    x = tl.load(p_x + i[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
    broken = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=1) < block_width  # NaN is below nothing
    x = tl.where(broken[:, None], 0.0, x)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    unit = x / norm[:, None] * scale
    o_out = i[:, None] * padded_width + d[None, :]
    written = (i < num_tokens)[:, None] & (d < padded_width)[None, :]
    if split:
        high = unit.to(tl.float16)
        tl.store(p_high + o_out, high, mask=written)
        tl.store(p_low + o_out, (unit - high.to(tl.float32)).to(tl.float16), mask=written)
    else:
        tl.store(p_high + o_out, unit, mask=written)
    tl.store(p_usable + i, (broken == 0).to(tl.int8), mask=i < num_tokens)


@triton.jit
def _ranked(cosine, index):
    """One int64 that orders by cosine and then by falling index."""
    bits = tl.where(cosine == 0.0, 0.0, cosine).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _nearest_tiles(
    p_high, p_low, p_usable, p_cu, p_best, num_special, padded_width, inverse_square,
    split: tl.constexpr, tile: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """One tile of one image's cosines: bring the maxima of its rows and columns up to date."""
    number = tl.program_id(0)
    i_column = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_column += ((i_column + 1) * (i_column + 2) // 2 <= number).to(tl.int32)  # the root may be off by a rounding
    i_column -= (i_column * (i_column + 1) // 2 > number).to(tl.int32)
    i_row = number - i_column * (i_column + 1) // 2
    start = tl.load(p_cu + tl.program_id(1)).to(tl.int64) + num_special
    length = (tl.load(p_cu + tl.program_id(1) + 1) - start).to(tl.int32)
    if i_column * tile < length:
        row = i_row * tile + tl.arange(0, tile)
        column = i_column * tile + tl.arange(0, tile)
        d = tl.arange(0, depth)
        o_row = (start + row)[:, None] * padded_width + d[None, :]
        o_column = (start + column)[None, :] * padded_width + d[:, None]
        row_inside, column_inside = (row < length)[:, None], (column < length)[None, :]
        cosine = tl.zeros([tile, tile], tl.float32)
        rest = tl.zeros([tile, tile], tl.float32)
        for k in range(0, padded_width, depth):
            rows = tl.load(p_high + o_row + k, mask=row_inside, other=0.0)
            columns = tl.load(p_high + o_column + k, mask=column_inside, other=0.0)
            cosine = tl.dot(rows, columns, cosine, input_precision="ieee")
            if split:
                low_rows = tl.load(p_low + o_row + k, mask=row_inside, other=0.0)
                low_columns = tl.load(p_low + o_column + k, mask=column_inside, other=0.0)
                rest = tl.dot(rows, low_columns, rest)
                rest = tl.dot(low_rows, columns, rest)
        if split:
            cosine = (cosine + rest) * inverse_square
        row_usable = tl.load(p_usable + start + row, mask=row < length, other=0)
        column_usable = tl.load(p_usable + start + column, mask=column < length, other=0)
        allowed = (row_usable[:, None] & column_usable[None, :]) != 0
        allowed &= row[:, None] < column[None, :]
        cosine = tl.where(allowed, cosine, float("-inf"))

        best, at = tl.max(cosine, axis=1, return_indices=True)
        p_row = p_best + start + row
        tl.atomic_max(p_row, _ranked(best, i_column * tile + at), mask=best > float("-inf"), sem="relaxed")
        best, at = tl.max(cosine, axis=0, return_indices=True)
        p_column = p_best + start + column
        tl.atomic_max(p_column, _ranked(best, i_row * tile + at), mask=best > float("-inf"), sem="relaxed")


@torch.library.custom_op("mpm::nearest", mutates_args=())
def nearest(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_special: int, products: str = "split") -> Tensor:
    """Find the most similar other image token of every image token.

    Nothing here waits for the device.

    Args:
        values: [T, D] packed float32, bfloat16 or float16 tokens, contiguous, special tokens first in each sequence.
        cu_seqlens: [B + 1] int32 on the same device, where each sequence starts.
        max_seqlen: an upper bound of the sequences' lengths, special tokens included.
        num_special: tokens at the start of each sequence that take no part.
        products: "split" for tensor cores, "ieee" for float32 arithmetic throughout.

    Returns:
        [T] int64, what `nearest_of` and `cosine_of` read; NOTHING for special tokens and those without a partner.

    Raises:
        ValueError: an argument has another type, shape or device.
    """
    check_packed(values, cu_seqlens, max_seqlen, num_special)
    if products not in PRODUCTS:
        raise ValueError(f"products: expected one of {', '.join(PRODUCTS)}, got {products!r}")
    num_tokens, width = values.shape
    best = torch.full((num_tokens,), NOTHING, dtype=torch.int64, device=values.device)
    longest = max_seqlen - num_special
    if num_tokens == 0 or longest < 2:
        return best
    split = products == "split"
    padded_width = triton.cdiv(width, DEPTH) * DEPTH
    high = torch.empty(num_tokens, padded_width, dtype=torch.float16 if split else torch.float32, device=values.device)
    low = torch.empty_like(high) if split else high
    usable = torch.empty(num_tokens, dtype=torch.int8, device=values.device)
    block_width = triton.next_power_of_2(padded_width)
    block = max(1, 4096 // block_width)
    scale = _SCALE if split else 1.0
    with torch.cuda.device_of(values):  # kernels start on the current device, whatever their tensors are on
        _units[(triton.cdiv(num_tokens, block),)](
            values, cu_seqlens, high, low, usable, num_tokens, width, padded_width, scale,
            split=split, block=block, block_width=block_width,
        )  # fmt: skip
        tiles = triton.cdiv(longest, TILE)
        depth, stages = _tiling(values)
        _nearest_tiles[(tiles * (tiles + 1) // 2, len(cu_seqlens) - 1)](
            high, low, usable, cu_seqlens, best, num_special, padded_width, 1 / (scale * scale),
            split=split, tile=TILE, depth=depth if split else 32, num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return best


@nearest.register_fake
def _(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_special: int, products: str = "split") -> Tensor:
    return values.new_empty(len(values), dtype=torch.int64)


def nearest_of(best: Tensor) -> Tensor:
    """[T] int64, the nearest token's number in its image; meaningless where best is NOTHING."""
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def cosine_of(best: Tensor) -> Tensor:
    """[T] float32, the nearest token's cosine; meaningless where best is NOTHING."""
    ordered = (best >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def check_packed(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_special: int) -> None:
    """Refuse what the kernels would read or write wrongly.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if values.ndim != 2 or values.dtype not in DTYPES or not values.is_contiguous():
        raise ValueError(
            f"values: expected a contiguous float32, bfloat16 or float16 matrix [T, D], "
            f"got {values.dtype} {list(values.shape)} with strides {list(values.stride())}"
        )
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens: expected int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens: expected it on {values.device}, got {cu_seqlens.device}")
    if num_special < 0 or max_seqlen < num_special:
        raise ValueError(f"max_seqlen: expected at least num_special = {num_special} >= 0, got {max_seqlen}")


def tiling(capability: int, shared_bytes: int) -> tuple[int, int]:
    """Columns multiplied at once, and loads in flight that fit into a multiprocessor's shared memory.

    Args:
        capability: of the device, 90 for 9.0.
        shared_bytes: that one program may have.
    """
    depth = 64 if capability in (90, 100) else 32  # operands of other chips pass through registers
    stage_bytes = 4 * TILE * depth * 2
    return depth, max(1, min(3, (shared_bytes - _OTHER_BYTES) // stage_bytes))


def _tiling(values: Tensor) -> tuple[int, int]:
    if not values.is_cuda:
        return DEPTH, 1
    properties: Any = torch.cuda.get_device_properties(values.device)
    return tiling(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)
