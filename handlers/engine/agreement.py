"""Whether merging is still right for the pictures that come in: some are also computed without it, and compared."""

import threading
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from handlers.observe.metrics import Metrics
from mpm_ops.classes import Classes
from mpm_ops.labels import label_map
from mpm_ops.windows import WindowPlan

from .request import Picture

_MAX_CREDIT = 5.0  # pictures that a busy time leaves to be made up for when the device is idle


class Sampler:
    """Chooses which answered pictures are computed again without merging, one at a time. Thread-safe.

    While the device has nothing else to do, `fraction` of them; under load, when every sample costs others time,
    `min_fraction`. It counts rather than draws, so the shares hold over short times too.

    Args:
        fraction: of all pictures, as far as the device is idle.
        min_fraction: of all pictures, whatever the load.
    """

    def __init__(self, fraction: float, min_fraction: float) -> None:
        self._fraction = fraction
        self._min_fraction = min_fraction
        self._lock = threading.Lock()
        self._credit = 0.0
        self._min_credit = 0.0
        self._running = False

    def choose(self, *, idle: bool) -> str | None:
        """Count a picture, and say with which priority to compute it again, if at all; `finish` has to follow then.

        What fills an idle device is "bulk"; what is due under load is "interactive", or load would put it off.
        """
        with self._lock:
            self._credit = min(self._credit + self._fraction, _MAX_CREDIT)
            self._min_credit = min(self._min_credit + self._min_fraction, _MAX_CREDIT)
            due = _reached(self._min_credit)
            if self._running or not (due or (idle and _reached(self._credit))):
                return None
            self._credit = max(0.0, self._credit - 1)
            self._min_credit = max(0.0, self._min_credit - 1)
            self._running = True
            return "bulk" if idle else "interactive"

    def finish(self) -> None:
        """The picture that was chosen is through, or was given up."""
        with self._lock:
            self._running = False


class ComputeUnmerged(Protocol):
    """Computes a picture again without merging; the future gives its logits [num_windows, K, Gh, Gw]."""

    def __call__(self, picture: Picture, *, bulk: bool) -> "Future[Any]":
        """Bulk gives way to others."""


class Agreement:
    """Has some answered pictures computed again without merging, and reports how far the labels agree.

    Args:
        sampler: chooses them.
        compute_unmerged: computes a picture again.
        metrics: told of each comparison.
        classes, patch_size: of the model.
    """

    def __init__(
        self,
        sampler: Sampler,
        compute_unmerged: ComputeUnmerged,
        metrics: Metrics,
        classes: Classes,
        patch_size: int,
    ) -> None:
        self._sampler = sampler
        self._compute_unmerged = compute_unmerged
        self._metrics = metrics
        self._classes = classes
        self._patch_size = patch_size

    def consider(self, picture: Picture, logits: Tensor, *, idle: bool) -> None:
        """A picture was answered with these logits; it may be this one's turn."""
        priority = self._sampler.choose(idle=idle)
        if priority is not None:
            plan = picture.plan
            again = self._compute_unmerged(picture, bulk=priority == "bulk")
            again.add_done_callback(lambda done: self._compare(logits, plan, done))

    def _compare(self, merged: Tensor, plan: WindowPlan, again: "Future[Any]") -> None:
        try:
            if again.exception() is None:  # else it is in the log
                labels, expected = (
                    label_map(logits, plan, self._patch_size).labels for logits in (merged, again.result())
                )
                self._metrics.agreed(*compare_labels(labels, expected, self._classes))
        finally:
            self._sampler.finish()


def compare_labels(
    merged: np.ndarray, reference: np.ndarray, classes: Classes
) -> tuple[float, list[tuple[str, int, int]]]:
    """How far two label maps of one picture agree.

    Args:
        merged: [H, W] class ids with merging.
        reference: [H, W] class ids without.

    Returns:
        The share of equal pixels, and for each class of the reference its name and its pixels kept and changed.
    """
    equal = merged == reference
    total = np.bincount(reference.ravel(), minlength=len(classes))
    kept = np.bincount(reference[equal], minlength=len(classes))
    pixels = [(classes.names[i], int(kept[i]), int(total[i] - kept[i])) for i in np.flatnonzero(total).tolist()]
    return float(equal.mean()), pixels


def _reached(credit: float) -> bool:
    return credit > 1 - 1e-9  # a hundred hundredths add up to a little less than one
