"""Merging against plain loops written from Algorithm 1, and what must hold whatever the tokens."""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mpm_ops import compose_maps, merge_tokens, reconstruct
from mpm_ops.merge import full_precision

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NEAR_TIE = 1e-6


@dataclass
class Expected:
    """merge_map and clusters as Algorithm 1 gives them; decided: no near-tie had a say in a token's cluster."""

    merge_map: list[int]
    clusters: list[list[int]]
    decided: list[bool]


def algorithm_1(x: Tensor) -> Expected:
    rows = x.double().tolist()
    num_tokens = len(rows)
    norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
    unit = [[value / norm if norm else 0.0 for value in row] for row, norm in zip(rows, norms, strict=True)]

    best, gap = [], []
    for i in range(num_tokens):
        similarity = [(sum(map(float.__mul__, unit[i], unit[j])), -j) for j in range(num_tokens) if j != i]
        ranked = sorted(similarity, reverse=True)  # of equals, the lowest j comes first
        best.append(-ranked[0][1] if ranked else i)
        gap.append(ranked[0][0] - ranked[1][0] if len(ranked) > 1 else math.inf)

    merge_map, clusters = [-1] * num_tokens, []
    for i in range(num_tokens):
        if merge_map[i] >= 0:
            continue
        mutual = best[i] != i and best[best[i]] == i
        clusters.append([i, best[i]] if mutual else [i])
        for member in clusters[-1]:
            merge_map[member] = len(clusters) - 1
    return Expected(merge_map, clusters, [min(gap[i], gap[best[i]]) > NEAR_TIE for i in range(num_tokens)])


def clustered(num_tokens: int, width: int, *, seed: int, spread: float = 0.3) -> Tensor:
    """Tokens around a common direction, like those of a ViT; cosines crowd near 1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator, dtype=torch.float64)
    return common + spread * torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)


def partners(merge_map: Tensor) -> list[int]:
    """The other token of each token's pair, or itself."""
    members = [torch.nonzero(merge_map == row).flatten().tolist() for row in merge_map]
    return [next((m for m in cluster if m != token), token) for token, cluster in enumerate(members)]


def cosines(x: Tensor) -> Tensor:
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    return unit @ unit.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "width"), [(2, 3), (7, 5), (33, 16), (64, 8), (111, 24)])
@pytest.mark.parametrize("spread", [0.3, 100.0])
def test_random_tokens_merge_as_algorithm_1_says(
    num_tokens: int, width: int, spread: float, dtype: torch.dtype
) -> None:
    x = clustered(num_tokens, width, seed=num_tokens, spread=spread).to(dtype)
    expected = algorithm_1(x)
    merged, merge_map = merge_tokens(x)

    assert sum(expected.decided) > 0.9 * num_tokens
    found, wanted = partners(merge_map), partners(torch.tensor(expected.merge_map))
    assert [p for p, d in zip(found, expected.decided, strict=True) if d] == [
        p for p, d in zip(wanted, expected.decided, strict=True) if d
    ]
    assert merged.dtype == dtype
    means = torch.stack([x[merge_map == row].double().mean(dim=0) for row in range(len(merged))])
    torch.testing.assert_close(merged.double(), means, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 12, 40, 65])
def test_ties_go_to_the_lowest_index(num_tokens: int, dtype: torch.dtype) -> None:
    # Entries of +-1 and a width of 16 make every norm 4 and every cosine a multiple of 1/8: ties are exact.
    signs = torch.randint(2, (num_tokens, 16), generator=torch.Generator().manual_seed(num_tokens))
    x = (2 * signs - 1).to(dtype)
    merged, merge_map = merge_tokens(x)
    expected = algorithm_1(x)
    assert merge_map.tolist() == expected.merge_map
    assert torch.equal(merged, torch.stack([x[cluster].mean(dim=0) for cluster in expected.clusters]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("width", [7, 64])
def test_of_equal_tokens_only_the_first_two_merge_whatever_their_rounding(
    width: int, dtype: torch.dtype, threads: int
) -> None:
    for num_tokens in range(2, 50):
        token = torch.randn(width, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float64)
        merged, merge_map = merge_tokens(token.to(dtype).repeat(num_tokens, 1))
        assert merge_map.tolist() == [0, *range(num_tokens - 1)], num_tokens
        assert torch.equal(merged, token.to(dtype).repeat(num_tokens - 1, 1)), num_tokens


def test_duplicates_find_each_other() -> None:
    x = clustered(20, 48, seed=1).float()
    merged, merge_map = merge_tokens(torch.cat([x, x]))
    assert merge_map.tolist() == [*range(20), *range(20)]
    assert torch.equal(merged, x)


@pytest.mark.parametrize(
    ("tokens", "merge_map"),
    [
        ([], []),
        ([[1.0, 2.0]], [0]),
        ([[1.0, 0.0], [-1.0, 0.0]], [0, 0]),  # nobody else to choose, however unlike
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], [0, 1, 0]),  # a zero token has similarity 0 to both
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0, 0, 1]),
        ([[1.0, 0.0], [math.nan, 0.0], [-1.0, 0.0]], [0, 1, 0]),  # better the opposite than a broken one
        ([[2.0, 0.0], [0.0, 3.0], [9.0, 0.0], [0.0, 1.0]], [0, 1, 0, 1]),  # length plays no part
        ([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]], [0, 1, 1]),  # 0 likes 1, who likes 2 better
    ],
)
def test_by_hand(tokens: list[list[float]], merge_map: list[int]) -> None:
    x = torch.tensor(tokens).reshape(-1, 2)
    assert merge_tokens(x)[1].tolist() == merge_map


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("align", [1, 4])
def test_tokens_that_are_not_finite_stay_alone(value: float, align: int) -> None:
    x = clustered(30, 12, seed=2).float()
    broken = [0, 7, 29]
    x[broken, [3, 0, 11]] = value
    merged, merge_map = merge_tokens(x, align=align)
    sizes = merge_map.bincount()
    assert sizes[merge_map[broken]].tolist() == [1, 1, 1]
    assert torch.equal(merged[merge_map[broken]].nan_to_num(5, 5, 5), x[broken].nan_to_num(5, 5, 5))
    assert sizes.max() == 2
    assert merged.isfinite().all(dim=1).sum() == len(merged) - 3
    if align == 1:
        whole = [i for i in range(30) if i not in broken]
        alone = partners(merge_tokens(x[whole])[1])
        assert [partners(merge_map)[i] for i in whole] == [whole[p] for p in alone]


def test_nothing_merges_where_nothing_is_finite() -> None:
    merged, merge_map = merge_tokens(torch.full((5, 3), math.nan))
    assert merge_map.tolist() == list(range(5))
    assert merged.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_similarity_is_float32_for_half_precision_tokens(dtype: torch.dtype) -> None:
    x = clustered(80, 32, seed=5, spread=0.05).to(dtype)
    expected = algorithm_1(x)
    unit = torch.nn.functional.normalize(x, dim=1)
    rounded = (unit @ unit.T).fill_diagonal_(-math.inf).argmax(dim=1)
    exact = cosines(x).fill_diagonal_(-math.inf).argmax(dim=1)
    assert (rounded != exact).float().mean() > 0.4  # half precision would choose others

    assert all(expected.decided)
    assert merge_tokens(x)[1].tolist() == expected.merge_map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert merge_tokens(x)[1].tolist() == expected.merge_map


def test_products_are_float32_whatever_torch_may_round() -> None:
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_chooses_no_pairs() -> None:
    x = clustered(600, 256, seed=6, spread=0.05).float().cuda()
    expected = merge_tokens(x)[1]
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(merge_tokens(x)[1], expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 50, 197, 400])
@pytest.mark.parametrize("align", [1, 2, 16, 32])
def test_invariants(num_tokens: int, align: int) -> None:
    x = clustered(num_tokens, 24, seed=num_tokens)
    before = x.clone()
    merged, merge_map = merge_tokens(x, align=align)

    assert torch.equal(x, before)
    assert len(merged) >= num_tokens / 2
    assert merge_map.dtype == torch.int64
    assert merge_map.unique().tolist() == list(range(len(merged)))
    first_seen = [merge_map.tolist().index(row) for row in range(len(merged))]
    assert first_seen == sorted(first_seen)
    sizes = merge_map.bincount()
    assert sizes.max() <= 2
    torch.testing.assert_close((sizes[:, None] * merged).sum(dim=0), x.sum(dim=0))


@pytest.mark.parametrize("num_tokens", [64, 197, 256, 301])
@pytest.mark.parametrize("align", [2, 7, 16, 32])
def test_align_keeps_the_strongest_pairs_that_reach_the_next_multiple(num_tokens: int, align: int) -> None:
    x = clustered(num_tokens, 24, seed=num_tokens).float()
    all_pairs = {(i, p) for i, p in enumerate(partners(merge_tokens(x)[1])) if i < p}
    merged, merge_map = merge_tokens(x, align=align)
    pairs = {(i, p) for i, p in enumerate(partners(merge_map)) if i < p}

    fully_merged = num_tokens - len(all_pairs)
    assert len(merged) == math.ceil(fully_merged / align) * align <= num_tokens
    assert pairs <= all_pairs
    similarity = cosines(x)
    kept = [float(similarity[pair]) for pair in pairs]
    held_back = [float(similarity[pair]) for pair in all_pairs - pairs]
    assert min(kept, default=1.0) > max(held_back, default=-1.0) - NEAR_TIE


def kept_pairs(x: Tensor, all_pairs: set[tuple[int, int]], align: int, keep: Fraction) -> set[tuple[int, int]]:
    """The most similar pairs, one by one, by cosines in float64."""
    similarity = cosines(x).tolist()
    left = sorted(all_pairs, key=lambda pair: (-similarity[pair[0]][pair[1]], pair[0]))
    while len(left) - 1 >= keep * len(all_pairs):
        left.pop()
    while left and (len(x) - len(left)) % align:
        left.pop()
    return set(left) if (len(x) - len(left)) % align == 0 else set()


@pytest.mark.parametrize("keep", ["1", "0.75", "0.5", "0.29", "0.07", "0.000001"])
@pytest.mark.parametrize("align", [1, 7, 16])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 197])
def test_keep_merges_the_most_similar_share(num_tokens: int, align: int, keep: str) -> None:
    x = clustered(num_tokens, 24, seed=num_tokens).float()
    all_pairs = {(i, p) for i, p in enumerate(partners(merge_tokens(x)[1])) if i < p}
    merged, merge_map = merge_tokens(x, align=align, keep=float(keep))
    pairs = {(i, p) for i, p in enumerate(partners(merge_map)) if i < p}
    assert pairs == kept_pairs(x, all_pairs, align, Fraction(keep))
    assert len(merged) == num_tokens - len(pairs)


def test_of_equally_similar_pairs_the_first_are_kept() -> None:
    x = torch.eye(6).repeat_interleave(2, dim=0)[[0, 2, 4, 1, 6, 3, 8, 5, 7, 9, 10, 11]]
    assert merge_tokens(x)[1].tolist() == [0, 1, 2, 0, 3, 1, 4, 2, 3, 4, 5, 5]
    assert merge_tokens(x, keep=0.5)[1].tolist() == [0, 1, 2, 0, 3, 1, 4, 2, 5, 6, 7, 8]
    assert merge_tokens(x, keep=0.51)[1].tolist() == [0, 1, 2, 0, 3, 1, 4, 2, 3, 5, 6, 7]
    assert merge_tokens(x, keep=0.51, align=5)[1].tolist() == [0, 1, 2, 0, 3, 1, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_means_are_those_of_all_patches(dtype: torch.dtype) -> None:
    patches = clustered(160, 16, seed=6).to(dtype)
    merged, merge_map = merge_tokens(patches, sizes=torch.ones(160))
    assert torch.equal(merged, merge_tokens(patches)[0])
    for _ in range(2):
        merged, step = merge_tokens(merged, keep=0.75, sizes=merge_map.bincount())
        merge_map = compose_maps(merge_map, step)
    tolerance = 8 * torch.finfo(dtype).eps
    for row, token in enumerate(merged):
        members = patches[merge_map == row].double()
        torch.testing.assert_close(token.double(), members.mean(dim=0), rtol=tolerance, atol=tolerance)
    assert merge_map.bincount().max() > 2


@pytest.mark.parametrize(("num_tokens", "align"), [(5, 7), (31, 16), (30, 32), (3, 1000)])
def test_nothing_merges_where_no_multiple_is_in_reach(num_tokens: int, align: int) -> None:
    x = clustered(num_tokens, 8, seed=4).float()
    assert num_tokens // align * align < len(merge_tokens(x)[0]) < num_tokens
    merged, merge_map = merge_tokens(x, align=align)
    assert torch.equal(merged, x)
    assert merge_map.tolist() == list(range(num_tokens))


def test_composed_maps_do_what_single_steps_do() -> None:
    x = clustered(100, 16, seed=5).float()
    merged, maps = x, []
    for _ in range(3):
        merged, merge_map = merge_tokens(merged)
        maps.append(merge_map)
    assert len(x) > len(maps[1]) > len(maps[2]) > len(merged)

    stepwise = merged
    for merge_map in reversed(maps):
        stepwise = reconstruct(stepwise, merge_map)
    composed = compose_maps(compose_maps(maps[0], maps[1]), maps[2])
    assert torch.equal(reconstruct(merged, composed), stepwise)
    assert torch.equal(compose_maps(maps[0], compose_maps(maps[1], maps[2])), composed)
    assert stepwise.shape == x.shape


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(2, 3, 4), r"torch\.float32 \[2, 3, 4\]"),
        (torch.zeros(5), r"torch\.float32 \[5\]"),
        (torch.zeros(5, 2, dtype=torch.int64), r"torch\.int64 \[5, 2\]"),
    ],
)
def test_refuses_what_is_no_matrix_of_floats(x: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^x: expected a floating-point matrix \[N, D\], got {got}$"):
        merge_tokens(x)


@pytest.mark.parametrize("align", [0, -2])
def test_refuses_align_below_one(align: int) -> None:
    with pytest.raises(ValueError, match=f"^align: expected an integer >= 1, got {align}$"):
        merge_tokens(torch.zeros(4, 2), align=align)


@pytest.mark.parametrize("keep", [0, -0.5, 1.001, 1e-7, math.nan])
def test_refuses_a_share_outside_of_0_to_1(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"^keep: expected a number in \(0, 1\], got {keep}$"):
        merge_tokens(torch.zeros(4, 2), keep=keep)


def test_refuses_sizes_of_other_tokens() -> None:
    with pytest.raises(ValueError, match=r"^sizes: expected one for each of 4 tokens, got \[5\]$"):
        merge_tokens(torch.zeros(4, 2), sizes=torch.ones(5))


def test_refuses_maps_that_do_not_fit() -> None:
    short, long = torch.tensor([0, 1, 1]), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"^second: expected at least 5 entries to compose with first, got 3$"):
        compose_maps(long, short)
    with pytest.raises(ValueError, match=r"^merge_map: expected values below 3, got 4$"):
        reconstruct(torch.zeros(3, 2), long)
    with pytest.raises(ValueError, match=r"^merge_map: expected values >= 0, got -1$"):
        reconstruct(torch.zeros(3, 2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"^first: expected an int64 vector, got torch\.int32 \[3\]$"):
        compose_maps(short.int(), short)
    with pytest.raises(ValueError, match=r"^second: expected an int64 vector, got torch\.int64 \[1, 3\]$"):
        compose_maps(short, short[None])
