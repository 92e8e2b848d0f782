"""Stages on OpenVINO's CPU plugin, window by window: x86-64 and arm64, fp32 and, where the chip has it, bf16.

The network is cut wherever some schedule merges, and every piece is compiled once for any number of
tokens. So schedules share pieces, and without merging the same pieces run one after the other.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import torch
from openvino import opset15 as ops
from torch import Tensor, nn

from mpm_ops._timm import Block
from mpm_ops.decoders import DecoderLinear, MaskTransformer
from mpm_ops.stages import Stage, WindowBatch

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def resolve_precision(precision: str) -> str:
    """bf16 for "auto" where the chip multiplies it natively.

    Raises:
        ValueError: bf16 is asked for where it isn't; OpenVINO would silently run fp32.
    """
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
            start: (stop, self._compile(_blocks_graph(blocks[start:stop])))
            for start, stop in itertools.pairwise(bounds)
        }
        self._decoder = self._compile(_decoder_graph(model))

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

    def _compile(self, graph: ov.Model) -> "_Piece":
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # several workers would be pinned to the same cores
        }
        return _Piece(ov.Core().compile_model(graph, "CPU", config))


class _Piece:
    """A compiled piece and its one request. What it returns is overwritten by its next call."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()

    def __call__(self, *inputs: Tensor) -> Tensor:
        for i, value in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(value.contiguous().numpy(), shared_memory=True))
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor(0).data)


# The network as OpenVINO graphs


def _blocks_graph(blocks: Sequence[Block]) -> ov.Model:
    """Tokens [1, L, D] through encoder blocks."""
    tokens = ops.parameter([1, -1, blocks[0].norm1.weight.numel()], np.float32)
    x = tokens
    for block in blocks:
        x = _block(x, block, None)
    return ov.Model([x], [tokens])


def _decoder_graph(model: "Segmenter") -> ov.Model:
    """Tokens [1, special + M, D] and key bias [1, 1, 1, M + K] to logits [1, M, K]."""
    num_special, num_classes = model.encoder.num_special, model.config.n_cls
    tokens = ops.parameter([1, -1, model.config.d_model], np.float32)
    bias = ops.parameter([1, 1, 1, -1], np.float32)
    x = _slice(_layer_norm(tokens, model.encoder.norm), num_special, None)
    decoder = model.decoder
    if isinstance(decoder, DecoderLinear):
        return ov.Model([_linear(x, decoder.head.weight, decoder.head.bias)], [tokens, bias])
    assert isinstance(decoder, MaskTransformer)
    x = _linear(x, decoder.proj_dec.weight, decoder.proj_dec.bias)
    x = ops.concat([x, _constant(decoder.cls_emb)], 1)
    for block in decoder.blocks:
        x = _block(x, block, bias)
    x = _layer_norm(x, decoder.decoder_norm)
    patches = _unit(_linear(_slice(x, 0, -num_classes), decoder.proj_patch.T))
    classes = _unit(_linear(_slice(x, -num_classes, None), decoder.proj_classes.T))
    masks = ops.matmul(patches, classes, False, True)
    return ov.Model([_layer_norm(masks, decoder.mask_norm)], [tokens, bias])


def _block(x: Any, block: Block, bias: Any) -> Any:
    x = ops.add(x, _attention(_layer_norm(x, block.norm1), block.attn, bias))
    hidden = ops.gelu(_linear(_layer_norm(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias), "erf")
    return ops.add(x, _linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))


def _attention(x: Any, attn: Any, bias: Any) -> Any:
    qkv = _linear(x, attn.qkv.weight, attn.qkv.bias)
    heads = ops.reshape(qkv, np.array([1, -1, 3 * attn.num_heads, attn.head_dim]), False)
    q, k, v = ops.split(ops.transpose(heads, np.array([0, 2, 1, 3])), 1, 3).outputs()
    scores = ops.matmul(ops.multiply(q, np.float32(attn.scale)), k, False, True)
    if bias is not None:
        scores = ops.add(scores, bias)
    mixed = ops.transpose(ops.matmul(ops.softmax(scores, -1), v, False, False), np.array([0, 2, 1, 3]))
    joined = ops.reshape(mixed, np.array([1, -1, attn.num_heads * attn.head_dim]), False)
    return _linear(joined, attn.proj.weight, attn.proj.bias)


def _linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    product = ops.matmul(x, _constant(weight), False, True)
    return product if bias is None else ops.add(product, _constant(bias[None, None]))


def _layer_norm(x: Any, norm: nn.LayerNorm) -> Any:
    normed = ops.mvn(x, np.array([-1]), True, norm.eps, "inside_sqrt")
    return ops.add(ops.multiply(normed, _constant(norm.weight[None, None])), _constant(norm.bias[None, None]))


def _unit(x: Any) -> Any:
    return ops.divide(x, ops.sqrt(ops.reduce_sum(ops.multiply(x, x), np.array([-1]), True)))


def _slice(x: Any, start: int, stop: int | None) -> Any:
    """x[:, start:stop]"""
    end = np.iinfo(np.int64).max if stop is None else stop
    return ops.slice(x, np.array([start]), np.array([end]), np.array([1]), np.array([1]))


def _constant(value: Tensor) -> Any:
    return ops.constant(value.detach().float().contiguous().numpy())
