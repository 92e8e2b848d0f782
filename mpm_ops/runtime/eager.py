"""Stages on torch, one operator after the other: runs everywhere, and is what other runtimes are held against."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpm_ops.attention import check_blocks, use_attention
from mpm_ops.stages import Decoded, Stage, WindowBatch

from .base import Runtime

if TYPE_CHECKING:
    from mpm_ops.merging import Merger
    from mpm_ops.segmenter import Segmenter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime(Runtime):
    """The modules of a Segmenter: its own in fp32, a copy of them in half precision.

    Args:
        model: whose weights are run.
        precision: a key of DTYPES.
        attention: what attention is to run on, see `use_attention`; None leaves it as the model has it.

    Raises:
        ValueError: a block has something that would be left out, see `check_blocks`.
    """

    name = "torch"

    def __init__(self, model: "Segmenter", precision: str = "fp32", *, attention: str | None = None) -> None:
        check_blocks(model)
        self.precision = precision
        self._model = self._network = model
        if precision != "fp32":
            self._network = copy.deepcopy(model).to(DTYPES[precision])
        elif attention:  # other runtimes keep their attention
            self._network = with_same_weights(model)
        if attention:
            use_attention(self._network, attention)

    @classmethod
    def obstacle(cls, model: "Segmenter") -> str | None:
        return None

    @classmethod
    def build(
        cls,
        model: "Segmenter",
        precision: str,
        *,
        mergers: Sequence["Merger"],
        graph_bytes: int = 0,
        threads: int = 0,
        streams: int | str = 1,
    ) -> "TorchRuntime":
        if streams not in ("auto", 1):
            raise ValueError(f"streams: expected auto or 1 with runtime torch, which has none, got {streams}")
        on_cpu = model.encoder.pos_embed.device.type == "cpu"
        if precision == "auto":
            if on_cpu:  # emulated elsewhere, and far slower
                native = torch.cpu._is_avx512_bf16_supported()
            else:
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native else "fp32"
        if not graph_bytes:
            return cls(model, precision, attention=None if on_cpu else "auto")
        from .graphs import GraphRuntime

        if on_cpu:
            raise ValueError("graph_bytes: graphs are captured on a GPU, expected 0 here (graph_mib)")
        return GraphRuntime(model, precision, budget_bytes=graph_bytes)

    def run(self, stage: Stage, given: Tensor | WindowBatch) -> WindowBatch | Decoded:
        batch = self.run_blocks(stage, self.embed(given) if isinstance(given, Tensor) else given)
        return batch if stage.merges else Decoded.of(self.decode(batch, counts=stage.decoder_counts))

    def embed(self, windows: Tensor) -> WindowBatch:
        """See `Segmenter.embed`; on a GPU in this precision."""
        return (self._network if windows.is_cuda else self._model).embed(windows)

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        """See `Segmenter.run_blocks`."""
        return self._network.run_blocks(stage, self._in_precision(stage, batch))

    def _in_precision(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        """What the model embedded in its own precision, in this one."""
        if self.precision == "fp32" or stage.index:
            return batch
        return batch.with_tokens(batch.tokens.with_values(batch.tokens.values.to(DTYPES[self.precision])))

    def decode(self, batch: WindowBatch, *, counts: bool = True) -> Tensor:
        """See `Segmenter.decode`; float32."""
        logits = self._network.decode(batch, counts=counts)
        return logits if self.precision == "fp32" else logits.float()


def with_same_weights(model: "Segmenter") -> "Segmenter":
    """Modules of its own around the same weights."""
    shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)
