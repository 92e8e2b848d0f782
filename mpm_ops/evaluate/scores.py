"""Scores from counts that add up over pictures, and their intervals by drawing pictures again."""

import math
from collections.abc import Mapping

import cv2
import numpy as np

BOUNDARY = 0.02  # of a picture's diagonal
QUANTILES = {"median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "max": 1.0}
DRAWS = 1000


def class_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [3, K]: pixels of each class that are predicted as it, all that are of it, and all predicted as it.

    Args:
        truth: [...] classes, -1 where a pixel does not count, whatever is predicted there.
        predicted: [...] classes.
    """
    counted = truth >= 0
    chosen = (truth[counted & (truth == predicted)], truth[counted], predicted[counted])
    return np.stack([np.bincount(classes, minlength=num_classes) for classes in chosen])


def boundary_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """`class_counts` of the pixels near a boundary of their class: of both maps, of the truth, of the prediction.

    Source: Boundary IoU (arXiv 2103.16562), with its distance of 2 % of the diagonal.
    """
    width = max(1, round(BOUNDARY * math.hypot(*truth.shape)))
    counted = truth >= 0
    of_truth, found = (counted & near_boundary(labels, width) for labels in (truth, predicted))
    chosen = (truth[of_truth & found & (truth == predicted)], truth[of_truth], predicted[found])
    return np.stack([np.bincount(classes, minlength=num_classes) for classes in chosen])


def near_boundary(labels: np.ndarray, width: int) -> np.ndarray:
    """bool [H, W]: a pixel of another label, or the outside, is within so many pixels across, down or both."""
    values, square = (labels + 1).astype(np.uint16), np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    near = cv2.erode(values, square) != cv2.dilate(values, square)
    near[:width] = near[-width:] = near[:, :width] = near[:, -width:] = True
    return near


def merge_distances(before: np.ndarray | None, after: np.ndarray, columns: int) -> np.ndarray:
    """Manhattan distances, in patches, of every token that a merge took away from the one that it went into.

    A token is where the first patch is that it stands for.

    Args:
        before, after: [N], maps from patches to tokens before and after the merge; None for one token a patch.
        columns: patches across.
    """
    own = np.arange(len(after)) if before is None else np.unique(before, return_index=True)[1]
    new = np.unique(after, return_index=True)[1][after[own]]
    gone = own != new
    down, across = (np.abs(a[gone] - b[gone]) for a, b in zip(divmod(own, columns), divmod(new, columns), strict=True))
    return down + across


def intersections_over_unions(counts: np.ndarray) -> np.ndarray:
    """[..., 3, K] of `class_counts` -> [..., K], NaN for classes that neither occur nor are predicted."""
    hits, truth, predicted = np.moveaxis(counts, -2, 0)
    with np.errstate(invalid="ignore"):
        return hits / (truth + predicted - hits)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Mean of `intersections_over_unions` over the classes that have one."""
    return _mean(intersections_over_unions(counts))


def scores(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score from sums over pictures, whose last axes are as in `Evaluation.sums`; other axes stay."""
    hits, truth, _ = np.moveaxis(sums["classes"], -2, 0)
    pixels = truth.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = intersections_over_unions(sums["classes"])
        found = {
            "mean_iou": _mean(iou),
            "pixel_accuracy": hits.sum(-1) / pixels,
            "mean_accuracy": _mean(hits / truth),
            "frequency_weighted_iou": np.where(truth > 0, truth * iou, 0).sum(-1) / pixels,
            "boundary_iou": mean_iou(sums["boundary"]),
            "agreement": sums["agreement"] / sums["pictures"],
            "tokens": sums["tokens"][..., -1] / sums["windows"],
            "tokens_per_block": sums["tokens_per_block"] / sums["windows"],
            "gflops": sums["flops"] / sums["windows"] / 1e9,
            "gflops_decoding_all": sums["flops_decoding_all"] / sums["windows"] / 1e9,
            "images_per_second": sums["pictures"] / sums["seconds"],
        }
        distances = sums["distances"]
        found["distance_mean"] = (distances * np.arange(distances.shape[-1])).sum(-1) / distances.sum(-1)
    for name, share in QUANTILES.items():
        found[f"distance_{name}"] = quantile(distances, share)
    for name, share in {"p5": 0.05, **QUANTILES}.items():
        found[f"tokens_{name}"] = quantile(sums["token_histogram"], share)
    return found


def quantile(histogram: np.ndarray, share: float) -> np.ndarray:
    """Least value v of [..., v] counts that this share does not exceed; NaN where nothing is counted."""
    total = histogram.sum(-1, keepdims=True)
    least = (histogram.cumsum(-1) >= share * total * (1 - 1e-12)).argmax(-1)
    return np.where(total[..., 0] > 0, least, np.nan)


def drawn_again(sums: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Sums over as many pictures, drawn with replacement; [P, ...] -> [DRAWS, ...], the same draws for all."""
    num_pictures = len(sums["pictures"])
    times = np.random.default_rng(seed).multinomial(num_pictures, [1 / num_pictures] * num_pictures, DRAWS)
    return {name: np.tensordot(times.astype(float), of_pictures, 1) for name, of_pictures in sums.items()}


def interval(draws: np.ndarray) -> tuple[float, float]:
    """What 95 % of the draws lie between."""
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(low), float(high)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last axis without its NaNs; NaN where there is nothing else."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(-1) / known.sum(-1)
