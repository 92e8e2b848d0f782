"""What tests of several packages share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Example pictures and class lists; tests that need them are skipped where there are none."""
    root = Path(os.environ.get("MPM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no example data at {root}; set MPM_DATA")
    return root


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., Segmenter]:
    """Builds a small Segmenter with seeded random weights; keywords are its config's, schedule, align and seed."""
    return _tiny_model


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with one and with two torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _tiny_model(
    *,
    schedule: tuple[int, ...] = (),
    align: int = 1,
    seed: int = 0,
    inference: InferenceConfig | None = None,
    **fields: Any,
) -> Segmenter:
    shape: dict[str, Any] = {
        "image_size": (64, 64),
        "patch_size": 16,
        "d_model": 64,
        "n_heads": 1,
        "n_layers": 3,
        "n_cls": 5,
    }
    config = SegmenterConfig(**(shape | fields))
    side = config.image_size[0]
    inference = inference or InferenceConfig(
        im_size=side, max_ratio=4, window_size=side, window_stride=side, normalization="vit"
    )
    model = Segmenter(config, inference, schedule=schedule, align=align)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
