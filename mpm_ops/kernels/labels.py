"""Labels of a picture without class x height x width: every pixel compares its classes in registers.

A pixel mixes the tokens of its cell (see `mpm_ops.axes`), first down and then across, as `mpm_ops.labels.label_tiles`,
the specification, does. One program takes the pixels of one row of one cell, which mix the same tokens; pictures whose
windows lie alike are labelled in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES = 64  # compared at once
PIXELS = 32  # at most, at once; twice that spills registers
WARPS = 4


# Of every picture's own size; triton would compile again for those that are 1 or divide by 16.
@triton.jit(
    do_not_specialize=[
        "picture_stride",
        "windows_across",
        "grid_height",
        "grid_width",
        "most_rows",
        "most_columns",
        "height",
        "width",
    ]
)
def _label_pixels(
    p_tokens, p_row_cells, p_row_tokens, p_row_counts, p_row_weights,
    p_starts, p_column_tokens, p_column_counts, p_column_weights, p_labels,
    num_classes, picture_stride, windows_across, grid_height, grid_width, most_rows, most_columns, height, width,
    block: tl.constexpr, classes: tl.constexpr,
):  # fmt: skip
    """The class of the largest logit at each pixel, of equals the lowest."""
    y, j, picture = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_tokens += picture * picture_stride
    cell = tl.load(p_row_cells + y)
    num_rows = tl.load(p_row_counts + cell)
    num_columns = tl.load(p_column_counts + j)
    right = tl.load(p_starts + j + 1)
    for left in range(tl.load(p_starts + j), right, block):
        x = left + tl.arange(0, block)
        best = tl.full([block], float("-inf"), tl.float32)
        label = tl.zeros([block], tl.int32)
        for first in range(0, num_classes, classes):
            k = first + tl.arange(0, classes)
            value = tl.zeros([block, classes], tl.float32)
            for c in range(num_columns):
                column = tl.load(p_column_tokens + j * most_columns + c)
                mixed = tl.zeros([classes], tl.float32)
                for r in range(num_rows):
                    row = tl.load(p_row_tokens + cell * most_rows + r)
                    window = row // grid_height * windows_across + column // grid_width
                    token = (window * grid_height + row % grid_height) * grid_width + column % grid_width
                    p_logits = p_tokens + token.to(tl.int64) * num_classes
                    logits = tl.load(p_logits + k, mask=k < num_classes, other=0.0)
                    mixed += tl.load(p_row_weights + y * most_rows + r) * logits
                share = tl.load(p_column_weights + x * most_columns + c, mask=x < right, other=0.0)
                value += share[:, None] * mixed[None, :]
            value = tl.where((k < num_classes)[None, :], value, float("-inf"))
            found, at = tl.max(value, axis=1, return_indices=True)
            label = tl.where(found > best, first + at, label)
            best = tl.maximum(best, found)
        p_pixel = p_labels + (picture * height + y) * width + x
        tl.store(p_pixel, label.to(p_labels.dtype.element_ty), mask=x < right)


@torch.library.custom_op("mpm::label_pixels", mutates_args=())
def label_pixels(logits: Tensor, rows: list[Tensor], columns: list[Tensor], widest: int) -> Tensor:
    """Give every pixel of some pictures the class of its largest logit, of equals the lowest id.

    Args:
        logits: float32 [P, windows down, windows across, Gh, Gw, K] of P pictures, contiguous and finite.
        rows: of the axis down, int32 but for the weights: the cell of every pixel row [H], tokens of each cell
            [cells, most], their number [cells], and float32 weights [H, most].
        columns: of the axis across: where cells start [cells + 1], tokens, numbers and weights like those of rows.
        widest: pixels of the widest cell across.

    Returns:
        [P, H, W] uint8, or int16 from 257 classes on, whose bits are those of a uint16.

    Raises:
        ValueError: logits are not such a tensor.
    """
    if logits.ndim != 6 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            "logits: expected contiguous float32 [P, windows down, windows across, Gh, Gw, K], "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    labels = _empty_labels(logits, rows, columns)
    pictures, height, width = labels.shape
    block = min(max(triton.next_power_of_2(widest), 4), PIXELS)
    with torch.cuda.device_of(logits):  # kernels start on the current device, whatever their tensors are on
        _label_pixels[(height, len(columns[2]), pictures)](
            logits, *rows, *columns, labels,
            logits.shape[5], logits.stride(0), *logits.shape[2:5], rows[3].shape[1], columns[3].shape[1],
            height, width,
            block=block, classes=min(CLASSES, triton.next_power_of_2(logits.shape[5])), num_warps=WARPS,
        )  # fmt: skip
    return labels


@label_pixels.register_fake
def _(logits: Tensor, rows: list[Tensor], columns: list[Tensor], widest: int) -> Tensor:
    return _empty_labels(logits, rows, columns)


def _empty_labels(logits: Tensor, rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    dtype = torch.uint8 if logits.shape[5] <= 256 else torch.int16
    return torch.empty(len(logits), len(rows[3]), len(columns[3]), dtype=dtype, device=logits.device)
