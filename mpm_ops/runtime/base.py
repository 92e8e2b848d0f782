"""What every runtime is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from mpm_ops.stages import Decoded, Stage, WindowBatch

if TYPE_CHECKING:
    from mpm_ops.merging import Merger
    from mpm_ops.segmenter import Segmenter

PRECISIONS = ("fp32", "bf16", "fp16")


class Runtime(ABC):
    """Runs the stages of a network.

    Attributes:
        name: its key in RUNTIMES.
        precision: one of PRECISIONS. Similarity is computed in float32 all the same.
        padding_tokens: computed for padding alone, in all launches so far.
        streams: this runtime on an equal part of the device's cores each. They run beside each other, each in one
            thread at a time, and give the bytes that this one gives; empty where there are none.
    """

    name: ClassVar[str]
    precision: str
    padding_tokens: int = 0
    streams: "Sequence[Runtime]" = ()

    @classmethod
    @abstractmethod
    def obstacle(cls, model: "Segmenter") -> str | None:
        """Why it can't run this model here, or None."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        model: "Segmenter",
        precision: str,
        *,
        mergers: Sequence["Merger"],
        graph_bytes: int = 0,
        threads: int = 0,
        streams: int | str = 1,
    ) -> "Runtime":
        """See `make_runtime`; precision and streams may be "auto".

        Raises:
            ValueError: the precision, graphs or streams can't run here.
        """

    @abstractmethod
    def run(self, stage: Stage, given: Tensor | WindowBatch) -> WindowBatch | Decoded:
        """Run all of a stage but its merge.

        Args:
            stage: of a merger's `stages`.
            given: windows for the first stage, see `Segmenter.embed`; what the merge before gave for others.
        """

    def bucket(self, length: int) -> int:
        """The length that a window of this length, special tokens included, is computed as."""
        return length

    def warm_up(self, mergers: "Sequence[Merger]") -> None:  # noqa: B027
        """Prepare what mergers need for windows of the checkpoint's size, where that would be done when first met."""

    def launch(
        self, stage: Stage, given: Tensor | WindowBatch, *, before_merge: Callable[[], None] = lambda: None
    ) -> Callable[[], WindowBatch] | Decoded:
        """Launch a stage and its merge; see `Segmenter.launch`."""
        if isinstance(given, WindowBatch):
            self.padding_tokens += sum(self.bucket(length) - length for length in given.tokens.lengths)
        done = self.run(stage, given)
        if isinstance(done, Decoded):
            return done
        assert stage.merger is not None
        before_merge()
        return stage.merger.launch(done)
