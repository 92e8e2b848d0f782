"""Stages on OpenVINO's CPU plugin, window by window: x86-64 and arm64, fp32 and, where the chip has it, bf16.

The network is cut wherever some schedule merges, and every piece is compiled once for any number of
tokens. So schedules share pieces, and without merging the same pieces run one after the other.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import openvino as ov
import torch
from torch import Tensor

from mpm_ops.stages import Stage, WindowBatch

from .openvino_graphs import blocks_graph, decoder_graph

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def resolve_precision(precision: str) -> str:
    """bf16 for "auto" where the chip multiplies it natively.

    Raises:
        ValueError: bf16 is asked for where it isn't, or fp16; OpenVINO would silently run fp32.
    """
    if precision == "fp16":
        raise ValueError("precision: openvino runs fp32 or bf16, got fp16")
    native = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not native:
        raise ValueError("precision: this CPU has no native bf16, expected fp32 or auto")
    return ("bf16" if native else "fp32") if precision == "auto" else precision


class OpenVINORuntime:
    """Compiled pieces of a Segmenter. Not thread-safe: one device thread runs it.

    Args:
        model: whose weights are compiled; later changes to them have no effect.
        precision: "fp32" or "bf16".
        schedules: that will be run.
    """

    name = "openvino"

    def __init__(self, model: "Segmenter", precision: str, schedules: Iterable[Sequence[int]]) -> None:
        self.precision = precision
        self._num_special = model.encoder.num_special
        self._num_classes = model.config.n_cls
        bounds = sorted({0, model.config.n_layers, *itertools.chain.from_iterable(schedules)})
        blocks = list(model.encoder.blocks)
        self._pieces = {
            start: (stop, compile_graph(blocks_graph(blocks[start:stop]), precision))
            for start, stop in itertools.pairwise(bounds)
        }
        self._decoder = compile_graph(decoder_graph(model), precision)

    def bucket(self, length: int) -> int:
        return length  # windows run one by one

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        values = torch.empty_like(batch.tokens.values)
        for tokens, out in zip(batch.tokens.split(), values.split(batch.tokens.lengths), strict=True):
            at = stage.blocks.start
            while at < stage.blocks.stop:
                at, piece = self._pieces[at]
                tokens = piece(tokens[None])[0]
            out.copy_(tokens)
        return batch.with_tokens(batch.tokens.with_values(values))

    def decode(self, batch: WindowBatch) -> Tensor:
        maps = batch.merge_maps or (None,) * len(batch.tokens.lengths)
        return torch.stack([self._decode(*window) for window in zip(batch.tokens.split(), maps, strict=True)])

    def _decode(self, tokens: Tensor, merge_map: Tensor | None) -> Tensor:
        num_tokens = len(tokens) - self._num_special
        bias = torch.zeros(1, 1, 1, num_tokens + self._num_classes)
        if merge_map is not None:
            bias[..., :num_tokens] = merge_map.bincount(minlength=num_tokens).log()
        logits = self._decoder(tokens[None], bias)[0]
        return logits.clone() if merge_map is None else logits[merge_map]


def compile_graph(graph: ov.Model, precision: str) -> "Piece":
    """Compile for as many threads as torch has now."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # several workers would be pinned to the same cores
        "CPU_RUNTIME_CACHE_CAPACITY": 16,  # lengths hardly repeat: remembering thousands took memory and saved no time
    }
    return Piece(ov.Core().compile_model(graph, "CPU", config))


class Piece:
    """A compiled graph and its one request. What it returns is overwritten by its next call."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._num_outputs = len(compiled.outputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        for i, value in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(value.contiguous().numpy(), shared_memory=True))
        self._request.infer()
        return [torch.from_numpy(self._request.get_output_tensor(i).data) for i in range(self._num_outputs)]
