"""Layer norm, and the sum before it, in one pass: a row is read once and its variance taken in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = 2048  # of a program: several rows where they are short
WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    p_x, p_rest, p_weight, p_bias, p_sum, p_normed, num_rows, width, eps,
    adds: tl.constexpr, rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    d = tl.arange(0, block_width)
    inside = (i < num_rows)[:, None] & (d < width)[None, :]
    o_row = i[:, None] * width + d[None, :]
    x = tl.load(p_x + o_row, mask=inside, other=0.0).to(tl.float32)
    if adds:
        total = (x + tl.load(p_rest + o_row, mask=inside, other=0.0).to(tl.float32)).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_row, total, mask=inside)
        x = total.to(tl.float32)  # as stored
    centred = tl.where((d < width)[None, :], x - tl.sum(x, axis=1)[:, None] / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(p_weight + d, mask=d < width, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + d, mask=d < width, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(p_normed + o_row, normed.to(p_normed.dtype.element_ty), mask=inside)


@torch.library.custom_op("mpm::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of [T, D] rows with float32 statistics.

    Raises:
        ValueError: the tensors differ in type, or have shapes or strides that the kernel would read wrongly.
    """
    _check(x, x, weight, bias)
    normed = torch.empty_like(x)
    _launch(x, x, weight, bias, x, normed, eps, adds=False)
    return normed


@norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mpm::add_norm", mutates_args=())
def add_norm(x: Tensor, rest: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise the sum.

    Args:
        x: [T, D] float32, bfloat16 or float16, contiguous.
        rest: [T, D], added to x.
        weight: [D].
        bias: [D].
        eps: added to the variance.

    Returns:
        The sum, rounded to its type, and the layer norm of that, both [T, D].

    Raises:
        ValueError: the tensors differ in type, or have shapes or strides that the kernel would read wrongly.
    """
    _check(x, rest, weight, bias)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, rest, weight, bias, total, normed, eps, adds=True)
    return total, normed


@add_norm.register_fake
def _(x: Tensor, rest: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _launch(
    x: Tensor, rest: Tensor, weight: Tensor, bias: Tensor, total: Tensor, normed: Tensor, eps: float, *, adds: bool
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    block_width = triton.next_power_of_2(width)
    rows = max(1, VALUES // block_width)
    with torch.cuda.device_of(x):  # kernels start on the current device, whatever their tensors are on
        _add_norm[(triton.cdiv(num_rows, rows),)](
            x, rest, weight, bias, total, normed, num_rows, width, eps,
            adds=adds, rows=rows, block_width=block_width, num_warps=WARPS,
        )  # fmt: skip


def _check(x: Tensor, rest: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(
            f"x: expected a contiguous float32, bfloat16 or float16 matrix [T, D], "
            f"got {x.dtype} {list(x.shape)} with strides {list(x.stride())}"
        )
    for name, tensor, shape in (
        ("rest", rest, x.shape),
        ("weight", weight, x.shape[1:]),
        ("bias", bias, x.shape[1:]),
    ):
        if tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {x.dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
