"""Masks as NumPy files, and as arrays where the server passes arrays on."""

import io
from typing import TYPE_CHECKING

import numpy as np

from mpm_ops.classes import Classes

from .base import Format

if TYPE_CHECKING:
    from handlers.engine.request import Picture


def encode_npy(labels: np.ndarray) -> bytes:
    """[H, W] class ids -> a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, labels)
    return buffer.getvalue()


def _encode(picture: "Picture", classes: Classes, patch_size: int) -> bytes:
    return encode_npy(picture.labels)


def _labels(picture: "Picture") -> np.ndarray:
    return picture.labels


NPY = Format(media_types=("application/x-npy",), output="MASK", encode=_encode, array=_labels)
