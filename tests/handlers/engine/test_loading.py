"""Where a model goes when it is loaded."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from handlers.config import ServingConfig
from handlers.engine import loading
from handlers.engine.loading import find_device, load_engine
from mpm_ops import load_segmenter
from mpm_ops.bench.model import DEMO

pytest_plugins = ("tiny_server",)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert find_device("auto") == torch.device(expected)
        assert find_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cuda") == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"^device: expected one of the 2 GPUs that torch sees, got cuda:2$"):
        find_device("cuda:2")


def test_a_model_is_loaded_to_its_device_and_only_the_engine_builds_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []

    def load(*arguments: Any, device: torch.device, **options: Any) -> Any:
        devices.append(device)
        return load_segmenter(*arguments, device=device, **options)

    monkeypatch.setattr(loading, "load_segmenter", load)
    with closing(load_engine(DEMO.parent, ServingConfig(device="cpu", precision="fp32"))) as engine:
        assert devices == [torch.device("cpu")]
        assert engine._model._runtime is None


@pytest.mark.parametrize(
    ("set_to", "requested", "usable", "expected"), [(0, None, 2, 2), (0, "1", 2, 1), (0, "64", 2, 2), (2, "1", 1, 2)]
)
def test_threads_are_those_of_the_configuration_or_of_the_container(
    set_to: int,
    requested: str | None,
    usable: int,
    expected: int,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(loading, "usable_cores", lambda: usable)
    if requested:
        monkeypatch.setenv("MPM_CORES", requested)
    try:
        with closing(load_engine(checkpoint.parent, ServingConfig(schedule=(), torch_threads=set_to))) as engine:
            assert torch.get_num_threads() == expected
            assert len(engine._loop.streams) == (expected if expected > 1 else 0), "one a core"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["", "0", "two", "-1", "1.5"])
def test_cores_that_are_no_number_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPM_CORES", text)
    with pytest.raises(ValueError, match=f"^MPM_CORES: expected a number of cores >= 1, got '{text}'"):
        load_engine(DEMO.parent, ServingConfig())
