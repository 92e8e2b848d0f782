"""Masks as JSON: every class with its area and COCO's run-length encoding."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from pycocotools import mask as coco

from mpm_ops.classes import Classes

from .base import Format

if TYPE_CHECKING:
    from handlers.engine.request import Picture


@dataclass(frozen=True, slots=True)
class Region:
    """Where one class is: area in pixels, counts as COCO's compressed string."""

    index: int
    area: int
    counts: str


def regions(labels: np.ndarray) -> list[Region]:
    """The classes that occur in [H, W] ids, largest first (ties: the lowest id), in one pass over the pixels."""
    height, width = labels.shape
    ids = cv2.transpose(labels).ravel()  # column by column, as COCO counts
    starts = np.r_[0, np.flatnonzero(ids[1:] != ids[:-1]) + 1]
    ends = np.r_[starts[1:], ids.size]
    owners = ids[starts]
    areas = np.bincount(owners, ends - starts).astype(np.int64)
    by_class = np.argsort(owners, kind="stable")
    last = np.cumsum(np.bincount(owners))
    found = []
    for index in np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)].tolist():
        runs = by_class[last[index - 1] if index else 0 : last[index]]
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=ids.size)
        if not counts[-1]:
            counts = counts[:-1]
        rle = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        found.append(Region(index, int(areas[index]), rle["counts"].decode("ascii")))
    return found


def describe_classes(labels: np.ndarray, classes: Classes) -> list[dict[str, Any]]:
    """Every class that occurs, largest first: id, name, colour, area in pixels and COCO run-length encoding."""
    height, width = labels.shape
    return [
        {
            "id": region.index,
            "name": classes.names[region.index],
            "color": classes.colors[region.index].tolist(),
            "area": region.area,
            "rle": {"size": [height, width], "counts": region.counts},
        }
        for region in regions(labels)
    ]


def describe_picture(picture: "Picture", classes: Classes) -> dict[str, Any]:
    """What is told of a labelled picture."""
    height, width = picture.labels.shape
    return {
        "request_id": picture.options.request_id,
        "height": height,
        "width": width,
        **({"reduced_from": picture.reduced_from} if picture.reduced_from else {}),
        "classes": describe_classes(picture.labels, classes),
        "tokens_per_window": [window.lengths for window in picture.windows],
        "timings_ms": {step: round(1000 * duration, 3) for step, duration in picture.seconds.items()},
    }


def to_bytes(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _encode(picture: "Picture", classes: Classes, patch_size: int) -> bytes:
    return to_bytes(describe_picture(picture, classes))


JSON = Format(media_types=("application/json",), output="RESULT_JSON", encode=_encode)
