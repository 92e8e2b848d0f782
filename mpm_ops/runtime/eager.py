"""Stages on torch, one operator after the other: runs everywhere, and is what other runtimes are held against."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpm_ops.attention import use_attention
from mpm_ops.stages import Stage, WindowBatch

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter


class TorchRuntime:
    """The modules of a Segmenter: its own in fp32, a copy of them in bf16.

    Args:
        model: whose weights are run.
        precision: "fp32" or "bf16".
        padded: see `Segmenter.run_blocks`.
    """

    name = "torch"

    def __init__(self, model: "Segmenter", precision: str = "fp32", *, padded: bool = False) -> None:
        self.precision = precision
        self._padded = padded
        self._network = model if precision == "fp32" else copy.deepcopy(model).to(torch.bfloat16)
        if model.encoder.pos_embed.is_cuda:
            use_attention(self._network, "grouped" if padded else "auto")  # masks of padding are infinite biases

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        if self.precision == "bf16" and stage.index == 0:
            batch = batch.with_tokens(batch.tokens.with_values(batch.tokens.values.bfloat16()))
        return self._network.run_blocks(stage, batch, padded=self._padded)

    def decode(self, batch: WindowBatch) -> Tensor:
        logits = self._network.decode(batch)
        return logits.float() if self.precision == "bf16" else logits
