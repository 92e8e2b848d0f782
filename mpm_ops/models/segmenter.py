"""Official Segmenter checkpoints: `checkpoint.pth` with `variant.yml` beside it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mpm_ops.encoder import LAYER_NORM_EPS
from mpm_ops.segmenter import Segmenter, SegmenterConfig
from mpm_ops.windows import InferenceConfig

from .files import Checkpoint, CheckpointError, load_strictly

ANCHOR = "encoder.pos_embed"

# ImageNet classifiers that official checkpoints carry along and segmentation never uses.
_UNUSED_PREFIXES = ("encoder.head.", "encoder.head_dist.")

# How much longer than the short side a picture may get, per official dataset configuration.
_MAX_RATIOS = {"ade20k": 4, "pascal_context": 8, "cityscapes": 2}
_DEFAULT_MAX_RATIO = 4


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether weights are called as Segmenter's, or have variant.yml beside them: what they lack is then said."""
    return ANCHOR in checkpoint.weights or (checkpoint.path.parent / "variant.yml").is_file()


def build(checkpoint: Checkpoint, inference: Mapping[str, Any]) -> Segmenter:
    """A float32 Segmenter in evaluation mode that does not merge; see `load_segmenter`."""
    variant = read_variant(checkpoint.path.parent / "variant.yml")
    return build_variant(variant, checkpoint.weights, inference, path=checkpoint.path, described_by="variant.yml")


def build_variant(
    variant: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    inference: Mapping[str, Any],
    *,
    path: Path,
    described_by: str,
) -> Segmenter:
    """The same of what variant.yml holds, and weights with the official names."""
    model = Segmenter(_segmenter_config(variant), _inference_config(variant, inference))
    used = {key: value for key, value in weights.items() if not key.startswith(_UNUSED_PREFIXES)}
    load_strictly(model, used, path, described_by)
    return model.eval()


def copy(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights alone, and what describes them."""
    torch.save({"model": dict(checkpoint.weights)}, folder / "checkpoint.pth")
    shutil.copy(checkpoint.path.parent / "variant.yml", folder)


def read_variant(path: Path) -> dict[str, Any]:
    """Read a variant.yml safely; the one tag allowed beyond plain YAML is the tuple that official files use."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected variant.yml beside the checkpoint, found none")
    try:
        variant = yaml.load(path.read_text(encoding="utf-8"), Loader=_VariantLoader)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # all of them mean bad YAML
        raise CheckpointError(f"{path}: not a readable variant.yml: {' '.join(str(error).split())}") from None
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise CheckpointError(f"{path}: expected a mapping with net_kwargs, got {type(variant).__name__}")
    return variant


def trained_on(variant: Mapping[str, Any]) -> str:
    """The dataset that a variant.yml says its network was trained on; empty if it does not."""
    dataset = variant.get("dataset_kwargs") or {}
    return str(dataset.get("dataset", "")) if isinstance(dataset, dict) else ""


class _VariantLoader(yaml.SafeLoader):
    pass


def _construct_tuple(loader: yaml.SafeLoader, node: Any) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


_VariantLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def _segmenter_config(variant: Mapping[str, Any]) -> SegmenterConfig:
    net = variant["net_kwargs"]
    decoder = net.get("decoder")
    if not isinstance(decoder, dict) or "name" not in decoder:
        raise CheckpointError("variant.yml: net_kwargs.decoder: expected a mapping with a name")
    missing = [k for k in ("image_size", "patch_size", "d_model", "n_heads", "n_layers", "n_cls") if k not in net]
    if missing:
        raise CheckpointError(f"variant.yml: net_kwargs lacks {', '.join(missing)}")
    size = net["image_size"]
    name = "linear" if "linear" in str(decoder["name"]) else str(decoder["name"])
    try:
        return SegmenterConfig(
            image_size=(size, size) if isinstance(size, int) else tuple(size),
            patch_size=net["patch_size"],
            d_model=net["d_model"],
            n_heads=net["n_heads"],
            n_layers=net["n_layers"],
            n_cls=net["n_cls"],
            decoder=name,
            decoder_layers=decoder.get("n_layers", 2),
            distilled=bool(net.get("distilled", False)),
            drop_path_rate=net.get("drop_path_rate", 0.0),
            norm_eps=net.get("norm_eps", LAYER_NORM_EPS),
            positions=net.get("positions", "bilinear"),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"variant.yml: net_kwargs: {error}") from None


def _inference_config(variant: Mapping[str, Any], overrides: Mapping[str, Any]) -> InferenceConfig:
    dataset = variant.get("dataset_kwargs") or {}
    stored = variant.get("inference_kwargs") or {}
    if not isinstance(dataset, dict) or not isinstance(stored, dict):
        raise CheckpointError("variant.yml: dataset_kwargs, inference_kwargs: expected mappings")
    window = stored.get("window_size", dataset.get("crop_size"))
    values = {
        "im_size": stored.get("im_size", dataset.get("image_size")),
        "max_ratio": stored.get("max_ratio", _MAX_RATIOS.get(trained_on(variant), _DEFAULT_MAX_RATIO)),
        "window_size": window,
        "window_stride": stored.get("window_stride", window),
        "normalization": dataset.get("normalization", variant["net_kwargs"].get("normalization")),
    }
    missing = [name for name, value in values.items() if value is None and name not in overrides]
    if missing:
        raise CheckpointError(f"variant.yml: inference_kwargs and dataset_kwargs lack {', '.join(missing)}")
    unknown = set(overrides) - set(InferenceConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"inference: unknown fields {', '.join(sorted(unknown))}")
    return InferenceConfig(**(values | dict(overrides)))
