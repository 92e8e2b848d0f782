"""Parts of a Segmenter as OpenVINO graphs, for one window and any number of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from torch import Tensor, nn

from mpm_ops._timm import Block
from mpm_ops.decoders import DecoderLinear, MaskTransformer

if TYPE_CHECKING:
    from mpm_ops.baselines.segments import Segment
    from mpm_ops.segmenter import Segmenter


def blocks_graph(blocks: Sequence[Block]) -> ov.Model:
    """Tokens [1, L, D] through encoder blocks."""
    tokens = ops.parameter([1, -1, blocks[0].norm1.weight.numel()], np.float32)
    x = tokens
    for block in blocks:
        x = _block(x, block, None)
    return ov.Model([x], [tokens])


def decoder_graph(model: "Segmenter") -> ov.Model:
    """Tokens [1, special + M, D] and key bias [1, 1, 1, M + K] to logits [1, M, K]."""
    tokens = ops.parameter([1, -1, model.config.d_model], np.float32)
    bias = ops.parameter([1, 1, 1, -1], np.float32)
    return ov.Model([_decoder(tokens, model, bias)], [tokens, bias])


def whole_graph(model: "Segmenter", size: tuple[int, int]) -> ov.Model:
    """The network without merging: a window [1, 3, H, W] of that size to logits [1, N, K]."""
    encoder, patch = model.encoder, model.config.patch_size
    pixels = ops.parameter([1, 3, *size], np.float32)
    proj: Any = encoder.patch_embed["proj"]
    conv = ops.convolution(pixels, _constant(proj.weight), [patch, patch], [0, 0], [0, 0], [1, 1])
    patches = ops.reshape(conv, np.array([1, model.config.d_model, -1]), False)
    patches = ops.add(ops.transpose(patches, np.array([0, 2, 1])), _constant(proj.bias[None, None]))
    special = [encoder.cls_token, encoder.dist_token] if encoder.num_special == 2 else [encoder.cls_token]
    x = ops.concat([*map(_constant, special), patches], 1)
    x = ops.add(x, _constant(encoder.positions((size[0] // patch, size[1] // patch))))
    for block in encoder.blocks:
        x = _block(x, block, None)
    return ov.Model([_decoder(x, model, None)], [pixels])


def segment_graph(segment: "Segment", *, biased: bool) -> ov.Model:
    """A segment between two merges of a rival: tokens [1, L, D] (and key bias [1, 1, 1, L]) to tokens and keys."""
    blocks = [b for b in (segment.mlp, *segment.blocks, segment.attention) if b is not None]
    tokens = ops.parameter([1, -1, blocks[0].norm1.weight.numel()], np.float32)
    bias = ops.parameter([1, 1, 1, -1], np.float32) if biased else None
    x = tokens
    if segment.mlp is not None:
        x = _mlp(x, segment.mlp)
    for block in segment.blocks:
        x = _block(x, block, bias)
    found = [x]
    if segment.attention is not None:
        mixed, keys = _attention(_layer_norm(x, segment.attention.norm1), segment.attention.attn, bias)
        found = [ops.add(x, mixed), ops.reduce_mean(keys, np.array([1]), False)]
    return ov.Model(found, [tokens] if bias is None else [tokens, bias])


def _decoder(tokens: Any, model: "Segmenter", bias: Any) -> Any:
    num_classes, decoder = model.config.n_cls, model.decoder
    x = _slice(_layer_norm(tokens, model.encoder.norm), model.encoder.num_special, None)
    if isinstance(decoder, DecoderLinear):
        return _linear(x, decoder.head.weight, decoder.head.bias)
    assert isinstance(decoder, MaskTransformer)
    x = _linear(x, decoder.proj_dec.weight, decoder.proj_dec.bias)
    x = ops.concat([x, _constant(decoder.cls_emb)], 1)
    for block in decoder.blocks:
        x = _block(x, block, bias)
    x = _layer_norm(x, decoder.decoder_norm)
    patches = _unit(_linear(_slice(x, 0, -num_classes), decoder.proj_patch.T))
    classes = _unit(_linear(_slice(x, -num_classes, None), decoder.proj_classes.T))
    return _layer_norm(ops.matmul(patches, classes, False, True), decoder.mask_norm)


def _block(x: Any, block: Block, bias: Any) -> Any:
    return _mlp(ops.add(x, _attention(_layer_norm(x, block.norm1), block.attn, bias)[0]), block)


def _mlp(x: Any, block: Block) -> Any:
    hidden = ops.gelu(_linear(_layer_norm(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias), "erf")
    return ops.add(x, _linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias))


def _attention(x: Any, attn: Any, bias: Any) -> tuple[Any, Any]:
    """Mixed tokens [1, L, D], and keys [1, heads, L, Dh]."""
    qkv = _linear(x, attn.qkv.weight, attn.qkv.bias)
    heads = ops.reshape(qkv, np.array([1, -1, 3 * attn.num_heads, attn.head_dim]), False)
    q, k, v = ops.split(ops.transpose(heads, np.array([0, 2, 1, 3])), 1, 3).outputs()
    scores = ops.matmul(ops.multiply(q, np.float32(attn.scale)), k, False, True)
    if bias is not None:
        scores = ops.add(scores, bias)
    mixed = ops.transpose(ops.matmul(ops.softmax(scores, -1), v, False, False), np.array([0, 2, 1, 3]))
    joined = ops.reshape(mixed, np.array([1, -1, attn.num_heads * attn.head_dim]), False)
    return _linear(joined, attn.proj.weight, attn.proj.bias), k


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
