"""A Segmenter cut at its schedule: what runs between two merges, and what travels from one to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .merge import compose_maps, merge_tokens
from .merge_cpu import can_merge_on_cpu, merge_tokens_cpu
from .merge_gpu import can_merge_on_gpu, launch_merge_gpu, packed_rows
from .packed import PackedTokens


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of encoder blocks in which the token count of a window does not change.

    Attributes:
        index: 0 for the stage that starts with the patch embedding.
        blocks: the encoder blocks it runs.
        merges: it ends with a merge; the last stage ends with the decoder instead.
    """

    index: int
    blocks: range
    merges: bool


def cut_stages(n_layers: int, schedule: Sequence[int]) -> tuple[Stage, ...]:
    """Cut an encoder before each block of the schedule; (2, 5) gives blocks 0-1, 2-4 and 5 to the end.

    Raises:
        ValueError: the schedule is not strictly increasing within 0..n_layers-1.
    """
    if any(not 0 <= block < n_layers for block in schedule) or list(schedule) != sorted(set(schedule)):
        raise ValueError(
            f"schedule: expected strictly increasing block numbers within 0..{n_layers - 1}, got {tuple(schedule)}"
        )
    bounds = [0, *schedule, n_layers]
    return tuple(
        Stage(index=i, blocks=range(start, stop), merges=i < len(schedule))
        for i, (start, stop) in enumerate(pairwise(bounds))
    )


def parse_schedule(text: str) -> tuple[int, ...]:
    """A schedule as people write it: '2,5' -> (2, 5), 'off' -> ().

    Raises:
        ValueError: the text is neither.
    """
    if text == "off":
        return ()
    try:
        return tuple(int(block) for block in text.split(","))
    except ValueError:
        raise ValueError(f"schedule: expected block numbers such as 2,5, or off, got {text!r}") from None


def format_schedule(schedule: Sequence[int]) -> str:
    """A schedule as people write it: (2, 5) -> '2,5', () -> 'off'."""
    return ",".join(map(str, schedule)) or "off"


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows on their way through the encoder.

    Attributes:
        tokens: packed tokens of each window, special tokens first.
        merge_maps: one [N] int64 map per window from its patches to its image tokens, composed over
            all merges so far; None before the first.
    """

    tokens: PackedTokens
    merge_maps: tuple[Tensor, ...] | None = None

    @classmethod
    def join(cls, batches: Sequence["WindowBatch"]) -> "WindowBatch":
        """Group windows that stand at the same stage."""
        tokens = PackedTokens.pack([sequence for batch in batches for sequence in batch.tokens.split()])
        maps = [batch.merge_maps for batch in batches]
        if any(m is None for m in maps):
            assert all(m is None for m in maps), "windows stand at different stages"
            return cls(tokens)
        return cls(tokens, tuple(merge_map for m in maps if m is not None for merge_map in m))

    def with_tokens(self, tokens: PackedTokens) -> "WindowBatch":
        """The same windows with other tokens."""
        return WindowBatch(tokens, self.merge_maps)

    def split(self) -> list["WindowBatch"]:
        """The windows one by one."""
        maps = [None] * len(self.tokens.lengths) if self.merge_maps is None else [(m,) for m in self.merge_maps]
        return [
            WindowBatch(PackedTokens(sequence, (len(sequence),)), merge_map)
            for sequence, merge_map in zip(self.tokens.split(), maps, strict=True)
        ]

    def merged(self, *, num_special: int, align: int) -> "WindowBatch":
        """Merge the image tokens of every window and extend its map."""
        return self.merging(num_special=num_special, align=align)()

    def merging(self, *, num_special: int, align: int) -> Callable[[], "WindowBatch"]:
        """Launch `merged`; the call that is returned gives its result, and waits for it where a GPU merges."""
        if can_merge_on_gpu(self.tokens.values):
            return self._merging_together(num_special, align)
        merge = merge_tokens_cpu if can_merge_on_cpu(self.tokens.values) else merge_tokens
        sequences, maps = [], []
        for i, sequence in enumerate(self.tokens.split()):
            special, image = sequence[:num_special], sequence[num_special:]
            image, merge_map = merge(image, align=align)
            sequences.append(torch.cat([special, image]))
            maps.append(merge_map if self.merge_maps is None else compose_maps(self.merge_maps[i], merge_map))
        merged = WindowBatch(PackedTokens.pack(sequences), tuple(maps))
        return lambda: merged

    def _merging_together(self, num_special: int, align: int) -> Callable[[], "WindowBatch"]:
        merging, merge_map = launch_merge_gpu(self.tokens, num_special=num_special, align=align)
        maps = tuple(part[num_special:] for part in merge_map.split(self.tokens.lengths))
        if self.merge_maps is not None:
            image_lengths = [length - num_special for length in self.tokens.lengths]
            composed = torch.cat(maps)[packed_rows(self.merge_maps, image_lengths)]
            maps = composed.split([len(m) for m in self.merge_maps])
        return lambda: WindowBatch(merging(), maps)
