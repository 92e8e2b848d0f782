"""Self-attention over packed tokens, with the weights of a timm block.

A backend multiplies queries, keys and values of ragged sequences; it is chosen by name, once. "grouped" runs
everywhere, one call per length; the others take all sequences in one call on a GPU.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._timm import Attention, Block
from .kernels import has_triton
from .packed import PackedTokens


def block_forward(block: Block, tokens: PackedTokens, key_bias: Tensor | None = None) -> PackedTokens:
    """Run one pre-norm transformer block on packed tokens; see `run_blocks`."""
    return run_blocks((block,), tokens, key_bias)


def run_blocks(
    blocks: Iterable[Block],
    tokens: PackedTokens,
    key_bias: Tensor | None = None,
    last_norm: nn.LayerNorm | None = None,
) -> PackedTokens:
    """Run pre-norm transformer blocks on packed tokens.

    Args:
        blocks: timm blocks.
        tokens: [T, D] packed tokens.
        key_bias: [T], added to every attention logit of a key, or None. log(n) makes a token count
            as n equal ones.
        last_norm: what normalises the result, if anything.

    Returns:
        Packed tokens of the same lengths.
    """
    x, rest = tokens.values, None  # what the next norm adds first
    for block in blocks:
        x, normed = _add_norm(x, rest, block.norm1)
        rest = block.drop_path1(block.ls1(attend(block.attn, tokens.with_values(normed), key_bias)))
        x, normed = _add_norm(x, rest, block.norm2)
        rest = block.drop_path2(block.ls2(block.mlp(normed)))
    if last_norm is not None:
        return tokens.with_values(_add_norm(x, rest, last_norm)[1])
    return tokens.with_values(x if rest is None else x + rest)


def _add_norm(x: Tensor, rest: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The sum, and its norm: one kernel on a GPU where nobody asks for gradients."""
    if _fuses(x, norm):
        from .kernels import norms

        if rest is None:
            return x, norms.norm(x.contiguous(), norm.weight, norm.bias, norm.eps)
        return norms.add_norm(x.contiguous(), rest.contiguous(), norm.weight, norm.bias, norm.eps)
    x = x if rest is None else x + rest
    return x, norm(x)


def _fuses(x: Tensor, norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or not has_triton():
        return False
    whole_rows = isinstance(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[1:] and norm.bias is not None
    return whole_rows and norm.weight.dtype == x.dtype and x.dtype != torch.float64


def attend(attn: Attention, tokens: PackedTokens, key_bias: Tensor | None = None) -> Tensor:
    """Attention of each sequence to itself; returns [T, D].

    Runs on the module's `attention_backend` (see `use_attention`), "grouped" where none was chosen.
    """
    qkv = attn.qkv(tokens.values).view(-1, 3, attn.num_heads, attn.head_dim)
    backend = getattr(attn, "attention_backend", "grouped")
    if backend == "grouped":
        dropout = attn.attn_drop.p if attn.training else 0.0
        mixed = _grouped(qkv, tokens, key_bias, attn.scale, dropout)
    elif backend == "triton":
        from .kernels.attention import attend_ragged

        bias = None if key_bias is None else key_bias.float()
        mixed = attend_ragged(qkv, tokens.cu_seqlens, tokens.max_seqlen, bias, attn.scale)
    else:
        mixed = attend_packed(_PACKED[backend], qkv, tokens, key_bias, attn.scale)
    return attn.proj_drop(attn.proj(mixed))


def use_attention(module: nn.Module, name: str = "auto") -> str:
    """Choose the backend of all attention in a module, for good, and log it.

    Args:
        module: holds timm blocks, in the precision and on the device that they will run in.
        name: "auto", or one of ATTENTIONS. "auto" takes the first of them that can run: on a GPU, for
            half precision, ours where triton is installed, then flash-attn, then torch's own kernel over ragged
            sequences; the memory-efficient kernel for float32 there; and "grouped" on a CPU.

    Returns:
        The backend's name.

    Raises:
        ValueError: the name is unknown, or what it names can't run here.
    """
    weight = next(module.parameters())
    if name == "auto":
        known = [n for n in ATTENTIONS if attention_obstacle(n, weight.device, weight.dtype) is None]
        name = known[0]
    elif name not in ATTENTIONS:
        raise ValueError(f"attention: expected one of auto, {', '.join(ATTENTIONS)}, got {name!r}")
    elif obstacle := attention_obstacle(name, weight.device, weight.dtype):
        raise ValueError(f"attention: {name} {obstacle}, got {weight.dtype} on {weight.device}")
    for part in module.modules():
        if isinstance(part, Attention):
            part.attention_backend = name
    _log.info("attention: %s for %s on %s", name, weight.dtype, weight.device)
    return name


def attention_obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend can't run there, or None."""
    if name == "grouped":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "efficient":
        return None
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn"
    if name == "triton" and not has_triton():
        return "needs the package triton"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "needs a GPU of compute capability 8.0 or more"
    return None if half else "needs float16 or bfloat16"


def attend_packed(
    kernel: "Packed", qkv: Tensor, tokens: PackedTokens, key_bias: Tensor | None, scale: float
) -> Tensor:
    """Attention by a kernel that knows ragged sequences but no bias; [T, 3, nH, Dh] -> [T, nH * Dh].

    A bias becomes further columns of the heads: queries hold 1 / scale there, and keys the bias, as a high and
    a low part where the numbers are half precision.
    """
    head_dim = qkv.shape[-1]
    if key_bias is not None:
        qkv = _with_bias_columns(qkv, key_bias, scale)
    q, k, v = qkv.unbind(1)
    mixed = kernel(q, k, v, tokens.cu_seqlens, tokens.max_seqlen, scale)
    return mixed[..., :head_dim].flatten(1)


def _with_bias_columns(qkv: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    wide = F.pad(qkv, (0, _BIAS_COLUMNS))
    head_dim = qkv.shape[-1]
    high = key_bias.to(qkv.dtype)
    low = (key_bias - high).to(qkv.dtype)
    wide[:, 0, :, head_dim : head_dim + 2] = 1 / scale
    wide[:, 1, :, head_dim] = high[:, None]
    wide[:, 1, :, head_dim + 1] = low[:, None]
    return wide


def _grouped(qkv: Tensor, tokens: PackedTokens, key_bias: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Sequences of equal length share one call; ragged ones are attended one by one.

    On a CPU that beats padding, and keeps every result independent of its neighbours.
    """
    num_heads, head_dim = qkv.shape[2:]

    def one_call(qkv: Tensor, num_sequences: int, bias: Tensor | None) -> Tensor:
        length = len(qkv) // num_sequences
        q, k, v = qkv.view(num_sequences, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
        mask = None if bias is None else bias.to(qkv.dtype).view(num_sequences, 1, 1, length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).reshape(len(qkv), -1)

    if tokens.is_uniform:
        return one_call(qkv, len(tokens.lengths), key_bias)
    biases = [None] * len(tokens.lengths) if key_bias is None else key_bias.split(tokens.lengths)
    return torch.cat([one_call(part, 1, bias) for part, bias in zip(qkv.split(tokens.lengths), biases, strict=True)])


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    # What torch.nn.attention.varlen calls, less a kernel that zeroes the random state of a dropout.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, False, False, scale=scale
    )[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    out = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, 0, False, scale=scale
    )
    return out[0][0]


Packed = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
_PACKED: dict[str, Packed] = {"flash": _flash, "varlen": _varlen, "efficient": _efficient}
# In the order of preference; on an H200 ours takes 0.60 to 0.79 of the time of varlen, which is FlashAttention 2.
ATTENTIONS = ("triton", "flash", "varlen", "efficient", "grouped")
_BIAS_COLUMNS = 8  # two of them in use: kernels want head widths that are multiples of eight
_log = logging.getLogger(__name__)
