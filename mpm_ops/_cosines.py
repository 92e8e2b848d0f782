"""Most similar rows by cosine: tiles of products that are given up as soon as none of them can be anybody's largest.

Columns are sorted by variance and taken in chunks. After each, what is left of a product is at most the product of
the norms of what is left (Cauchy-Schwarz): where that reaches no row's best so far, the tile is done. On tokens of
real pictures a third to a half of the arithmetic remains; where nothing can be given up, it is that of half a GEMM.

Each product is added up in one order wherever it stands in a tile: equal rows have equal cosines, both sides of a pair
see the same number, and neither threads nor the order of tiles change a bit of the answer.
"""

from math import isqrt
from threading import Thread
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._jit import jit

ROWS, COLUMNS = 6, 16  # of a tile: twelve AVX2 registers, or six of AVX-512
_THREADED = 256  # rows; below, starting a thread takes longer than it saves


def nearest_rows(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest cosine with another row, and whose it is; ties go to the lowest index.

    As many threads as torch has compute, each started for this call alone: none spins when it is done.

    Args:
        unit: [N, D] float32 rows of length 1 or shorter, finite.

    Returns:
        best [N] float32, and nearest [N] int32; -inf and itself for a row that is alone.
    """
    num_rows, width = unit.shape
    slack = np.float32((width + 8) * 2.0**-23)  # more than any order of summation rounds
    chunk = 16 * max(2, width // 128)  # dimensions between two looks at what can be given up
    sorted_rows, panels, rest = _prepared(unit, chunk)
    low = _floors(unit, sorted_rows.shape[0], slack, isqrt(num_rows))
    num_threads = min(torch.get_num_threads(), 1 + num_rows // _THREADED)
    found = [(np.full(num_rows, -np.inf, np.float32), np.arange(num_rows, dtype=np.int32)) for _ in range(num_threads)]
    helpers = [
        Thread(target=_search, args=(sorted_rows, panels, rest, low, chunk, slack, i, num_threads, *found[i]))
        for i in range(1, num_threads)
    ]
    for helper in helpers:
        helper.start()
    best, nearest = found[0]
    _search(sorted_rows, panels, rest, low, chunk, slack, 0, num_threads, best, nearest)
    for helper, (its_best, its_nearest) in zip(helpers, found[1:], strict=True):
        helper.join()
        _join(best, nearest, its_best, its_nearest)
    return best, nearest


@intrinsic
def _add_products(
    typing_context: Any, chunk: Any, rows: Any, stride: Any, panel: Any, rest: Any, low: Any, others: Any, tile: Any
) -> Any:
    """Add a chunk's products of ROWS rows and a panel to a tile, and say whether one may still be a largest.

    Addresses of: rows [ROWS, stride], a panel's chunk [chunk, COLUMNS], the norms of what is left of the rows and
    their bests so far, both of the panel's rows at `others` bytes after them, and the tile [ROWS, COLUMNS].
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scalar, index = ir.FloatType(), ir.IntType(64)
        vector = ir.VectorType(scalar, COLUMNS)
        chunk, rows, stride, panel, rest, low, others, tile = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{COLUMNS}f32"
        )

        def at(address: Any, i: Any) -> Any:
            return builder.gep(builder.inttoptr(address, scalar.as_pointer()), [i])

        def row_of(address: Any, i: Any) -> Any:
            return builder.bitcast(at(address, i), vector.as_pointer())

        def everywhere(pointer: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            one = builder.insert_element(undefined, builder.load(pointer), ir.IntType(32)(0))
            return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), COLUMNS), None))

        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(ROWS)]
        starts = [builder.mul(stride, index(r)) for r in range(ROWS)]
        with cgutils.for_range(builder, chunk) as loop:
            columns = builder.load(row_of(panel, builder.mul(loop.index, index(COLUMNS))), align=4)
            for start, total in zip(starts, sums, strict=True):
                row = everywhere(at(rows, builder.add(start, loop.index)))
                builder.store(builder.call(fma, [row, columns, builder.load(total)]), total)

        rest_columns = builder.load(row_of(builder.add(rest, others), index(0)), align=4)
        low_columns = builder.load(row_of(builder.add(low, others), index(0)), align=4)
        alive = ir.Constant(ir.VectorType(ir.IntType(1), COLUMNS), None)
        for r, total in enumerate(sums):
            place = row_of(tile, index(r * COLUMNS))
            product = builder.fadd(builder.load(place, align=4), builder.load(total))
            builder.store(product, place, align=4)
            most = builder.call(fma, [everywhere(at(rest, index(r))), rest_columns, product])
            low_row = everywhere(at(low, index(r)))
            least = builder.select(builder.fcmp_ordered("<", low_row, low_columns), low_row, low_columns)
            alive = builder.or_(alive, builder.fcmp_ordered(">=", most, least))
        bits = ir.IntType(COLUMNS)
        return builder.icmp_unsigned("!=", builder.bitcast(alive, bits), bits(0))

    return types.boolean(*(types.intp,) * 8), generate


@jit(fastmath=frozenset({"reassoc", "contract"}))
def _prepared(unit: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows by falling variance of their columns, padded by zeros; the same in panels; norms after each chunk."""
    num_rows, width = unit.shape
    sums, squares = np.zeros(width, np.float32), np.zeros(width, np.float32)
    for i in range(num_rows):
        for d in range(width):
            sums[d] += unit[i, d]
            squares[d] += unit[i, d] * unit[i, d]
    order = np.argsort(sums * sums / np.float32(max(num_rows, 1)) - squares)
    num_chunks, num_panels = -(-width // chunk), -(-num_rows // COLUMNS)
    num_padded, depth = num_panels * COLUMNS + ROWS, num_chunks * chunk
    rows = np.zeros((num_padded, depth), np.float32)
    panels = np.empty((num_panels, depth, COLUMNS), np.float32)
    rest = np.zeros((num_chunks, num_padded), np.float32)
    for i in range(num_rows):
        row, source = rows[i], unit[i]
        for d in range(width):
            row[d] = source[order[d]]
        left = np.float32(0)
        for q in range(num_chunks - 1, 0, -1):
            square = np.float32(0)
            for d in range(q * chunk, (q + 1) * chunk):
                square += row[d] * row[d]
            left += square
            rest[q - 1, i] = np.sqrt(left)
    for p in range(num_panels):
        for d in range(depth):
            for c in range(COLUMNS):
                panels[p, d, c] = rows[p * COLUMNS + c, d]
    return rows, panels, rest


@jit(fastmath=frozenset({"reassoc", "contract"}))
def _floors(unit: np.ndarray, num_padded: int, slack: np.float32, above: int) -> np.ndarray:
    """[num_padded], what the best cosine of each row surely reaches: neighbours in a (square) picture are alike."""
    low = np.full(num_padded, np.float32(-np.inf))
    for i in range(len(unit)):
        for j in (i + 1, i + 2, i + above):
            if j >= len(unit) or j == i:
                continue
            cosine = np.float32(0)
            for d in range(unit.shape[1]):
                cosine += unit[i, d] * unit[j, d]
            low[i], low[j] = max(low[i], cosine - slack), max(low[j], cosine - slack)
    low[len(unit) :] = np.float32(np.inf)
    return low


@jit
def _search(
    rows: np.ndarray,
    panels: np.ndarray,
    rest: np.ndarray,
    low: np.ndarray,
    chunk: int,
    slack: np.float32,
    first: int,
    step: int,
    best: np.ndarray,
    nearest: np.ndarray,
) -> None:
    """Compare every step-th ROWS rows with all that follow them. Threads share `low`: what is lost costs time only."""
    num_rows, depth, num_padded = len(best), rows.shape[1], len(low)
    tile = np.empty((ROWS, COLUMNS), np.float32)
    at_rows, at_panels, at_rest, at_low = rows.ctypes.data, panels.ctypes.data, rest.ctypes.data, low.ctypes.data
    for top in range(first * ROWS, num_rows, step * ROWS):
        for p in range(top // COLUMNS, len(panels)):
            left = p * COLUMNS
            tile[:] = np.float32(0)
            alive, q = True, 0
            while alive and q < len(rest):
                alive = _add_products(
                    chunk,
                    at_rows + 4 * (top * depth + q * chunk),
                    depth,
                    at_panels + 4 * COLUMNS * (p * depth + q * chunk),
                    at_rest + 4 * (q * num_padded + top),
                    at_low + 4 * top,
                    4 * (left - top),
                    tile.ctypes.data,
                )
                q += 1
            if not alive:
                continue
            for i in range(top, min(top + ROWS, num_rows)):
                for j in range(max(left, i + 1), min(left + COLUMNS, num_rows)):
                    cosine = tile[i - top, j - left]
                    if cosine > best[i] or (cosine == best[i] and j < nearest[i]):
                        best[i], nearest[i], low[i] = cosine, j, max(low[i], cosine - slack)
                    if cosine > best[j] or (cosine == best[j] and i < nearest[j]):
                        best[j], nearest[j], low[j] = cosine, i, max(low[j], cosine - slack)


@jit
def _join(best: np.ndarray, nearest: np.ndarray, other_best: np.ndarray, other_nearest: np.ndarray) -> None:
    for i in range(len(best)):
        closer = other_best[i] > best[i] or (other_best[i] == best[i] and other_nearest[i] < nearest[i])
        if closer and other_nearest[i] != i:
            best[i], nearest[i] = other_best[i], other_nearest[i]
