"""Launching a group without waiting for the device, on a GPU that only pretends."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fake_cuda import fake_gpu, on_cuda
from making import LANE, make_picture

from handlers.engine.computing import Computer
from handlers.engine.lane import Lane
from handlers.engine.request import Group, Window
from mpm_ops import Segmenter
from mpm_ops.kernels import has_triton
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.eager import TorchRuntime
from mpm_ops.stages import WindowView

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install -e '.[kernels]'"),
]


@pytest.mark.parametrize("schedule", [(1, 2), ()])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_finishing_waits_and_only_for_its_own_group(
    schedule: tuple[int, ...], precision: str, tiny_model: Callable[..., Segmenter]
) -> None:
    model = tiny_model(schedule=schedule)
    lane = Lane(0, "a", len(model.stages))
    picture = make_picture(lane=lane)
    with fake_gpu() as log:
        on_cuda(model)
        windows = [Window(picture, lane, 17, torch.empty(3, 64, 64, device="cuda"), [16]) for _ in range(3)]
        computer = Computer(model, make_runtime(model, "auto", precision), {"a": model.stages})
        for stage in model.stages:
            group = Group(replace(lane, stage=stage.index), tuple(windows), "idle")
            before = [contents(window) for window in windows]
            log.clear()
            finish = computer.launch(group)
            assert set(log) == {"mark"}, "launching waits for the device"
            assert [contents(window) for window in windows] == before, "launching changed a window"
            log.clear()
            seconds, merge_seconds = finish()
            assert log[0] == "wait"
            assert "mark" not in log, "it would wait for what was launched since"
            assert (seconds, merge_seconds) == (0.001, 0.001 if stage.merges else None)
            for window in windows:
                assert isinstance(window.state, WindowView) == stage.merges
    assert [window.lengths for window in windows] == [[16, *([11] * len(schedule))]] * 3
    assert all(window.logits is not None and window.logits.shape == (5, 16) for window in windows)
    assert all(window.is_finite is True for window in windows)


def contents(window: Window) -> tuple[object, ...]:
    """What a window holds, its lists as they are now."""
    return id(window.state), tuple(window.lengths), window.logits, window.merge_map


@pytest.mark.parametrize("merges", [False, True])
def test_a_group_can_be_launched_again(merges: bool, tiny_model: Callable[..., Segmenter]) -> None:
    schedule = (1,) if merges else ()
    model = tiny_model(schedule=schedule)
    computer = Computer(model, make_runtime(model, "torch", "fp32"), {"a": model.stages})
    lane = Lane(0, "a", len(model.stages))
    picture = make_picture(lane=lane)
    window = Window(picture, lane, 17, torch.randn(3, 64, 64), [16])
    group = Group(lane, (window,), "idle")
    computer.launch(group)  # what was launched is forgotten, as after a failure
    computer.launch(group)()
    assert len(window.lengths) == 1 + merges


class Bucketed(TorchRuntime):
    def bucket(self, length: int) -> int:
        return -(-length // 16) * 16


def test_a_group_tells_its_padding(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1,))
    computer = Computer(model, Bucketed(model), {LANE.merger: model.stages})
    picture = make_picture(lane=LANE)
    windows = [Window(picture, LANE, 17, torch.randn(3, 64, 64), [16]) for _ in range(3)]
    first = Group(LANE, tuple(windows), "idle")
    computer.launch(first)()
    assert first.padding_tokens == 0, "windows as they come are no sequences yet"
    second = Group(LANE.next, tuple(windows), "idle")
    computer.launch(second)  # forgotten, as after a failure
    computer.launch(second)()
    assert second.padding_tokens == sum(-(1 + window.lengths[1]) % 16 for window in windows) > 0
