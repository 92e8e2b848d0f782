"""Mutual Pair Merging before the blocks of a schedule, and no merging."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from mpm_ops.stages import WindowBatch

from .base import Merger, parameter


@dataclass(frozen=True, kw_only=True)
class Mpm(Merger):
    """Mutually nearest tokens merge, see `merge_tokens`.

    Attributes:
        schedule: blocks before which tokens merge, strictly increasing.
        align: see `merge_tokens`.

    Raises:
        ValueError: the schedule does not fit the encoder, or align < 1.

    Source: MPM (arXiv 2604.05718).
    """

    name: ClassVar[str] = "mpm"
    schedule: tuple[int, ...] = parameter(int, ())
    align: int = parameter(int, 1)

    def __post_init__(self) -> None:
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align: expected an integer >= 1, got {self.align!r}")
        super().__post_init__()

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(2 * block for block in self.schedule)

    def __str__(self) -> str:
        return super().__str__() if self.schedule else NoMerging.name

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        return batch.merging(num_special=self.tower.num_special, align=self.align)


@dataclass(frozen=True, kw_only=True)
class NoMerging(Merger):
    """The whole encoder is one stage."""

    name: ClassVar[str] = "none"

    @property
    def cuts(self) -> tuple[int, ...]:
        return ()

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        return lambda: batch
