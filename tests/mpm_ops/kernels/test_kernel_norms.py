"""The fused sum and layer norm against torch's."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops.kernels.norms import add_norm, norm

pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter
]
GPU = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, GPU], ids=str)
@pytest.mark.parametrize("shape", [(1, 63), (63, 111), (7, 192), (111, 384), (3, 1000), (5, 1024), (2, 1280), (0, 64)])
def test_does_what_torch_does(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    x, rest = (5 + torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).to(device, dtype) for _ in range(2))
    expected = F.layer_norm((x + rest).float(), shape[1:], weight.float(), bias.float(), 1e-5)
    total, normed = add_norm(x, rest, weight, bias, 1e-5)
    assert torch.equal(total, x + rest)
    eps = torch.finfo(dtype).eps
    for found in (normed, norm(x + rest, weight, bias, 1e-5)):
        torch.testing.assert_close(found.float(), expected, rtol=2 * eps, atol=max(eps / 8, 5e-6))


def test_refuses_what_it_would_read_wrongly(device: torch.device) -> None:
    x, one = torch.zeros(6, 4, device=device), torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=r"^x: expected a contiguous .* got torch\.float64 \[6, 4\]"):
        norm(x.double(), one, one, 1e-5)
    with pytest.raises(ValueError, match=r"^rest: expected contiguous torch\.float32 \[6, 4\], got .* \[3, 4\]$"):
        add_norm(x, x[:3], one, one, 1e-5)
    with pytest.raises(ValueError, match=r"^weight: expected contiguous torch\.float32 \[4\], got .* \[3\]$"):
        norm(x, one[:3], one, 1e-5)


def test_torch_knows_the_operators(device: torch.device) -> None:
    x, one = torch.randn(6, 4, device=device), torch.ones(4, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(norm, (x, one, one, 1e-5), test_utils=checks)
    torch.library.opcheck(add_norm, (x, x.clone(), one, one, 1e-5), test_utils=checks)
