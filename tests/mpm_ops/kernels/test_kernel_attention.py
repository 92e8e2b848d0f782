"""Ragged attention with a bias against plain softmax, one sequence at a time."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops.kernels.attention import attend_ragged
from mpm_ops.packed import bounds_of

pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter
]
GPU = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter has no bfloat16 products
ATOL = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def plain(qkv: Tensor, lengths: tuple[int, ...], key_bias: Tensor | None, scale: float) -> Tensor:
    """[T, nH * Dh] in float64."""
    outputs = []
    biases = [None] * len(lengths) if key_bias is None else key_bias.double().split(lengths)
    for part, bias in zip(qkv.double().split(lengths), biases, strict=True):
        q, k, v = part.permute(1, 2, 0, 3)
        logits = scale * q @ k.mT + (0 if bias is None else bias)
        outputs.append((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "biased"),
    [
        ((63, 0, 1, 111, 64), 2, 64, True),
        ((128, 129, 0), 1, 64, False),
        ((1000,), 1, 16, True),
        ((70, 7), 3, 128, False),
        ((40, 200), 2, 32, True),
    ],
)
def test_does_what_softmax_does(
    lengths: tuple[int, ...], heads: int, head_dim: int, biased: bool, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    num_tokens, spare = sum(lengths), 5
    qkv = torch.randn(num_tokens + spare, 3, heads, head_dim, generator=generator).to(device, dtype)
    qkv[num_tokens:] = torch.nan  # nothing reads them
    bias = (
        torch.randint(1, 40, (num_tokens + spare,), generator=generator).float().log().to(device) if biased else None
    )
    out = attend_ragged(qkv, bounds_of(lengths, device), max(lengths) + 3, bias, head_dim**-0.5)
    assert out.dtype == dtype
    expected = plain(qkv[:num_tokens], lengths, None if bias is None else bias[:num_tokens], head_dim**-0.5)
    torch.testing.assert_close(out[:num_tokens].double(), expected, rtol=0, atol=ATOL[dtype])
    assert out[num_tokens:].isnan().all(), "rows behind the last sequence were written"


def test_a_bias_hides_keys_even_whole_blocks_of_them(device: torch.device) -> None:
    qkv = torch.randn(200, 3, 1, 16, generator=torch.Generator().manual_seed(1)).to(device)
    bias = torch.zeros(200, device=device)
    bias[:130] = -torch.inf
    out = attend_ragged(qkv, bounds_of((200,), device), 200, bias, 0.25)
    torch.testing.assert_close(out.double(), plain(qkv, (200,), bias, 0.25), rtol=0, atol=3e-6)


def test_large_logits_stay_finite(device: torch.device) -> None:
    qkv = 30 * torch.randn(150, 3, 1, 32, generator=torch.Generator().manual_seed(1)).to(device)
    out = attend_ragged(qkv, bounds_of((100, 50), device), 100, None, 1.0)
    torch.testing.assert_close(out.double(), plain(qkv, (100, 50), None, 1.0), rtol=1e-3, atol=1e-2)


def test_refuses_what_it_would_read_wrongly(device: torch.device) -> None:
    qkv, bounds = torch.zeros(6, 3, 2, 16, device=device), bounds_of((6,), device)
    with pytest.raises(ValueError, match=r"^qkv: expected contiguous .* \[T, 3, nH, Dh\], got torch\.float64"):
        attend_ragged(qkv.double(), bounds, 6, None, 1.0)
    with pytest.raises(ValueError, match=r"^qkv: expected heads as wide as one of 16, 32, 64, 128, got 48$"):
        attend_ragged(torch.zeros(6, 3, 2, 48, device=device), bounds, 6, None, 1.0)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected int32 \[B \+ 1\], got torch\.int64 \[2\]$"):
        attend_ragged(qkv, bounds.long(), 6, None, 1.0)
    with pytest.raises(ValueError, match=r"^key_bias: expected float32 \[6\], got torch\.float32 \[5\]$"):
        attend_ragged(qkv, bounds, 6, torch.zeros(5, device=device), 1.0)


def test_torch_knows_the_operator(device: torch.device) -> None:
    qkv = torch.randn(20, 3, 1, 16, device=device)
    arguments = (qkv, bounds_of((13, 7), device), 13, torch.zeros(20, device=device), 0.25)
    torch.library.opcheck(attend_ragged, arguments, test_utils=("test_schema", "test_faketensor"))
