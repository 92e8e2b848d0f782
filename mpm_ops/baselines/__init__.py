"""Other ways to merge tokens of the same Segmenter checkpoints: what we measure against. No merging is schedule=()."""

from .algm import ALGM_THRESHOLDS, Algm
from .rivals import RivalSegmenter
from .tome import TOME_REDUCTIONS, ToMe

__all__ = ["ALGM_THRESHOLDS", "TOME_REDUCTIONS", "Algm", "RivalSegmenter", "ToMe"]
