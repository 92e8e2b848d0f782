"""What every merger is, and the encoder that it merges in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar

from mpm_ops.stages import Stage, WindowBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What a merger has to know of an encoder: its blocks, the width of its tokens, and its special tokens."""

    num_blocks: int
    width: int
    num_special: int


@dataclass(frozen=True, kw_only=True)
class Merger(ABC):
    """Merges tokens at the cuts of an encoder. Fields made by `parameter` are what its text may set.

    Attributes:
        name: its key in MERGERS.
        wants_keys: it compares the mean over heads of the keys of the attention before each cut.
        decoder_counts: attention of the decoder counts each token as often as the patches it stands for.
        tower: the encoder.
    """

    name: ClassVar[str]
    wants_keys: ClassVar[bool] = False
    decoder_counts: ClassVar[bool] = True
    tower: Tower

    def __post_init__(self) -> None:
        _check_cuts(self.cuts, self.tower.num_blocks)

    @property
    @abstractmethod
    def cuts(self) -> tuple[int, ...]:
        """Where it merges, in half blocks: 2 i before block i, 2 i + 1 between that block's attention and its MLP."""

    @property
    def attention_counts(self) -> bool:
        """Attention of the encoder counts each token as often as the patches it stands for."""
        return False

    @abstractmethod
    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        """Merge the windows of a stage's output; the call that is returned waits for the device.

        Windows merge independently of their mates. Special tokens stay in front and are never merged.
        """

    def lengths_after(self, number: int) -> range:
        """How many image tokens may be left of so many after one merge."""
        return range(number - number // 2, number + 1)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The encoder, cut where it merges."""
        bounds = [0, *self.cuts, 2 * self.tower.num_blocks]
        return tuple(
            Stage(
                index=i,
                parts=range(start, stop),
                merger=self if i < len(self.cuts) else None,
                attention_counts=self.attention_counts and i > 0,
                decoder_counts=self.decoder_counts,
            )
            for i, (start, stop) in enumerate(pairwise(bounds))
        )

    def __str__(self) -> str:
        """As `make_merger` reads it, parameters that are None or their defaults left out."""
        told = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if "parse" not in entry.metadata or value == entry.default:
                continue
            if entry.name == "schedule":
                told.append(",".join(map(str, value)))
            else:
                told.append(entry.name if entry.metadata["parse"] is bool else f"{entry.name}={value}")
        return ":".join([self.name, ",".join(told)]) if told else self.name


def parameter(parse: Callable[[str], Any], default: Any) -> Any:
    """A field that a merger's text sets; `parse` reads its value, or one item of a schedule."""
    return field(default=default, metadata={"parse": parse})


def flag() -> Any:
    """A field that is False unless a merger's text has its name."""
    return parameter(bool, False)


def _check_cuts(cuts: Sequence[int], num_blocks: int) -> None:
    blocks = tuple(cut // 2 for cut in cuts)
    if any(not 0 <= block < num_blocks for block in blocks) or list(blocks) != sorted(set(blocks)):
        raise ValueError(
            f"schedule: expected strictly increasing block numbers within 0..{num_blocks - 1}, got {blocks}"
        )
