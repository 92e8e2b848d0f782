"""Official Segmenter checkpoints: `checkpoint.pth` with `variant.yml` beside it."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .runtime import make_runtime
from .segmenter import Segmenter, SegmenterConfig
from .windows import InferenceConfig

# ImageNet classifiers that official checkpoints carry along and segmentation never uses.
_UNUSED_PREFIXES = ("encoder.head.", "encoder.head_dist.")

# How much longer than the short side a picture may get, per official dataset configuration.
_MAX_RATIOS = {"ade20k": 4, "pascal_context": 8, "cityscapes": 2}
_DEFAULT_MAX_RATIO = 4


class CheckpointError(ValueError):
    """A checkpoint or its variant.yml can't be used; the message says what is wrong with which part."""


def load_segmenter(
    path: str | Path,
    schedule: Sequence[int] = (),
    align: int = 1,
    *,
    inference: Mapping[str, Any] | None = None,
    runtime: str = "torch",
    precision: str | None = None,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """Load an official Segmenter checkpoint, with Mutual Pair Merging at the blocks of a schedule.

    Nothing is downloaded and no code in the files is run.

    Args:
        path: `checkpoint.pth`; `variant.yml` is read from the same folder.
        schedule: encoder blocks before which tokens merge, 0-based; () for no merging, (2, 5) as in the paper.
        align: see `merge_tokens`.
        inference: fields of `InferenceConfig` that override the checkpoint's.
        runtime: what blocks and decoder run on, see `make_runtime`; "auto" is the servers' default.
        precision: "auto", "fp32", "bf16" or "fp16"; by default "auto" for runtime "auto", as the servers have it,
            and "fp32" otherwise.
        device: where the model goes.

    Returns:
        A float32 Segmenter in evaluation mode.

    Raises:
        FileNotFoundError: either file is missing.
        CheckpointError: a file is unreadable, or keys are missing, unexpected or of another shape.
        ValueError: the schedule, align or inference do not fit the network, or the runtime can't run here.

    Source: rstrudel/segmenter@20d1bfad, `segm/model/factory.py`.
    """
    if precision is None:
        precision = "auto" if runtime == "auto" else "fp32"
    path = Path(path)
    variant = read_variant(path.parent / "variant.yml")
    config = _segmenter_config(variant)
    model = Segmenter(config, _inference_config(variant, inference or {}), schedule=schedule, align=align)
    _load_strictly(model, read_weights(path), path)
    model.eval().to(device)
    if (runtime, precision) != ("torch", "fp32"):  # what it builds by itself, when it is first asked for it
        model.runtime = make_runtime(model, runtime, precision)
    return model


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by name, as stored.

    They lie in the file, mapped, until they are touched, so that what training leaves beside them (an optimizer's
    state is as large, or twice) never comes into memory. Files of torch before 1.6 can't be mapped: read whole.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise CheckpointError(f"{path}: not a weights-only torch checkpoint: {reason}") from None
    weights = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise CheckpointError(f"{path}: expected a state_dict, or one under 'model', got {type(data).__name__}")
    return weights


def _load_strictly(model: Segmenter, weights: Mapping[str, Tensor], path: Path) -> None:
    used = {key: value for key, value in weights.items() if not key.startswith(_UNUSED_PREFIXES)}
    expected = model.state_dict()
    problems = [
        *(f"missing {key} {list(expected[key].shape)}" for key in expected if key not in used),
        *(f"unexpected {key} {list(used[key].shape)}" for key in used if key not in expected),
        *(
            f"{key}: expected shape {list(expected[key].shape)}, got {list(used[key].shape)}"
            for key in expected
            if key in used and used[key].shape != expected[key].shape
        ),
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path}: does not fit the network of variant.yml: {shown}")
    model.load_state_dict(used)
