"""Mutual Pair Merging before the blocks of a schedule, and no merging."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from mpm_ops.merge import keep_steps, num_kept
from mpm_ops.stages import WindowBatch

from .base import Merger, flag, parameter


@dataclass(frozen=True, kw_only=True)
class Mpm(Merger):
    """Mutually nearest tokens merge, see `merge_tokens`: as in the paper where only the schedule is given.

    Attributes:
        schedule: blocks before which tokens merge, strictly increasing.
        align, keep: see `merge_tokens`.
        weighted: means are weighted by the patches that tokens stand for.
        proportional: attention after the first merge counts each token as often as the patches it stands for.

    Raises:
        ValueError: the schedule does not fit the encoder, align < 1, or keep is not in (0, 1].

    Source: MPM (arXiv 2604.05718); weighted means and proportional attention are ToMe's (arXiv 2210.09461).
    """

    name: ClassVar[str] = "mpm"
    schedule: tuple[int, ...] = parameter(int, ())
    align: int = parameter(int, 1)
    keep: float = parameter(float, 1.0)
    weighted: bool = flag()
    proportional: bool = flag()

    def __post_init__(self) -> None:
        keep_steps(self.keep)
        if type(self.align) is not int or self.align < 1:
            raise ValueError(f"align: expected an integer >= 1, got {self.align!r}")
        super().__post_init__()

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(2 * block for block in self.schedule)

    @property
    def attention_counts(self) -> bool:
        return self.proportional

    def lengths_after(self, number: int) -> range:
        return range(number - num_kept(number // 2, self.keep), number + 1)

    def __str__(self) -> str:
        return super().__str__() if self.schedule else NoMerging.name

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        return batch.merging(
            num_special=self.tower.num_special, align=self.align, keep=self.keep, weighted=self.weighted
        )


@dataclass(frozen=True, kw_only=True)
class NoMerging(Merger):
    """The whole encoder is one stage."""

    name: ClassVar[str] = "none"

    @property
    def cuts(self) -> tuple[int, ...]:
        return ()

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        return lambda: batch
