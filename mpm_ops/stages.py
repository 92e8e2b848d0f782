"""A Segmenter cut at its schedule: what runs between two merges, and what travels from one to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .merge import compose_maps, merge_tokens
from .merge_cpu import can_merge_on_cpu, merge_tokens_cpu
from .merge_gpu import can_merge_on_gpu, launch_merge_gpu, packed_rows
from .packed import PackedTokens

if TYPE_CHECKING:
    from .merging import Merger


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of encoder blocks in which the token count of a window does not change.

    Attributes:
        index: 0 for the stage that starts with the patch embedding.
        parts: the halves of encoder blocks that it runs: 2 i is the attention of block i, 2 i + 1 its MLP.
        merger: what merges at its end; None for the last stage, which ends with the decoder.
        attention_counts: attention of its blocks counts each token as often as the patches it stands for.
        decoder_counts: the decoder does, if it is the last.
    """

    index: int
    parts: range
    merger: "Merger | None" = None
    attention_counts: bool = False
    decoder_counts: bool = True

    @property
    def merges(self) -> bool:
        return self.merger is not None

    @property
    def wants_keys(self) -> bool:
        """What merges compares the keys of its last attention."""
        return self.merger is not None and self.merger.wants_keys


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
        maps: int64, from the patches of each window to its image tokens, composed over all merges so far: [B, N],
            or one [N_b] per window where they differ in size; None before the first merge.
        grid: patches down and across, until windows merge or are grouped anew.
        keys: [T, Dh] mean over heads of the last attention's keys, where the stage was to give them; until they merge.
        windows: what tokens were embedded from, see `Segmenter.embed`, where the merger looks at it; until they merge.
    """

    tokens: PackedTokens
    maps: Tensor | tuple[Tensor, ...] | None = None
    grid: tuple[int, int] | None = None
    keys: Tensor | None = None
    windows: Tensor | None = None

    @property
    def merge_maps(self) -> tuple[Tensor, ...] | None:
        """The maps window by window."""
        return self.maps.unbind() if isinstance(self.maps, Tensor) else self.maps

    @classmethod
    def join(cls, windows: "Sequence[WindowBatch | WindowView]") -> "WindowBatch":
        """Group windows that stand at the same stage; a batch that goes on as it is costs nothing."""
        runs: list[tuple[WindowBatch, int, int]] = []  # neighbours stay together
        for window in windows:
            batch, start, stop = window.place
            if runs and runs[-1][0] is batch and runs[-1][2] == start:
                start = runs.pop()[1]
            runs.append((batch, start, stop))
        parts = [batch.part(start, stop) for batch, start, stop in runs]
        if len(parts) == 1:
            return parts[0]
        lengths = tuple(length for part in parts for length in part.tokens.lengths)
        tokens = PackedTokens(torch.cat([part.tokens.values for part in parts]), lengths)
        maps = [part.maps for part in parts if part.maps is not None]
        assert len(maps) in (0, len(parts)), "windows stand at different stages"
        if not maps:
            return cls(tokens)
        matrices = [m for m in maps if isinstance(m, Tensor)]
        if len(matrices) == len(maps) and len({m.shape[1] for m in matrices}) == 1:
            return cls(tokens, torch.cat(matrices))
        return cls(tokens, tuple(row for m in maps for row in m))

    @property
    def place(self) -> "tuple[WindowBatch, int, int]":
        return self, 0, len(self.tokens.lengths)

    def part(self, start: int, stop: int) -> "WindowBatch":
        """Windows start to stop - 1, as views."""
        lengths = self.tokens.lengths
        if stop - start == len(lengths):
            return self
        first, own = sum(lengths[:start]), lengths[start:stop]
        tokens = PackedTokens(self.tokens.values[first : first + sum(own)], own)
        return WindowBatch(tokens, None if self.maps is None else self.maps[start:stop])

    def sizes(self, num_special: int) -> Tensor | None:
        """[T] float32, how many patches each token stands for, 1 for special tokens; None before a merge."""
        if self.maps is None:
            return None
        starts = self.tokens.cu_seqlens[: len(self.maps)] + num_special
        rows = packed_rows(self.maps, starts).clamp_(max=len(self.tokens.values) - 1)  # see `extended`
        sizes = torch.zeros(len(self.tokens.values), device=rows.device)
        return sizes.scatter_add_(0, rows, torch.ones(rows.shape, device=rows.device)).clamp_(min=1)

    def log_sizes(self, num_special: int) -> Tensor | None:
        """The logarithm of `sizes`."""
        sizes = self.sizes(num_special)
        return None if sizes is None else sizes.log_()

    def with_tokens(self, tokens: PackedTokens) -> "WindowBatch":
        """The same windows with other tokens."""
        return replace(self, tokens=tokens)

    def split(self) -> "list[WindowView]":
        """The windows one by one."""
        return [WindowView(self, i) for i in range(len(self.tokens.lengths))]

    def merged(self, *, num_special: int, align: int = 1, keep: float = 1, weighted: bool = False) -> "WindowBatch":
        """Merge the image tokens of every window and extend its map.

        Args:
            num_special: special tokens of each window, left as they are.
            align, keep: see `merge_tokens`.
            weighted: means are weighted by `sizes`.
        """
        return self.merging(num_special=num_special, align=align, keep=keep, weighted=weighted)()

    def merging(self, *, num_special: int, align: int, keep: float, weighted: bool) -> Callable[[], "WindowBatch"]:
        """Launch `merged`; the call that is returned gives its result, and waits for it where a GPU merges."""
        sizes = self.sizes(num_special) if weighted else None
        if can_merge_on_gpu(self.tokens.values):
            merging, merge_map = launch_merge_gpu(
                self.tokens, num_special=num_special, align=align, keep=keep, sizes=sizes
            )
            longer = extended(self.maps, merge_map, self.tokens, num_special)
            return lambda: WindowBatch(merging(), longer)
        merge = merge_tokens_cpu if can_merge_on_cpu(self.tokens.values) else merge_tokens
        sequences, maps, before = [], [], self.merge_maps
        counts = [None] * len(self.tokens.lengths) if sizes is None else sizes.split(self.tokens.lengths)
        for i, sequence in enumerate(self.tokens.split()):
            special, image = sequence[:num_special], sequence[num_special:]
            own = counts[i]
            image, merge_map = merge(image, align=align, keep=keep, sizes=None if own is None else own[num_special:])
            sequences.append(torch.cat([special, image]))
            maps.append(merge_map if before is None else compose_maps(before[i], merge_map))
        longer = torch.stack(maps) if len({len(m) for m in maps}) == 1 else tuple(maps)
        merged = WindowBatch(PackedTokens.pack(sequences), longer)
        return lambda: merged


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the last stage gives.

    Attributes:
        logits: float32 [B, N, K], of every patch.
        is_finite: bool [B], whether all logits of a window are.
    """

    logits: Tensor
    is_finite: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Decoded":
        return cls(logits, logits.isfinite().flatten(1).all(dim=1))


@dataclass(frozen=True, slots=True)
class WindowView:
    """One window of a batch; nothing is computed before it is asked for.

    Attributes:
        batch: it is part of.
        index: its place there.
    """

    batch: WindowBatch
    index: int

    @property
    def place(self) -> tuple[WindowBatch, int, int]:
        return self.batch, self.index, self.index + 1

    @property
    def length(self) -> int:
        """Tokens, special ones included."""
        return self.batch.tokens.lengths[self.index]

    @property
    def tokens(self) -> PackedTokens:
        return self.batch.part(self.index, self.index + 1).tokens

    @property
    def merge_maps(self) -> tuple[Tensor, ...] | None:
        return self.batch.part(self.index, self.index + 1).merge_maps


def extended(
    maps: Tensor | tuple[Tensor, ...] | None, merge_map: Tensor, tokens: PackedTokens, num_special: int
) -> Tensor | tuple[Tensor, ...]:
    """Maps of windows after one more merge, computed on the device from where its sequences start.

    Args:
        maps: see `WindowBatch`; of the first sequences, if there are more.
        merge_map: [T] int64, see `merge_packed`.
        tokens: as they were before this merge.
        num_special: special tokens of each.
    """
    if maps is None:
        if tokens.is_uniform:
            return merge_map.view(len(tokens.lengths), -1)[:, num_special:]
        return tuple(part[num_special:] for part in merge_map.split(tokens.lengths))
    rows = packed_rows(maps, tokens.cu_seqlens[: len(maps)] + num_special).clamp_(max=len(merge_map) - 1)
    found = merge_map[rows]
    return found.view_as(maps) if isinstance(maps, Tensor) else found.split([len(m) for m in maps])
