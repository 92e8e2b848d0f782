"""From window logits to the bytes of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm_ops.classes import Classes
from mpm_ops.labels import LabelMap, label_map
from mpm_ops.windows import WindowPlan

from . import codec, views
from .options import RequestOptions

_MASK_BYTES, _VIEW_BYTES = 4, 16  # measured on 64 million pixels of noise: 3.1 and 12.3


@dataclass(frozen=True, slots=True)
class Segmented:
    """What the network found in one picture.

    Attributes:
        image: uint8 RGB [H, W, 3]; without a view it may be smaller than the picture that came.
        plan: where its windows lie.
        logits: [num_windows, K, Gh, Gw].
        merge_maps: per window, the token that stands for each patch, [N] int64; None where nothing merged.
        lengths: per window, image tokens at the start and after each merge.
        seconds: how long each step took so far.
    """

    image: np.ndarray
    plan: WindowPlan
    logits: Tensor
    merge_maps: Sequence[Tensor | None]
    lengths: Sequence[Sequence[int]]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class SegmentReply:
    """An answer.

    Attributes:
        body: encoded as the request's media type.
        media_type: of the body.
        tokens: of the whole picture, at the start and after each merge.
        seconds: how long each step took.
        num_windows: that it was cut into.
        also: the further forms of the mask that were asked for, by media type.
    """

    body: bytes
    media_type: str
    tokens: tuple[int, ...]
    seconds: dict[str, float]
    num_windows: int
    also: Mapping[str, bytes] = field(default_factory=dict)


def encode_reply(
    found: Segmented, options: RequestOptions, classes: Classes, patch_size: int, labels: np.ndarray | None = None
) -> SegmentReply:
    """Label every pixel and encode what was asked for.

    Args:
        labels: [H, W] of every pixel, where they are known; `found.seconds` says how long that took.
    """
    start = monotonic()
    if labels is None:
        mask = label_map(found.logits, found.plan, patch_size, confidence=options.view == "confidence")
        found.seconds["labels"] = monotonic() - start
    else:
        mask = LabelMap(labels, None)
    labeled = monotonic()
    tokens = tuple(sum(step) for step in zip(*found.lengths, strict=True))
    seconds = dict(found.seconds)

    def encode(media_type: str) -> bytes:
        if media_type == "application/json":
            return codec.encode_json(_describe(found, mask.labels, classes, options, seconds))
        if media_type == "application/x-npy":
            return codec.encode_npy(mask.labels)
        return codec.encode_mask_png(mask.labels, classes)

    if options.view == "overlay":
        body = codec.encode_picture(views.overlay_view(found.image, mask.labels, classes), options.media_type)
    elif options.view == "tokens":
        body = codec.encode_picture(_tokens_view(found, patch_size, tokens), options.media_type)
    elif options.view == "confidence":
        assert mask.confidence is not None
        body = codec.encode_picture(views.confidence_view(mask.confidence), options.media_type)
    else:
        body = encode(options.media_type)
    also = {media_type: encode(media_type) for media_type in options.also}
    timed = seconds | {"encode": monotonic() - labeled}
    return SegmentReply(body, options.media_type, tokens, timed, found.plan.num_windows, also)


def encoding_bytes(options: RequestOptions) -> int:
    """What `encode_reply` takes for each pixel of a large picture."""
    return _VIEW_BYTES if options.view is not None else _MASK_BYTES


def _tokens_view(found: Segmented, patch_size: int, tokens: Sequence[int]) -> np.ndarray:
    unmerged = torch.arange(found.logits.shape[2] * found.logits.shape[3])
    maps = [(unmerged if merge_map is None else merge_map).cpu().numpy() for merge_map in found.merge_maps]
    return views.tokens_view(found.image, found.plan, maps, patch_size, tokens)


def _describe(
    found: Segmented, labels: np.ndarray, classes: Classes, options: RequestOptions, seconds: dict[str, float]
) -> dict[str, Any]:
    return {
        "request_id": options.request_id,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "classes": codec.describe_classes(labels, classes),
        "tokens_per_window": found.lengths,
        "timings_ms": {step: round(1000 * duration, 3) for step, duration in seconds.items()},
    }
