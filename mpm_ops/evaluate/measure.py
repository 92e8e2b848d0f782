"""What one picture tells of a merger: labels, and every merge on the way to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, cast

import numpy as np
from torch import Tensor

from mpm_ops.merging import Merger
from mpm_ops.segmenter import Segmenter
from mpm_ops.stages import Stage, WindowBatch
from mpm_ops.windows import plan_windows

from .scores import merge_distances


@dataclass(frozen=True, slots=True)
class Seen:
    """A segmented picture.

    Attributes:
        labels: [H, W] class ids.
        seconds: from its pixels to these.
        lengths: image tokens of every window in each of the stages, [stage][window].
        distances: how many merged tokens had each distance, see `merge_distances`.
    """

    labels: np.ndarray
    seconds: float
    lengths: list[list[int]]
    distances: np.ndarray


def segment(model: Segmenter, merger: Merger, image: np.ndarray) -> Seen:
    """Segment a picture as anybody does, with another merger, and look on."""
    watched = _Watched(merger)
    model.merger = cast(Merger, watched)
    start = perf_counter()
    labels = model.segment(image)
    seconds = perf_counter() - start

    columns = -(-model.inference.window_size // model.config.patch_size)
    num_merges = len(merger.stages) - 1
    lengths: list[list[int]] = [[] for _ in range(num_merges)]
    distances = np.zeros(2 * columns, np.int64)
    for i, (before, after) in enumerate(watched.merges):
        lengths[i % num_merges] += [int(merge_map.max()) + 1 for merge_map in after]
        for old, new in zip(before or [None] * len(after), after, strict=True):
            steps = merge_distances(None if old is None else _array(old), _array(new), columns)
            distances += np.bincount(steps, minlength=len(distances))
    num_windows = plan_windows(image.shape[0], image.shape[1], model.inference).num_windows
    return Seen(labels, seconds, [[columns**2] * num_windows, *lengths], distances)


def _array(merge_map: Tensor) -> np.ndarray:
    return merge_map.cpu().numpy()


class _Watched:
    """A merger, and the maps before and after each of its merges, of all windows of a batch."""

    def __init__(self, merger: Merger) -> None:
        self._merger = merger
        self.merges: list[tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._merger, name)

    @property
    def stages(self) -> tuple[Stage, ...]:
        own = cast(Merger, self)
        return tuple(replace(stage, merger=stage.merger and own) for stage in self._merger.stages)

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        launched = self._merger.launch(batch)

        def finish() -> WindowBatch:
            merged = launched()
            assert merged.merge_maps is not None
            self.merges.append((batch.merge_maps, merged.merge_maps))
            return merged

        return finish
