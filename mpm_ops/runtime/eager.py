"""Stages on torch, one operator after the other: runs everywhere, and is what other runtimes are held against."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpm_ops.attention import use_attention
from mpm_ops.stages import Stage, WindowBatch

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """The modules of a Segmenter: its own in fp32, a copy of them in half precision.

    Args:
        model: whose weights are run.
        precision: a key of DTYPES.
        padded: see `Segmenter.run_blocks`.
        attention: what attention is to run on, see `use_attention`; None leaves it as the model has it.
    """

    name = "torch"

    def __init__(
        self, model: "Segmenter", precision: str = "fp32", *, padded: bool = False, attention: str | None = None
    ) -> None:
        self.precision = precision
        self._padded = padded
        self._model = self._network = model
        if precision != "fp32":
            self._network = copy.deepcopy(model).to(DTYPES[precision])
        elif attention:  # modules of its own around the same weights: other runtimes keep their attention
            shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
            self._network = copy.deepcopy(model, shared)
        if attention:
            use_attention(self._network, attention)

    def bucket(self, length: int) -> int:
        return length  # windows are packed

    def embed(self, windows: Tensor) -> WindowBatch:
        """See `Segmenter.embed`; on a GPU in this precision."""
        return (self._network if windows.is_cuda else self._model).embed(windows)

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        return self._network.run_blocks(stage, self._in_precision(stage, batch), padded=self._padded)

    def _in_precision(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        """What the model embedded in its own precision, in this one."""
        if self.precision == "fp32" or stage.index:
            return batch
        return batch.with_tokens(batch.tokens.with_values(batch.tokens.values.to(DTYPES[self.precision])))

    def decode(self, batch: WindowBatch) -> Tensor:
        logits = self._network.decode(batch)
        return logits if self.precision == "fp32" else logits.float()
