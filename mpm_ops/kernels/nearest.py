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
TILE = 128  # tokens
DEPTH = 32  # columns multiplied at once; rows are padded to a multiple
NOTHING = -(2**63)
_NOTHING = tl.constexpr(NOTHING)
_SCALE = 1024.0  # keeps the lower float16 of a unit row's values out of the subnormals
_UNSCALE = tl.constexpr(1 / (_SCALE * _SCALE))
_OTHER_BYTES = 16 << 10  # of shared memory, for reductions


@triton.jit(do_not_specialize=["num_tokens"])  # of every group; triton would compile again where it divides by 16
def _units(
    p_x, p_high, p_low, p_hidden, p_best, num_tokens, width, padded_width,
    scale: tl.constexpr, block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Rows of length `scale` as the sum of two float16, -inf for those that are not finite, and nothing found yet."""
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
    high = unit.to(tl.float16)
    tl.store(p_high + o_out, high, mask=written)
    tl.store(p_low + o_out, (unit - high.to(tl.float32)).to(tl.float16), mask=written)
    tl.store(p_hidden + i, tl.where(broken, float("-inf"), 0.0), mask=i < num_tokens)
    tl.store(p_best + i, tl.full([block], _NOTHING, tl.int64), mask=i < num_tokens)


@triton.jit
def _ranked(cosine, index):
    """One int64 that orders by cosine and then by falling index."""
    bits = tl.where(cosine == 0.0, 0.0, cosine).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def _nearest_tiles(
    p_high, p_low, p_hidden, p_cu, p_best, num_special, padded_width, tile: tl.constexpr, depth: tl.constexpr,
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
        for k in range(0, padded_width, depth):
            rows = tl.load(p_high + o_row + k, mask=row_inside, other=0.0)
            columns = tl.load(p_high + o_column + k, mask=column_inside, other=0.0)
            low_rows = tl.load(p_low + o_row + k, mask=row_inside, other=0.0)
            low_columns = tl.load(p_low + o_column + k, mask=column_inside, other=0.0)
            cosine = tl.dot(rows, low_columns, cosine)
            cosine = tl.dot(low_rows, columns, cosine)
            cosine = tl.dot(rows, columns, cosine)
        cosine *= _UNSCALE
        if i_row == i_column:
            cosine = tl.where(row[:, None] < column[None, :], cosine, float("-inf"))

        # A maximum and then the lowest index that has it: two plain reductions beat one of pairs.
        row_hidden = tl.load(p_hidden + start + row, mask=row < length, other=float("-inf"))
        column_hidden = tl.load(p_hidden + start + column, mask=column < length, other=float("-inf"))
        seen = cosine + column_hidden[None, :]
        best = tl.max(seen, axis=1)
        at = tl.min(tl.where(seen == best[:, None], column[None, :], 0x7FFFFFFF), axis=1)
        found = best + row_hidden > float("-inf")
        tl.atomic_max(p_best + start + row, _ranked(best, at), mask=found, sem="relaxed")
        seen = cosine + row_hidden[:, None]
        best = tl.max(seen, axis=0)
        at = tl.min(tl.where(seen == best[None, :], row[:, None], 0x7FFFFFFF), axis=0)
        found = best + column_hidden > float("-inf")
        tl.atomic_max(p_best + start + column, _ranked(best, at), mask=found, sem="relaxed")


@torch.library.custom_op("mpm::nearest", mutates_args=())
def nearest(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_special: int) -> Tensor:
    """Find the most similar other image token of every image token.

    Nothing here waits for the device.

    Args:
        values: [T, D] packed float32, bfloat16 or float16 tokens, contiguous, special tokens first in each sequence.
        cu_seqlens: [B + 1] int32 on the same device, where each sequence starts.
        max_seqlen: an upper bound of the sequences' lengths, special tokens included.
        num_special: tokens at the start of each sequence that take no part.

    Returns:
        [T] int64, what `nearest_of` and `cosine_of` read; NOTHING for special tokens and those without a partner.

    Raises:
        ValueError: an argument has another type, shape or device.
    """
    check_packed(values, cu_seqlens, max_seqlen, num_special)
    num_tokens, width = values.shape
    best = torch.empty(num_tokens, dtype=torch.int64, device=values.device)
    if num_tokens == 0:
        return best
    padded_width = triton.cdiv(width, DEPTH) * DEPTH
    high = torch.empty(num_tokens, padded_width, dtype=torch.float16, device=values.device)
    low = torch.empty_like(high)
    hidden = torch.empty(num_tokens, dtype=torch.float32, device=values.device)
    block_width = triton.next_power_of_2(padded_width)
    block = max(1, 4096 // block_width)
    warps, num_stages = _tiling(values.device)
    tiles = triton.cdiv(max(max_seqlen - num_special, 1), TILE)
    with torch.cuda.device_of(values):  # kernels start on the current device, whatever their tensors are on
        _units[(triton.cdiv(num_tokens, block),)](
            values, high, low, hidden, best, num_tokens, width, padded_width,
            scale=_SCALE, block=block, block_width=block_width,
        )  # fmt: skip
        _nearest_tiles[(tiles * (tiles + 1) // 2, len(cu_seqlens) - 1)](
            high, low, hidden, cu_seqlens, best, num_special, padded_width,
            tile=TILE, depth=DEPTH, num_warps=warps, num_stages=num_stages,
        )  # fmt: skip
    return best


@nearest.register_fake
def _(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_special: int) -> Tensor:
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
    """Warps of a tile, and loads in flight that fit into a multiprocessor's shared memory.

    Args:
        capability: of the device, 90 for 9.0.
        shared_bytes: that one program may have.
    """
    warps = 4 if capability < 100 else 8  # four spill registers there
    return warps, max(1, min(3, (shared_bytes - _OTHER_BYTES) // (4 * TILE * DEPTH * 2)))


def _tiling(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 4, 1
    properties: Any = torch.cuda.get_device_properties(device)
    return tiling(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)
