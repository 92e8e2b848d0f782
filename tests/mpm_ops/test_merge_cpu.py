"""The CPU's merging against the specification."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpm_ops import load_segmenter, merge_tokens
from mpm_ops.merge_cpu import can_merge_on_cpu, merge_tokens_cpu
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch
from mpm_ops.windows import cut_windows, plan_windows

NEAR_TIE = 1e-6
DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo"
ALIGNS = [1, 8, 16, 64]


def vit_like(num_tokens: int, width: int, *, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Tokens around a common direction; cosines crowd near 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator) + spread * torch.randn(num_tokens, width, generator=generator)


def decided(x: Tensor) -> Tensor:
    """[N], whether the best two partners of a token and of its nearest one are further apart than rounding."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
    top = similarity.topk(2, dim=1)
    clear = top.values[:, 0] - top.values[:, 1] > NEAR_TIE
    return clear & clear[top.indices[:, 0]]


def partners(merge_map: Tensor) -> Tensor:
    """[N], the other token of each token's pair, or itself."""
    order = merge_map.argsort(stable=True)
    row = merge_map[order]
    partner = torch.arange(len(merge_map))
    equal = torch.nonzero(row[1:] == row[:-1]).flatten()
    partner[order[equal]], partner[order[equal + 1]] = order[equal + 1], order[equal]
    return partner


def check_same(x: Tensor, align: int = 1, keep: float = 1, *, weighted: bool = False) -> None:
    sizes = torch.arange(len(x)) % 5 + 1 if weighted else None
    merged, merge_map = merge_tokens_cpu(x, align=align, keep=keep, sizes=sizes)
    expected, expected_map = merge_tokens(x, align=align, keep=keep, sizes=sizes)
    assert merged.dtype == x.dtype
    assert merge_map.dtype == torch.int64
    assert torch.equal(merge_map, expected_map)
    assert torch.equal(merged.nan_to_num(5, 6, 7), expected.nan_to_num(5, 6, 7))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 63, 127, 128, 129, 197, 789, 1000, 1025])
@pytest.mark.parametrize("width", [3, 64, 192])
def test_gives_the_pairs_of_the_specification(num_tokens: int, width: int, threads: int) -> None:
    x = vit_like(num_tokens, width, seed=num_tokens, spread=1.0)
    merged, merge_map = merge_tokens_cpu(x)
    if num_tokens > 2:
        clear = decided(x)
        assert clear.float().mean() > (0.5 if width == 3 else 0.97)
        assert torch.equal(partners(merge_map)[clear], partners(merge_tokens(x)[1])[clear])
    assert merge_map.unique().tolist() == list(range(len(merged)))
    assert torch.equal(merged[merge_map], 0.5 * x + 0.5 * x[partners(merge_map)])


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [63, 789])
def test_aligns_and_rounds_as_the_specification(num_tokens: int, dtype: torch.dtype, align: int) -> None:
    x = vit_like(num_tokens, 192, seed=1).to(dtype)
    assert decided(x).all()
    check_same(x, align)


@pytest.mark.parametrize("align", [1, 7, 16])
@pytest.mark.parametrize("keep", [0.75, 1 / 3, 0.01])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 63, 301, 788])
def test_keeps_and_weights_as_the_specification(num_tokens: int, keep: float, align: int) -> None:
    x = vit_like(num_tokens, 96, seed=1, spread=1.0)  # its pairs differ by more than rounding
    check_same(x, align, keep, weighted=True)
    check_same(x.bfloat16(), align, keep)


def test_long_sequences(threads: int) -> None:
    num_tokens = 2179
    x = vit_like(num_tokens, 32, seed=2)
    clear = decided(x)
    assert clear.float().mean() > 0.97
    assert torch.equal(partners(merge_tokens_cpu(x)[1])[clear], partners(merge_tokens(x)[1])[clear])


@pytest.mark.parametrize("num_tokens", [3, 12, 65, 131, 300, 1100])
@pytest.mark.parametrize("align", [1, 8])
def test_exact_ties_go_to_the_lowest_index(num_tokens: int, align: int, threads: int) -> None:
    # Entries of +-1 and a width of 16 make every norm 4 and every cosine a multiple of 1/8, with many equal rows.
    x = 2.0 * torch.randint(2, (num_tokens, 16), generator=torch.Generator().manual_seed(num_tokens)) - 1
    check_same(x, align)
    check_same(x, align, 0.4, weighted=True)


@pytest.mark.parametrize("num_tokens", [12, 65, 129, 300])
def test_ties_without_equal_rows_go_to_the_lowest_index(num_tokens: int) -> None:
    # A norm of 8 times a power of two: unit rows and cosines are exact, no two rows are equal, many cosines are.
    signs = torch.randint(2, (num_tokens, 64), generator=torch.Generator().manual_seed(7)) * 2.0 - 1
    x = signs * 2.0 ** torch.randint(-8, 9, (num_tokens, 1))
    assert len((x / x.norm(dim=1, keepdim=True)).unique(dim=0)) == num_tokens
    check_same(x)


@pytest.mark.parametrize("width", [7, 64])
@pytest.mark.parametrize("copies", [2, 3, 9, 140])
def test_equal_rows(width: int, copies: int, threads: int) -> None:
    token = torch.randn(width)
    check_same(token.repeat(copies, 1))
    mixed = torch.cat([vit_like(50, width, seed=3), token.repeat(copies, 1), vit_like(50, width, seed=4)])
    shuffled = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(copies))]
    check_same(shuffled)
    check_same(torch.cat([mixed, mixed]))
    check_same(token.repeat(copies, 1), keep=0.5, weighted=True)


def test_rows_that_begin_alike_are_not_equal() -> None:
    x = vit_like(120, 24, seed=13)
    x[::2, 0] = 0
    assert decided(x).all()
    check_same(x)
    x[100] = x[40]
    check_same(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("align", [1, 16])
def test_tokens_that_are_not_finite_stay_alone(value: float, align: int) -> None:
    x = vit_like(200, 24, seed=5)
    x[[0, 7, 128, 199], [3, 0, 11, 23]] = value
    check_same(x, align)
    check_same(x, align, 0.6, weighted=True)
    check_same(torch.full((5, 3), value))
    check_same(torch.stack([x[0], x[1]]))
    check_same(torch.stack([x[0], x[1], x[2]]))


@pytest.mark.parametrize("num_zero", [1, 2, 5])
def test_zero_tokens(num_zero: int) -> None:
    x = vit_like(60, 24, seed=6)
    x[10 : 10 + num_zero] = 0
    check_same(x)
    check_same(torch.zeros(num_zero, 8))
    check_same(torch.cat([torch.zeros(num_zero, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])]))


@pytest.mark.parametrize("scale", [1e-10, 1e15, 1e18])
def test_length_plays_no_part(scale: float) -> None:
    x = vit_like(197, 48, seed=8)
    assert decided(x).all()
    scaled = x.clone()
    scaled[::3] *= scale
    assert torch.equal(merge_tokens_cpu(scaled)[1], merge_tokens_cpu(x)[1])
    check_same(scaled)


def test_norms_beyond_float32_do_what_the_specification_does() -> None:
    x = vit_like(70, 48, seed=9)
    x[5], x[6], x[7] = 1e30, 2e30, 1e-30  # squares overflow, or underflow
    check_same(x)


@pytest.mark.parametrize("schedule", [(2, 5)])
def test_real_tokens(schedule: tuple[int, ...], data_root: Path) -> None:
    model = load_segmenter(DEMO / "checkpoint.pth", schedule)
    checked = 0
    for file in sorted((data_root / "camvid" / "val" / "images").iterdir())[:40:10]:
        image = np.asarray(Image.open(file).convert("RGB"))
        windows = cut_windows(image, plan_windows(image.shape[0], image.shape[1], model.inference), model.inference)
        with torch.inference_mode():
            batch = model.embed(windows)
            for stage in model.stages[:-1]:
                batch = model.run_blocks(stage, batch)
                for sequence in batch.tokens.split():
                    x = sequence[model.encoder.num_special :]
                    clear = decided(x)
                    assert clear.float().mean() > 0.9
                    for other in (x, x.bfloat16()):
                        clear = decided(other)
                        found, expected = merge_tokens_cpu(other)[1], merge_tokens(other)[1]
                        assert torch.equal(partners(found)[clear], partners(expected)[clear])
                    checked += 1
                batch = model.merge(batch)
    assert checked >= 8


@pytest.mark.parametrize("num_tokens", [197, 1025])
def test_repeats_to_the_bit_and_between_thread_counts(num_tokens: int) -> None:
    x = vit_like(num_tokens, 192, seed=10, spread=0.1)
    answers = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merged, merge_map = answers[threads] = merge_tokens_cpu(x)
            for copy in range(5):
                elsewhere = torch.empty(num_tokens + copy, 192)[copy:].copy_(x)  # another place in memory
                again, map_again = merge_tokens_cpu(elsewhere)
                assert torch.equal(merged, again)
                assert torch.equal(merge_map, map_again)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(answers[1], answers[2], strict=True):
        assert torch.equal(one, other)


def test_mates_make_no_difference(threads: int) -> None:
    sequences = [vit_like(n, 64, seed=n) for n in (300, 129, 300, 64)]
    together = merged_twice(sequences)
    for sequence, found, merge_map in zip(sequences, together.tokens.split(), together.merge_maps or (), strict=True):
        alone = merged_twice([sequence])
        assert torch.equal(alone.tokens.values, found)
        assert alone.merge_maps is not None
        assert torch.equal(alone.merge_maps[0], merge_map)


def merged_twice(sequences: list[Tensor]) -> WindowBatch:
    batch = WindowBatch(PackedTokens.pack(sequences)).merged(num_special=1)
    return batch.merged(num_special=1, keep=0.7, weighted=True)


def test_float64_and_gradients_go_to_the_specification() -> None:
    x = vit_like(40, 16, seed=11)
    assert can_merge_on_cpu(x)
    assert not can_merge_on_cpu(x.double())
    with torch.enable_grad():
        tokens = x.clone().requires_grad_()
        assert not can_merge_on_cpu(tokens)
        WindowBatch(PackedTokens(tokens, (40,))).merged(num_special=0, align=1).tokens.values.sum().backward()
    torch.testing.assert_close(
        tokens.grad, torch.where(partners(merge_tokens(x)[1]) == torch.arange(40), 1.0, 0.5)[:, None].expand(40, 16)
    )
    with torch.no_grad():
        assert can_merge_on_cpu(tokens)


def test_half_precision_stays_out_under_autocast() -> None:
    x = vit_like(80, 32, seed=12, spread=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_same(x)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(5), r"torch\.float32 \[5\] on cpu"),
        (torch.zeros(5, 2, dtype=torch.int64), r"torch\.int64 \[5, 2\] on cpu"),
        (torch.zeros(5, 2, dtype=torch.float64), r"torch\.float64 \[5, 2\] on cpu"),
    ],
)
def test_refuses_what_it_cannot_merge(x: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^x: expected a matrix \[N, D\] of .* without gradient, got {got}$"):
        merge_tokens_cpu(x)


@pytest.mark.parametrize("align", [0, -2])
def test_refuses_align_below_one(align: int) -> None:
    with pytest.raises(ValueError, match=f"^align: expected an integer >= 1, got {align}$"):
        merge_tokens_cpu(torch.zeros(4, 2), align=align)
