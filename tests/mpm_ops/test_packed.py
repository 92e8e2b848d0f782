"""Packed sequences: nothing gets lost or mixed up between ragged, packed and batched."""

import pytest
import torch

from mpm_ops.packed import PackedTokens


def test_splits_into_what_was_packed() -> None:
    sequences = [torch.randn(length, 3) for length in (4, 1, 6)]
    packed = PackedTokens.pack(sequences)
    assert packed.values.shape == (11, 3)
    assert packed.lengths == (4, 1, 6)
    assert all(torch.equal(a, b) for a, b in zip(packed.split(), sequences, strict=True))


def test_a_batch_is_packed_without_a_copy() -> None:
    batch = torch.randn(3, 5, 2)
    packed = PackedTokens.from_batch(batch)
    assert packed.lengths == (5, 5, 5)
    assert packed.values.data_ptr() == batch.data_ptr()
    assert torch.equal(torch.stack(packed.split()), batch)


def test_bounds_are_what_varlen_kernels_take() -> None:
    packed = PackedTokens.pack([torch.randn(length, 2) for length in (4, 1, 6)])
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 11]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 6


@pytest.mark.parametrize(("lengths", "uniform"), [((3,), True), ((3, 3), True), ((3, 2, 3), False), ((), True)])
def test_knows_whether_lengths_are_equal(lengths: tuple[int, ...], uniform: bool) -> None:
    assert PackedTokens(torch.zeros(sum(lengths), 1), lengths).is_uniform is uniform


def test_other_rows_keep_the_lengths_and_must_fit_them() -> None:
    packed = PackedTokens(torch.zeros(5, 2), (2, 3))
    assert packed.with_values(torch.ones(5, 7)).lengths == (2, 3)
    with pytest.raises(ValueError, match=r"^lengths: expected a sum of 4, got 5$"):
        packed.with_values(torch.zeros(4, 2))
