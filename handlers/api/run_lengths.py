"""COCO's run-length encoding of all classes of a mask in one pass over its pixels."""

from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as coco


@dataclass(frozen=True, slots=True)
class Region:
    """Where one class is: area in pixels, counts as COCO's compressed string."""

    index: int
    area: int
    counts: str


def regions(labels: np.ndarray) -> list[Region]:
    """The classes that occur in [H, W] ids, largest first (ties: the lowest id)."""
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
