"""Mutual Pair Merging: Algorithm 1 of the paper in plain torch, one image at a time, and what we add to it.

This file is the specification. Faster implementations are held against it. With the defaults of `align`, `keep` and
`sizes` it is the paper's method and nothing else.
Source: MPM (arXiv 2604.05718), Algorithm 1 and section 3.4.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_STEPS = 1_000_000  # `keep` is rounded to so many parts, so that every implementation counts in integers


def merge_tokens(x: Tensor, *, align: int = 1, keep: float = 1, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average mutually nearest token pairs of one image.

    Two tokens merge when each is the other's most similar token by cosine similarity (ties go to
    the lowest index). Similarity is computed in float32, or in float64 for float64 tokens, whatever
    the precision of the network. A zero token has similarity 0 to every other; a token with a
    non-finite value never merges and passes through unchanged. Norms below 1e-12 or above 1e19 leave
    the range in which float32 cosines are exact.

    Args:
        x: [N, D] float tokens, special tokens excluded.
        align: merge only the most similar pairs, so that M is a multiple of it; 1 merges all.
            Nothing merges where no multiple lies between the fully merged length and N.
        keep: share of the mutual pairs that merges, in (0, 1], the most similar ones: `num_kept` of them. Of pairs
            of equal similarity, those whose first token comes first. `align` then leaves out further ones.
        sizes: [N], how many patches each token stands for: means are weighted by them. None for plain means.

    Returns:
        merged [M, D] in the dtype of x, and merge_map [N] int64, the row of `merged` that stands
        for each token. Rows keep the order of each pair's first token.

    Raises:
        ValueError: x is not a floating-point matrix, align < 1, keep is not in (0, 1], or sizes does not fit x.

    Source: MPM, Algorithm 1 (arXiv 2604.05718); `align` and `keep` are ours, means weighted by sizes are ToMe's.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point matrix [N, D], got {x.dtype} {list(x.shape)}")
    check_choice(x, align, keep, sizes)
    work = x if x.dtype == torch.float64 else x.float()
    first, second = _mutual_pairs(work, align, keep)

    index = torch.arange(len(x), device=x.device)
    partner = index.clone()
    partner[first] = second
    representative = index.clone()
    representative[second] = first

    kept = representative == index
    merge_map = (kept.cumsum(0) - 1)[representative]
    share = work.new_full((), 0.5) if sizes is None else _shares(sizes.to(work.dtype), partner)[kept, None]
    merged = share * work[kept] + (1 - share) * work[partner[kept]]  # a singleton is its own partner
    return merged.to(x.dtype), merge_map


def num_kept(num_pairs: int, keep: float) -> int:
    """How many of the mutual pairs merge: their number times keep, rounded up, with keep in millionths."""
    return -(-num_pairs * keep_steps(keep) // KEEP_STEPS)


def keep_steps(keep: float) -> int:
    """keep in units of 1 / KEEP_STEPS.

    Raises:
        ValueError: keep is not in (0, 1], or rounds to 0.
    """
    steps = round(keep * KEEP_STEPS) if 0 < keep <= 1 else 0
    if steps < 1:
        raise ValueError(f"keep: expected a number in (0, 1], got {keep}")
    return steps


def check_choice(x: Tensor, align: int, keep: float, sizes: Tensor | None) -> None:
    """Refuse what says how the tokens x merge.

    Raises:
        ValueError: see `merge_tokens`.
    """
    if align < 1:
        raise ValueError(f"align: expected an integer >= 1, got {align}")
    keep_steps(keep)
    if sizes is not None and sizes.shape != x.shape[:1]:
        raise ValueError(f"sizes: expected one for each of {len(x)} tokens, got {list(sizes.shape)}")


def _shares(sizes: Tensor, partner: Tensor) -> Tensor:
    """[N], the weight of each token in the mean with its partner."""
    return sizes / (sizes + sizes[partner])


def compose_maps(first: Tensor, second: Tensor) -> Tensor:
    """Chain two merge maps: the one map that does what `first` and then `second` did.

    Args:
        first: [N] int64 with values in 0..M-1, from the earlier merge.
        second: [M] int64, from the merge of what the first one left.

    Returns:
        [N] int64, where each original token ended up.

    Raises:
        ValueError: a map is not an int64 vector, or `first` points outside `second`.

    Source: MPM, section 3.4, r*(i) = r2(r1(i)).
    """
    _check_map("first", first)
    _check_map("second", second)
    if len(first) and int(first.max()) >= len(second):
        raise ValueError(
            f"second: expected at least {int(first.max()) + 1} entries to compose with first, got {len(second)}"
        )
    return second[first]


def reconstruct(merged: Tensor, merge_map: Tensor) -> Tensor:
    """Copy every merged token back to the places it stands for.

    Args:
        merged: [M, D] tokens, or anything with one row per merged token, such as [M, K] logits.
        merge_map: [N] int64 with values in 0..M-1.

    Returns:
        [N, D], in the original order of the tokens.

    Raises:
        ValueError: merge_map is not an int64 vector, or points outside merged.

    Source: MPM, section 3.4.
    """
    _check_map("merge_map", merge_map)
    if len(merge_map) and int(merge_map.max()) >= len(merged):
        raise ValueError(f"merge_map: expected values below {len(merged)}, got {int(merge_map.max())}")
    return merged[merge_map]


def _mutual_pairs(x: Tensor, align: int, keep: float) -> tuple[Tensor, Tensor]:
    """First and second indices of the pairs to merge, first < second."""
    num_tokens = len(x)
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    if num_tokens < 2:
        return none, none

    finite = x.isfinite().all(dim=1)
    unit = F.normalize(torch.where(finite[:, None], x, 0.0), dim=1)
    similarity = _cosines(unit)
    similarity.fill_diagonal_(-torch.inf)
    similarity[:, ~finite] = -torch.inf

    best, nearest = similarity.max(dim=1)
    index = torch.arange(num_tokens, device=x.device)
    mutual = (nearest[nearest] == index) & finite & finite[nearest] & (index < nearest)
    first = index[mutual]

    num_pairs = num_kept(len(first), keep)
    if align > 1:
        aligned_length = -(-(num_tokens - num_pairs) // align) * align
        num_pairs = max(num_tokens - aligned_length, 0)
    if num_pairs < len(first):
        first = first[best[first].sort(descending=True, stable=True).indices[:num_pairs]]
    return first, nearest[first]


def _cosines(unit: Tensor) -> Tensor:
    """[N, N] products of unit rows, exactly equal for equal rows: a GEMM may round them by their position."""
    with full_precision(unit.device.type):
        leading = unit[:, :1].sort(dim=0).values
        if not (leading[1:] == leading[:-1]).any():  # cheap proof that no two rows are equal
            return unit @ unit.T
        distinct, row = unit.unique(dim=0, return_inverse=True)
        return (distinct @ distinct.T)[row][:, row]


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Multiply float32 as float32: no autocast, and no TF32 or bfloat16 as `set_float32_matmul_precision` allows."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device_type, enabled=False):
        if before == "highest":  # the usual case; the setting is one for all threads
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _check_map(name: str, merge_map: Tensor) -> None:
    if merge_map.ndim != 1 or merge_map.dtype != torch.int64:
        raise ValueError(f"{name}: expected an int64 vector, got {merge_map.dtype} {list(merge_map.shape)}")
    if len(merge_map) and int(merge_map.min()) < 0:
        raise ValueError(f"{name}: expected values >= 0, got {int(merge_map.min())}")
