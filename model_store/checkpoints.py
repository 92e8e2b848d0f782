"""What builders for both servers do with a checkpoint: check it, say what it is, and copy what is served."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handlers.config import ServingConfig
from handlers.launch.processes import MODEL_NAME
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.classes import load_classes
from mpm_ops.models import check_finite, copy_checkpoint, find_checkpoint, read_variant, trained_on


def say_nothing(text: str) -> None:
    """For builders whose caller needs no words."""


def check_model(name: str, checkpoint: Path, serving: Mapping[str, Any]) -> tuple[Path, ServingConfig, Segmenter]:
    """The checkpoint's file, the configuration and the network, once it is known that they can be served.

    Args:
        name: under which the model is served.
        checkpoint: of one of MODELS, or its folder, with `classes.csv`, where there is one, beside it.
        serving: fields of `handlers.config.ServingConfig`.

    Raises:
        FileNotFoundError, ValueError: they can't be.
    """
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', got {name!r}")
    config = ServingConfig.from_mapping(serving)
    checkpoint = find_checkpoint(checkpoint)
    model = load_segmenter(checkpoint, **config.merging, inference=config.inference)
    check_finite(model, checkpoint)
    load_classes(checkpoint.parent, model.config.n_cls)
    return checkpoint, config, model


def copy_model(checkpoint: Path, model: Segmenter, folder: Path) -> str:
    """Write all that a server loads of a checkpoint, and nothing else that is in it, into a folder.

    Returns:
        What the model is, in a few lines.
    """
    folder.mkdir()
    copy_checkpoint(checkpoint, folder)
    if (checkpoint.parent / "classes.csv").is_file():
        shutil.copy(checkpoint.parent / "classes.csv", folder)
    return _description(model, folder)


def _description(model: Segmenter, folder: Path) -> str:
    shape, inference = model.config, model.inference
    names = load_classes(folder, shape.n_cls).names
    num_weights = sum(weight.numel() for weight in model.parameters())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    dataset = trained_on(read_variant(folder / "variant.yml")) if (folder / "variant.yml").is_file() else ""
    if names[0] == "class 0" and not (folder / "classes.csv").is_file():
        shown = "only numbered: put classes.csv (index,name,red,green,blue) beside the checkpoint"
        if dataset:
            shown = f"only numbered, because nothing is known of dataset {dataset!r}: {shown.partition(': ')[2]}"
    size = f"{shape.n_layers} blocks, {shape.d_model} wide, {num_weights / 1e6:.1f} million weights"
    side = inference.window_size
    every = f"every {inference.window_stride} pixels of a picture with a short side of {inference.im_size}"
    return f"""\
  network: {size}, patches of {shape.patch_size}, {shape.decoder}
  classes: {len(names)}, {shown}
  windows: {side} x {side}, {every}
  merging: {model.merger}"""
