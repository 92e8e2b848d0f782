"""Ragged batches without padding: rows of all sequences one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Sequences of different lengths in one matrix.

    Attributes:
        values: [T, D], the rows of sequence 0, then those of sequence 1, and so on.
        lengths: rows of each sequence; their sum is T.
        bounds: [B + 1] int32 on the device of the values, where each sequence starts, if that is there already.
    """

    values: Tensor
    lengths: tuple[int, ...]
    bounds: Tensor | None = None

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.values):
            raise ValueError(f"lengths: expected a sum of {len(self.values)}, got {sum(self.lengths)}")
        if self.bounds is not None and len(self.bounds) != len(self.lengths) + 1:
            raise ValueError(f"bounds: expected {len(self.lengths) + 1} of them, got {len(self.bounds)}")

    @classmethod
    def pack(cls, sequences: Sequence[Tensor]) -> "PackedTokens":
        """Join [L_b, D] sequences."""
        return cls(torch.cat(list(sequences)), tuple(len(s) for s in sequences))

    @classmethod
    def from_batch(cls, batch: Tensor) -> "PackedTokens":
        """View a [B, L, D] batch of equal lengths."""
        return cls(batch.flatten(0, 1), (batch.shape[1],) * batch.shape[0])

    @property
    def is_uniform(self) -> bool:
        return len(set(self.lengths)) <= 1

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32, where each sequence starts in `values`."""
        return bounds_of(self.lengths, self.values.device) if self.bounds is None else self.bounds

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    def split(self) -> tuple[Tensor, ...]:
        """The sequences as [L_b, D] views."""
        if len(self.lengths) == 1:
            return (self.values,)  # in a trace, a length would become a constant
        return self.values.split(self.lengths)

    def with_values(self, values: Tensor) -> "PackedTokens":
        """The same sequences with other rows."""
        return PackedTokens(values, self.lengths, self.bounds)

    def without_first(self, num_rows: int) -> "PackedTokens":
        """The same sequences less their first rows, in one operation.

        Raises:
            ValueError: a sequence is shorter.
        """
        if min(self.lengths, default=num_rows) < num_rows:
            raise ValueError(f"lengths: expected at least {num_rows}, got {min(self.lengths)}")
        lengths = tuple(length - num_rows for length in self.lengths)
        starts = self.cu_seqlens
        bounds = starts - num_rows * torch.arange(len(starts), dtype=torch.int32, device=starts.device)
        sequence, place = places(bounds, sum(lengths))
        return PackedTokens(self.values[starts[sequence] + num_rows + place], lengths, bounds)


def places(bounds: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which sequence each packed row belongs to, and its place there, both [num_rows] int64.

    Nothing here depends on lengths that the host knows: a captured graph gives what the bounds say when it runs.

    Args:
        bounds: [B + 1] int32; the last is num_rows.
        num_rows: T.
    """
    row = torch.arange(num_rows, dtype=torch.int32, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], row, right=True)
    return sequence, row - bounds[sequence].long()


@lru_cache(maxsize=256)  # every block of a stage asks for the same ones; a copy to a device takes longer than a kernel
def bounds_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B + 1] int32, where sequences of these lengths start. Shared: not to be written to."""
    starts = [0, *accumulate(lengths)]
    with torch.inference_mode(False):
        if device.type != "cuda":
            return torch.tensor(starts, dtype=torch.int32, device=device)
        # From pageable memory the host would wait for all work before the copy.
        return torch.tensor(starts, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
