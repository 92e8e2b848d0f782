"""Segmenter as mmsegmentation trains it: other names, norms with an eps of 1e-6, positions resized bicubically.

All shapes are read from the weights; windows, classes and data set from the configuration that lies beside them.
Source: open-mmlab/mmsegmentation, `mmseg/models/backbones/vit.py`, `mmseg/models/decode_heads/segmenter_mask_head.py`
and `configs/segmenter`.
"""

import ast
import csv
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mpm_ops.encoder import HEAD_DIM
from mpm_ops.segmenter import Segmenter

from .files import Checkpoint, CheckpointError
from .segmenter import build_variant

ANCHOR = "backbone.pos_embed"
_NORM_EPS = 1e-6  # of the backbone; its head keeps torch's
_DATASETS = {"ADE20KDataset": "ade20k", "CityscapesDataset": "cityscapes", "PascalContextDataset": "pascal_context"}
_SHORT_SIDES = {"cityscapes": 1024, "pascal_context": 520}  # that pictures are resized to; the window's elsewhere

# Theirs to Segmenter's. `conv_seg` is the whole linear head; the mask head has one too and never uses it.
_NAMES = (
    (r"backbone\.(cls_token|pos_embed)", r"encoder.\1"),
    (r"backbone\.patch_embed\.projection\.", r"encoder.patch_embed.proj."),
    (r"backbone\.ln1\.", r"encoder.norm."),
    (r"backbone\.layers\.(\d+)\.", r"encoder.blocks.\1."),
    (r"decode_head\.layers\.(\d+)\.", r"decoder.blocks.\1."),
    (r"decode_head\.dec_proj\.", r"decoder.proj_dec."),
    (r"decode_head\.patch_proj\.weight", r"decoder.proj_patch"),
    (r"decode_head\.classes_proj\.weight", r"decoder.proj_classes"),
    (r"decode_head\.(cls_emb|decoder_norm|mask_norm)", r"decoder.\1"),
    (r"decode_head\.conv_seg\.", r"decoder.head."),
    (r"(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"(blocks\.\d+)\.attn\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"(blocks\.\d+)\.attn\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
)


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether weights are called as a plain ViT's with one of Segmenter's two heads."""
    names = checkpoint.weights.keys()
    return ANCHOR in names and not names.isdisjoint({"decode_head.cls_emb", "decode_head.conv_seg.weight"})


def build(checkpoint: Checkpoint, inference: Mapping[str, Any]) -> Segmenter:
    """A float32 Segmenter in evaluation mode that does not merge; see `load_segmenter`."""
    weights = rename(checkpoint.weights)
    variant = describe(checkpoint, weights)
    return build_variant(variant, weights, inference, path=checkpoint.path, described_by="its weights (renamed)")


def copy(checkpoint: Checkpoint, folder: Path) -> None:
    """Write an official checkpoint, and names and colours of the classes if they are known."""
    weights = rename(checkpoint.weights)
    torch.save({"model": weights}, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(yaml.safe_dump(describe(checkpoint, weights)))
    dataset: Any = checkpoint.meta.get("dataset_meta") or {}
    names = checkpoint.meta.get("CLASSES") or dataset.get("classes")
    colors = checkpoint.meta.get("PALETTE") or dataset.get("palette")
    if names and colors and len(names) == len(colors):
        with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["index", "name", "red", "green", "blue"])
            table.writerows([i, name, *color] for i, (name, color) in enumerate(zip(names, colors, strict=True)))


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with Segmenter's names."""
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in _NAMES:
            name = re.sub(rf"^{theirs}" if not theirs.startswith("(") else theirs, ours, name)
        if name in ("decoder.proj_patch", "decoder.proj_classes"):
            value = value.T.contiguous()  # a linear layer there, a matrix here
        renamed[name] = value.flatten(1) if name == "decoder.head.weight" else value
    if "decoder.cls_emb" in renamed:
        renamed = {name: value for name, value in renamed.items() if not name.startswith("decoder.head.")}
    return renamed


def describe(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What variant.yml would say of renamed weights."""
    positions, patches = weights["encoder.pos_embed"], weights.get("encoder.patch_embed.proj.weight")
    if patches is None or positions.ndim != 3 or patches.ndim != 4:
        raise CheckpointError(
            f"{checkpoint.path}: expected a ViT's backbone.pos_embed and patch_embed.projection.weight"
        )
    grid = math.isqrt(max(positions.shape[1] - 1, 0))
    if grid**2 != positions.shape[1] - 1:
        raise CheckpointError(
            f"{checkpoint.path}: backbone.pos_embed: expected a class token and a square of patches, got "
            f"{positions.shape[1]} positions"
        )
    config = _configuration(checkpoint.meta)
    dataset = next((ours for theirs, ours in _DATASETS.items() if theirs in config), "")
    side = grid * patches.shape[2]
    window, stride = next(_windows(config), (side, side))
    decoder: dict[str, Any] = {"name": "linear"}
    if "decoder.cls_emb" in weights:
        decoder = {"name": "mask_transformer", "n_layers": _depth(weights, "decoder")}
        num_classes = weights["decoder.cls_emb"].shape[1]
    else:
        num_classes = len(weights["decoder.head.weight"])
    return {
        "net_kwargs": {
            "image_size": [side, side],
            "patch_size": patches.shape[2],
            "d_model": positions.shape[2],
            "n_heads": positions.shape[2] // HEAD_DIM,
            "n_layers": _depth(weights, "encoder"),
            "n_cls": num_classes,
            "decoder": decoder,
            "norm_eps": _NORM_EPS,
            "positions": "bicubic",
        },
        "dataset_kwargs": {"dataset": dataset, "normalization": "vit"},
        "inference_kwargs": {
            "im_size": _SHORT_SIDES.get(dataset, window),
            "window_size": window,
            "window_stride": stride,
        },
    }


def _depth(weights: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith(f"{part}.blocks.")})


def _configuration(meta: Mapping[str, Any]) -> str:
    """The text of the configuration, under its name in versions 1 and 0."""
    return next((text for name in ("cfg", "config") if isinstance(text := meta.get(name), str)), "")


def _windows(config: str) -> Iterator[tuple[int, int]]:
    """Sides and strides of square windows that `test_cfg` names; the text is parsed and never run."""
    try:
        tree = ast.parse(config)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "test_cfg" and isinstance(node.value, ast.Call):
            fields = {keyword.arg: ast.unparse(keyword.value) for keyword in node.value.keywords}
            crop, stride = (re.findall(r"\d+", fields.get(name, "")) for name in ("crop_size", "stride"))
            if crop and stride and len({*crop}) == len({*stride}) == 1:
                yield int(crop[0]), int(stride[0])
