"""From a model's folder to an engine, the same way behind every server."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers.api.formats.views import encode_picture
from handlers.config import ServingConfig
from mpm_ops import load_segmenter
from mpm_ops.classes import load_classes
from mpm_ops.cpus import usable_cores

from .engine import Engine


def load_engine(path: Path, config: ServingConfig, **options: Any) -> Engine:
    """Start an engine on `checkpoint.pth` with `variant.yml`, and `classes.csv` where there is one, in a folder.

    Args:
        path: the folder, or the checkpoint in it.
        config: how to serve them.
        options: passed on to `Engine`.

    Raises:
        OSError, ValueError: a file is missing or does not fit.
    """
    config = replace(config, torch_threads=config.torch_threads or _default_threads())
    torch.set_num_threads(config.torch_threads)
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = path if path.is_file() else path / "checkpoint.pth"
    model = load_segmenter(checkpoint, **config.merging, inference=config.inference, device=device)
    classes = load_classes(checkpoint.parent, model.config.n_cls)
    return Engine(model, classes, config, **options)


def _default_threads() -> int:
    """Usable cores, or fewer where MPM_CORES says so: a pod's request for cores without a limit is no quota."""
    text = os.environ.get("MPM_CORES")
    if text is None:
        return usable_cores()
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(f"MPM_CORES: expected a number of cores >= 1, got {text!r}; correct it or unset it")
    return min(usable_cores(), int(text))


def find_device(name: str) -> torch.device:
    """The device of a configuration's name.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of the {torch.cuda.device_count()} GPUs that torch sees, got {name}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device  # set_device wants a number


def warm_up_picture() -> bytes:
    """A small JPEG of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (360, 480, 3), dtype=np.uint8)
    return encode_picture(noise, "image/jpeg")
