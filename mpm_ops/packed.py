"""Ragged batches without padding: rows of all sequences one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Sequences of different lengths in one matrix.

    Attributes:
        values: [T, D], the rows of sequence 0, then those of sequence 1, and so on.
        lengths: rows of each sequence; their sum is T.
    """

    values: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.values):
            raise ValueError(f"lengths: expected a sum of {len(self.values)}, got {sum(self.lengths)}")

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
        return bounds_of(self.lengths, self.values.device)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    def split(self) -> tuple[Tensor, ...]:
        """The sequences as [L_b, D] views."""
        return self.values.split(self.lengths)

    def padded(self) -> tuple["PackedTokens", Tensor]:
        """Zero rows up to the longest sequence, and a [B * max_seqlen] key bias that hides them from attention."""
        longest = self.max_seqlen
        rows = [F.pad(sequence, (0, 0, 0, longest - len(sequence))) for sequence in self.split()]
        bias = self.values.new_zeros(len(rows), longest)
        for i, length in enumerate(self.lengths):
            bias[i, length:] = -torch.inf
        return PackedTokens(torch.cat(rows), (longest,) * len(rows)), bias.flatten()

    def unpadded(self, lengths: tuple[int, ...]) -> "PackedTokens":
        """The first rows of each sequence: undoes `padded`."""
        return PackedTokens.pack([s[:length] for s, length in zip(self.split(), lengths, strict=True)])

    def with_values(self, values: Tensor) -> "PackedTokens":
        """The same sequences with other rows."""
        return PackedTokens(values, self.lengths)


@lru_cache(maxsize=256)  # every block of a stage asks for the same ones; a copy to a device takes longer than a kernel
def bounds_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[B + 1] int32, where sequences of these lengths start. Shared: not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
