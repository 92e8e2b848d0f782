"""Small pictures, a server that computes nothing, and locust as a process."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer
from locust_runs import Run
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three pictures of two sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(0)
    for i, (height, width) in enumerate(((48, 64), (64, 48), (64, 48))):
        coarse = dice.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        Image.fromarray(coarse.repeat(16, 0).repeat(16, 1)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def run_locust(fake: FakeServer, pictures: Path, tmp_path: Path) -> Run:
    return Run(fake, pictures, tmp_path)
