"""Mutual Pair Merging for Segmenter vision transformers."""

from . import _openmp  # noqa: F401
from .merge import compose_maps, merge_tokens, reconstruct
from .models import CheckpointError, load_segmenter
from .patch import patch_timm
from .segmenter import Segmenter, SegmenterConfig
from .windows import InferenceConfig, TooManyWindowsError

__all__ = [
    "CheckpointError",
    "InferenceConfig",
    "Segmenter",
    "SegmenterConfig",
    "TooManyWindowsError",
    "compose_maps",
    "load_segmenter",
    "merge_tokens",
    "patch_timm",
    "reconstruct",
]
