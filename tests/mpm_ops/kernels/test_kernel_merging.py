"""The merging kernels against `merge_tokens`, one sequence at a time."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops.kernels.merging import merge_packed
from mpm_ops.kernels.nearest import NOTHING, cosine_of, nearest, nearest_of
from mpm_ops.merge import merge_tokens
from mpm_ops.packed import PackedTokens

NEAR_TIE = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [
    pytest.mark.usefixtures("_poisoned"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter
]


def clustered(num_tokens: int, width: int, *, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Tokens around a common direction, like those of a ViT; cosines crowd near 1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return common + spread * torch.randn(num_tokens, width, generator=generator)


def pack(sequences: list[Tensor], device: torch.device) -> PackedTokens:
    return PackedTokens.pack([s.to(device) for s in sequences])


def assert_merges_as_specified(
    sequences: list[Tensor],
    device: torch.device,
    *,
    special: int,
    align: int,
    keep: float = 1,
    weighted: bool = False,
) -> None:
    tokens = pack(sequences, device)
    sizes = torch.arange(len(tokens.values), device=device) % 5 + 1 if weighted else None
    merged, merge_map, bounds = merge_packed(
        tokens.values, tokens.cu_seqlens, tokens.max_seqlen, special, align, keep, sizes
    )
    own_sizes = [None] * len(sequences) if sizes is None else sizes.cpu().split(tokens.lengths)
    merged, bounds = merged.cpu(), bounds.tolist()
    assert bounds[0] == 0
    for b, (sequence, part) in enumerate(zip(sequences, merge_map.cpu().split(tokens.lengths), strict=True)):
        own = own_sizes[b]
        wanted, wanted_map = merge_tokens(
            sequence[special:], align=align, keep=keep, sizes=None if own is None else own[special:]
        )
        assert part.tolist() == [*range(special), *wanted_map.tolist()], b
        found = merged[bounds[b] : bounds[b + 1]]
        wanted = torch.cat([sequence[:special], wanted])
        # Stored bfloat16 is cut off, not rounded, by the interpreter.
        ulp = torch.finfo(sequence.dtype).eps if sequence.dtype == torch.bfloat16 and device.type == "cpu" else 0
        if weighted and device.type == "cuda":  # products and sums are fused there
            ulp = 4 * torch.finfo(sequence.dtype).eps
        torch.testing.assert_close(found, wanted, rtol=ulp, atol=ulp if weighted else 0, equal_nan=True)


def test_cosines_and_partners_are_those_of_float64(device: torch.device) -> None:
    lengths, width = (1, 2, 63, 197, 789), 100
    sequences = [clustered(n, width, seed=n) for n in lengths]
    tokens = pack(sequences, device)
    best = nearest(tokens.values, tokens.cu_seqlens, max(lengths), 0).cpu()
    assert best[0] == NOTHING
    for sequence, found in zip(sequences[1:], best.split(lengths)[1:], strict=True):
        unit = sequence.double() / sequence.double().norm(dim=1, keepdim=True)
        two = (unit @ unit.T).fill_diagonal_(-2).topk(2)
        decided = two.values[:, 0] - two.values[:, 1] > NEAR_TIE
        assert decided.double().mean() > 0.9
        assert torch.equal(nearest_of(found)[decided], two.indices[decided, 0])
        off = 5e-7 if device.type == "cpu" else 1e-6  # tensor cores cut sums off rather than round them
        torch.testing.assert_close(cosine_of(found).double(), two.values[:, 0], rtol=0, atol=off)


@pytest.mark.parametrize(
    ("special", "align", "dtype"),
    [
        (0, 1, torch.float32),
        (1, 1, torch.bfloat16),
        (2, 8, torch.float32),
        (1, 32, torch.float16),
    ],
)
def test_ragged_batches(special: int, align: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = (1 + special, 63, special, 197, 789, 2 + special)
    sequences = [clustered(n, 72, seed=n).to(dtype) for n in lengths]
    assert_merges_as_specified(sequences, device, special=special, align=align)


@pytest.mark.parametrize(
    ("special", "align", "keep", "dtype"),
    [
        (0, 1, 0.5, torch.float32),
        (1, 1, 0.29, torch.bfloat16),
        (2, 7, 0.75, torch.float32),
        (1, 16, 0.000001, torch.float16),
    ],
)
def test_the_share_that_is_kept_and_weighted_means(
    special: int, align: int, keep: float, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = (1 + special, 63, special, 301, 2 + special)
    sequences = [clustered(n, 72, seed=n, spread=1.0).to(dtype) for n in lengths]
    assert_merges_as_specified(sequences, device, special=special, align=align, keep=keep, weighted=True)


@pytest.mark.parametrize("width", [1, 63, 64, 65, 192])
def test_widths(width: int, device: torch.device) -> None:
    spread = 0.3 if width > 1 else 0.0
    assert_merges_as_specified([clustered(130, width, spread=spread)], device, special=1, align=1)


@pytest.mark.parametrize("align", [1, 7, 16])
@pytest.mark.parametrize("num_tokens", [3, 40, 129, 300])
def test_exact_ties_go_to_the_lowest_index(num_tokens: int, align: int, device: torch.device) -> None:
    # Entries of +-1 and a width of 16 make every norm 4 and every cosine a multiple of 1/8.
    signs = torch.randint(2, (num_tokens, 16), generator=torch.Generator().manual_seed(num_tokens))
    assert_merges_as_specified([(2 * signs - 1).float()], device, special=0, align=align)
    assert_merges_as_specified([(2 * signs - 1).float()], device, special=0, align=align, keep=0.4, weighted=True)


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize(
    "real",
    [
        # The CPU's matrix product, which the interpreter uses, rounds equal rows by their position.
        pytest.param(True, marks=[pytest.mark.gpu, needs_gpu]),
        False,
    ],
)
def test_equal_tokens(real: bool, align: int, device: torch.device) -> None:
    x = clustered(90, 64, seed=6)
    x = x if real else x.sub(x.mean()).sign()
    few = x[torch.randint(10, (300,), generator=torch.Generator().manual_seed(5))]
    sequences = [x[:1].repeat(200, 1), few, torch.zeros(140, 64)]
    if align == 1:  # else rounding decides which of the twins stay apart
        sequences.append(x.repeat(2, 1))
    assert_merges_as_specified(sequences, device, special=0, align=align)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_are_zero_or_not_finite(dtype: torch.dtype, device: torch.device) -> None:
    x = clustered(150, 24).to(dtype)
    x[[0, 40, 149], [3, 0, 11]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    x[[7, 130]] = 0
    opposites = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    lost = torch.full((5, 24), math.nan, dtype=dtype)
    assert_merges_as_specified([x, lost], device, special=1, align=1)
    assert_merges_as_specified([opposites], device, special=0, align=1)


def test_half_precision_products_would_choose_others(device: torch.device) -> None:
    sequences = [clustered(197, 192, seed=7, spread=0.05)]
    unit = torch.nn.functional.normalize(sequences[0], dim=1)
    rounded = (unit.half().float() @ unit.half().float().T).fill_diagonal_(-2).argmax(dim=1)
    exact = (unit.double() @ unit.double().T).fill_diagonal_(-2).argmax(dim=1)
    assert (rounded != exact).float().mean() > 0.02
    assert_merges_as_specified(sequences, device, special=0, align=1)


@pytest.mark.parametrize("align", [7, 64, 1000])
def test_nothing_merges_where_no_multiple_is_in_reach(align: int, device: torch.device) -> None:
    assert_merges_as_specified([clustered(31, 16), clustered(150, 16)], device, special=0, align=align)


@pytest.mark.slow
@pytest.mark.parametrize(("num_tokens", "width"), [(1000, 384), (1024, 1024), (4096, 192)])
def test_large_windows(num_tokens: int, width: int, device: torch.device) -> None:
    sequences = [clustered(n, width, seed=n) for n in (num_tokens, num_tokens - 77)]
    assert_merges_as_specified(sequences, device, special=1, align=1)


def test_no_sequence_at_all(device: torch.device) -> None:
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    merged, merge_map, merged_bounds = merge_packed(torch.zeros(0, 8, device=device), bounds, 0, 0, 1)
    assert merged.shape == (0, 8)
    assert len(merge_map) == 0
    assert merged_bounds.tolist() == [0]


def test_refuses_what_it_would_read_wrongly(device: torch.device) -> None:
    x, bounds = torch.zeros(6, 4, device=device), torch.tensor([0, 6], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"^values: expected a contiguous .* matrix \[T, D\], got torch\.float64"):
        merge_packed(x.double(), bounds, 6, 1, 1)
    with pytest.raises(ValueError, match=r"^values: expected a contiguous .* \[4, 6\] with strides \[1, 4\]$"):
        merge_packed(x.T, bounds, 6, 1, 1)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected int32 \[B \+ 1\], got torch\.int64 \[2\]$"):
        merge_packed(x, bounds.long(), 6, 1, 1)
    with pytest.raises(ValueError, match=r"^max_seqlen: expected at least num_special = 2 >= 0, got 1$"):
        merge_packed(x, bounds, 1, 2, 1)
    with pytest.raises(ValueError, match=r"^align: expected an integer >= 1, got 0$"):
        merge_packed(x, bounds, 6, 1, 0)
    with pytest.raises(ValueError, match=r"^keep: expected a number in \(0, 1\], got 0\.0$"):
        merge_packed(x, bounds, 6, 1, 1, 0)
    with pytest.raises(ValueError, match=r"^sizes: expected one for each of 6 tokens, got \[5\]$"):
        merge_packed(x, bounds, 6, 1, 1, 1, torch.ones(5, device=device))


def test_torch_knows_the_operators(device: torch.device) -> None:
    tokens = pack([clustered(20, 8), clustered(9, 8, seed=1)], device)
    arguments = (tokens.values, tokens.cu_seqlens, tokens.max_seqlen, 1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(nearest, arguments, test_utils=checks)
    merged, merge_map, bounds = merge_packed(*arguments, 1)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = merge_packed(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments), 1)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in (merged, merge_map, bounds)]
