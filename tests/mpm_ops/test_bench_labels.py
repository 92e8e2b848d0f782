"""Labels are timed only where they are the plain way's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpm_ops import InferenceConfig, Segmenter
from mpm_ops.bench import labels as bench_labels
from mpm_ops.bench.labels import check_labels
from mpm_ops.labels import LabelMap, label_map


@pytest.fixture
def model(tiny_model: Callable[..., Segmenter]) -> Segmenter:
    inference = InferenceConfig(im_size=64, max_ratio=4, window_size=64, window_stride=64, normalization="vit")
    return tiny_model(inference=inference)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def test_every_case_is_timed_both_ways(model: Segmenter) -> None:
    results = bench_labels.bench_labels(model, [picture()], repeats=1)
    assert [result["case"].split(",")[0] for result in results] == 2 * ["picture 0"] + 2 * ["picture 1"] + 2 * [
        "random logits"
    ]
    assert all(set(result["median_ms"]) == {"plain", "cells"} for result in results)


def test_wrong_labels_are_not_timed(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **options: object) -> LabelMap:
        found = label_map(*args, **options)  # type: ignore[arg-type]
        found.labels[0, 0] ^= 1
        return found

    monkeypatch.setattr(bench_labels, "label_map", wrong)
    with pytest.raises(RuntimeError, match="parity: 1 of 4096 labels differ"):
        bench_labels.bench_labels(model, [picture()], repeats=1)


def test_near_ties_are_counted_and_forgiven() -> None:
    logits = torch.tensor([1.0, 1.0 + 1e-6, 0.0])[:, None, None].expand(3, 2, 2)
    assert check_labels(np.array([[0, 1], [1, 0]]), logits) == 1
    with pytest.raises(RuntimeError, match="parity"):
        check_labels(np.array([[0, 1], [1, 0]]), logits * torch.tensor([1.0, 2.0, 1.0])[:, None, None])
