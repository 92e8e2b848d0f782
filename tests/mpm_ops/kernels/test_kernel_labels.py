"""The label kernel against `label_tiles` and against upsampling every class."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops.axes import axes
from mpm_ops.bench.labels import plain_way
from mpm_ops.kernels.labels import label_pixels
from mpm_ops.labels import label_map, label_maps, label_tiles
from mpm_ops.windows import InferenceConfig, WindowPlan, plan_windows

NEAR_TIE = 1e-5

pytestmark = [
    pytest.mark.usefixtures("_poisoned", "_on_gpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter
]


@pytest.fixture
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpm_ops.labels.can_label_on_gpu", lambda logits: True)


def plan_of(height: int, width: int, *, side: int = 64, stride: int = 48) -> WindowPlan:
    return plan_windows(
        height,
        width,
        InferenceConfig(
            im_size=side, max_ratio=4, window_size=side, window_stride=min(stride, side), normalization="vit"
        ),
    )


def panorama(height: int, width: int) -> WindowPlan:
    """Overlapping windows in a frame as wide as the picture, which is squashed to the few rows that a test can do."""
    lefts = (*range(0, width - 64, 48), width - 64)
    return WindowPlan((height, width), (64, width), (64, width), 64, (0,), lefts)


def logits_of(plan: WindowPlan, num_classes: int, patch: int, device: torch.device, *, levels: int = 0) -> Tensor:
    """Random logits; with levels they are small whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(num_classes + plan.num_windows)
    grid = -(-plan.window_size // patch)
    shape = (plan.num_windows, num_classes, grid, grid)
    if levels:
        return torch.randint(levels, shape, generator=generator).float().to(device)
    return torch.randn(shape, generator=generator).to(device)


def by_tiles(logits: Tensor, plan: WindowPlan, patch: int) -> np.ndarray:
    grid = (logits.shape[2], logits.shape[3])
    rows, columns = axes(plan, grid, patch)
    windows = logits.unflatten(0, (len(plan.tops), len(plan.lefts)))
    tokens = windows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
    labels = np.empty(plan.original_size, np.uint16)
    return label_tiles(tokens, rows, columns, labels, confidence=False).labels


@pytest.mark.parametrize(
    ("plan", "num_classes", "patch"),
    [
        (plan_of(1, 1), 150, 16),
        (plan_of(7, 63), 5, 16),
        (plan_of(16, 16, side=16, stride=16), 1, 16),
        (panorama(1, 789), 150, 16),
        (plan_of(4, 5), 257, 16),
        (plan_of(6, 11), 65, 20),  # patches that do not fill the window
        (plan_of(9, 7), 3, 32),  # few pixels, each of many tokens
        pytest.param(plan_of(130, 100), 4, 16, marks=pytest.mark.slow),
        pytest.param(plan_of(63, 63), 150, 16, marks=pytest.mark.slow),
        pytest.param(panorama(5, 789), 150, 16, marks=pytest.mark.slow),
    ],
    ids=lambda value: "x".join(map(str, value.original_size)) if isinstance(value, WindowPlan) else str(value),
)
def test_labels_are_the_plain_ways(plan: WindowPlan, num_classes: int, patch: int, device: torch.device) -> None:
    logits = logits_of(plan, num_classes, patch, device)
    found = label_map(logits, plan, patch).labels
    assert found.dtype == (np.uint8 if num_classes <= 256 else np.uint16)
    best = plain_way(logits.cpu(), plan, patch).topk(min(2, num_classes), dim=0)
    decided = (best.values[0] - best.values[-1] > NEAR_TIE).numpy() | (num_classes == 1)
    assert decided.mean() > 0.99
    assert (found == best.indices[0].numpy())[decided].all()
    assert (found == by_tiles(logits, plan, patch))[decided].all()


@pytest.mark.parametrize("num_classes", [2, 64, 150])
def test_of_equal_classes_the_lowest_wins_as_in_the_specification(num_classes: int, device: torch.device) -> None:
    # Weights are multiples of 1/32 and logits whole numbers, so sums are exact in any order.
    plan = plan_of(32, 32, side=32)
    logits = logits_of(plan, num_classes, 16, device, levels=3)
    values = plain_way(logits.cpu(), plan, 16)
    assert ((values == values.max(dim=0).values).sum(dim=0) > 1).float().mean() > (0.05 if num_classes == 2 else 0.5)
    assert np.array_equal(label_map(logits, plan, 16).labels, by_tiles(logits, plan, 16))


def test_equal_logits_everywhere_give_the_first_class(device: torch.device) -> None:
    plan = plan_of(3, 63)
    assert not label_map(torch.full((plan.num_windows, 66, 4, 4), -7.0, device=device), plan, 16).labels.any()


def test_half_precision_and_strided_logits(device: torch.device) -> None:
    plan = plan_of(3, 63)
    logits = logits_of(plan, 5, 16, device).half()
    turned = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = by_tiles(logits.float(), plan, 16)
    for given in (logits, turned):
        assert (label_map(given, plan, 16).labels == expected).mean() > 0.999


@pytest.mark.parametrize(("plan", "num_classes"), [(plan_of(3, 63), 5), (plan_of(6, 11), 257)])
def test_pictures_of_one_plan_are_labelled_in_one_launch(
    plan: WindowPlan, num_classes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (plan.num_windows, 4, 4, num_classes)  # as the network gives them
    many = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3)]
    many = [logits.movedim(-1, 1) for logits in many]
    expected = [label_map(logits, plan, 16).labels for logits in many]
    launches: list[int] = []

    def count(logits: Tensor, *arguments: object) -> Tensor:
        launches.append(len(logits))
        return label_pixels(logits, *arguments)

    monkeypatch.setattr("mpm_ops.kernels.labels.label_pixels", count)
    found = label_maps(many, plan, 16)
    assert launches == [3]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not np.array_equal(found[0], found[1])


def test_refuses_what_it_would_read_wrongly(device: torch.device) -> None:
    logits = torch.zeros(1, 1, 1, 4, 4, 5, device=device)
    for wrong in (logits.half(), logits.movedim(-1, 3), logits[0]):
        with pytest.raises(ValueError, match=r"^logits: expected contiguous float32 \[P, windows down,"):
            label_pixels(wrong, [], [], 16)
