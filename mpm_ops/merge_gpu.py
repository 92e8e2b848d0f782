"""Mutual Pair Merging on a GPU: all windows of a batch in five kernels and one wait."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .kernels import has_triton
from .packed import PackedTokens, bounds_of
from .transfers import fetch


def can_merge_on_gpu(x: Tensor) -> bool:
    """Whether `merge_windows_gpu` takes these tokens; gradients and float64 need `merge_tokens`."""
    if not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()) or not has_triton():
        return False
    from .kernels.nearest import DTYPES

    return x.dtype in DTYPES


def merge_windows_gpu(
    tokens: PackedTokens, *, num_special: int, align: int = 1, keep: float = 1, sizes: Tensor | None = None
) -> tuple[PackedTokens, Tensor]:
    """Do what `merge_tokens` does to the image tokens of every sequence, and choose the same pairs.

    Pairs may differ where two cosines are closer than float32 rounding (1e-6). Waits for the device once, to
    learn the new lengths; see `launch_merge_gpu` for doing other things first.

    Args:
        tokens: float32, bfloat16 or float16 sequences, special tokens first.
        num_special: special tokens of each sequence, left as they are.
        align, keep: see `merge_tokens`.
        sizes: [T], see `merge_tokens`; those of special tokens may be anything.

    Returns:
        The shorter sequences, and [T] int64: of each token the row that stands for it, image and special
        tokens counted apart, each from 0 in its sequence.

    Raises:
        ValueError: a sequence lacks its special tokens, the tokens have another type, or as `merge_tokens`.
    """
    merged, merge_map = launch_merge_gpu(tokens, num_special=num_special, align=align, keep=keep, sizes=sizes)
    return merged(), merge_map


def launch_merge_gpu(
    tokens: PackedTokens, *, num_special: int, align: int = 1, keep: float = 1, sizes: Tensor | None = None
) -> tuple[Callable[[], PackedTokens], Tensor]:
    """Launch `merge_windows_gpu` and wait for nothing; what gives the shorter sequences waits for their lengths."""
    from .kernels.merging import merge_packed

    if min(tokens.lengths, default=num_special) < num_special:
        raise ValueError(f"tokens: expected at least {num_special} a sequence, got {min(tokens.lengths)}")
    values = tokens.values.detach().contiguous()
    merged, merge_map, bounds = merge_packed(
        values, tokens.cu_seqlens, tokens.max_seqlen, num_special, align, keep, sizes
    )
    arriving = fetch(bounds)

    def wait() -> PackedTokens:
        starts = arriving().tolist()
        lengths = tuple(stop - start for start, stop in pairwise(starts))
        return PackedTokens(merged[: starts[-1]], lengths, bounds)

    return wait, merge_map


def packed_rows(maps: Tensor | Sequence[Tensor], starts: Tensor) -> Tensor:
    """Join maps into sequences into one map into their packed rows, without waiting for the device.

    Args:
        maps: one [N_b] int64 per sequence with rows counted from its own start; [B, N] where all are of one length.
        starts: [B], the first packed row of each sequence.

    Returns:
        [sum of N_b] int64.
    """
    starts = starts.long()
    if isinstance(maps, Tensor):
        return (maps + starts[:, None]).flatten()
    counts = bounds_of(tuple(len(m) for m in maps), starts.device).diff()
    return torch.cat(list(maps)) + starts.repeat_interleave(counts, output_size=sum(len(m) for m in maps))


def image_starts(cu_seqlens: Tensor, num_special: int) -> Tensor:
    """[B + 1] int32, where sequences start among the image tokens of all."""
    return cu_seqlens - num_special * torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
