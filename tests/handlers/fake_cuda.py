"""A GPU that only pretends: tensors that have a shape, a type and a device but no numbers, and a log of who waits.

They find what meets on two devices or in two types, and shapes that don't fit. Whatever asks for a number gets one
that fits: lengths after a merge, and zeros for labels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from mpm_ops import Segmenter, attention, labels
from mpm_ops.packed import bounds_of
from mpm_ops.runtime.graphs import Captured, Results

MERGED = 12  # tokens that a merge leaves of any window


@contextmanager
def fake_gpu() -> Iterator[list[str]]:
    """Pretend that there is a GPU.

    Yields:
        What the host did, in order: "mark" (an event), "wait" (for the device), "read" (numbers that were fetched).
    """
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            pass

        def record(self, stream: object) -> None:
            log.append("mark")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            assert log[-1] == "wait"
            return 1.0

    def some_bounds(bounds: Tensor) -> list[Any]:
        """Where sequences start after a merge; or that all is finite."""
        assert bounds.device.type == "cpu", "read from the device, which waits"
        log.append("read")
        return [True] * len(bounds) if bounds.dtype == torch.bool else [0, *accumulate([MERGED] * (len(bounds) - 1))]

    caches = (bounds_of, labels._axes_on)
    for cache in caches:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Answers(log):
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda *_: None)
        patch.setattr(FakeTensor, "tolist", some_bounds)
        patch.setattr(FakeTensor, "record_stream", lambda *_: None)
        patch.setattr(nn.Module, "_apply", replace_parameters)
        yield log
    for cache in caches:
        cache.cache_clear()


class Answers(TorchFunctionMode):
    """What a build for CPUs can't do with tensors of another device, and numbers that aren't there."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = _target(func, args, kwargs)
        if target and _crosses(func, args, target) and not kwargs.get("non_blocking"):
            self._log.append("wait")
        if func is torch.tensor:
            kwargs.pop("pin_memory", None)
        if func is Tensor.to and target.startswith("cuda"):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if func is Tensor.__deepcopy__:  # torch's own copies the mode, too
            return nn.Parameter(torch.empty_like(args[0]), requires_grad=False)
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _index(*args)
        if func is Tensor.__setitem__ and args[0].is_cuda:
            _index(*args[:2])
            assert not isinstance(args[2], Tensor) or args[2].device == args[0].device, "set from another device"
            return None
        if func is Tensor.copy_ and args[0].is_cuda:
            assert args[1].device == args[0].device, "copied from another device"
            assert args[1].shape == args[0].shape, (args[1].shape, args[0].shape)
            return args[0]
        if func is Tensor.numpy:
            return np.zeros(args[0].shape, np.uint8)
        return func(*args, **kwargs)


def _index(x: Tensor, index: Any) -> Tensor:
    """Index a tensor of the same shape on the CPU, whose build indexes no others."""
    parts = index if isinstance(index, tuple) else (index,)
    assert all(part.device == x.device for part in parts if isinstance(part, Tensor)), "indices on another device"
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    at = tuple(torch.empty(part.shape, dtype=part.dtype) if isinstance(part, Tensor) else part for part in parts)
    found = there[at]
    return torch.empty_strided(found.shape, found.stride(), dtype=x.dtype, device=x.device)


def _target(func: Any, args: Any, kwargs: Any) -> str:
    """The device that a tensor is made on or copied to; empty where that is not what the function does."""
    if func is Tensor.cpu:
        return "cpu"
    if func not in (torch.tensor, Tensor.to):
        return ""
    return str(kwargs.get("device", args[1] if len(args) > 1 and isinstance(args[1], str | torch.device) else ""))


def _crosses(func: Any, args: Any, target: str) -> bool:
    return target.startswith("cuda") != (func is not torch.tensor and args[0].is_cuda)


def replace_parameters(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """As `nn.Module._apply` does with tensors that have numbers."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(change(parameter), requires_grad=False))
    return module


def on_cuda(model: Segmenter) -> Segmenter:
    replace_parameters(model, lambda p: torch.empty(p.shape, dtype=p.dtype, device="cuda"))
    return model


class Rerun:
    """Graphs that run the function again on its buffers, which is all that a real one does.

    Args:
        growth: bytes by which the memory that they share grows with each.
        fault: raised in place of capturing.
    """

    def __init__(self, growth: int = 0, fault: Exception | None = None) -> None:
        self.growth = growth
        self.fault = fault
        self.attempts = 0
        self.renewed = 0
        self._pool = 0

    def __call__(self, function: Callable[[], Results]) -> Captured:
        self.attempts += 1
        if self.fault is not None:
            raise self.fault
        results = function()
        self._pool += self.growth
        return lambda: [r.copy_(new) for r, new in zip(results, function(), strict=True)], results

    def pool_bytes(self) -> int:
        return self._pool

    def renew(self) -> None:
        self.renewed += 1
        self._pool = 0


def attend_by_bounds(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
    """A kernel over ragged sequences that knows nothing but the bounds on its device."""
    assert bounds[-1] == len(q)
    assert int(bounds.diff().max()) <= longest
    parts = zip(*(part.split(bounds.diff().tolist()) for part in (q, k, v)), strict=True)
    out = [(a.transpose(0, 1) @ b.permute(1, 2, 0) * scale).softmax(-1) @ c.transpose(0, 1) for a, b, c in parts]
    return torch.cat([o.transpose(0, 1) for o in out])


def compute_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CPU do what a GPU does: attention by the bounds, named flash, and all windows decoded at once."""
    monkeypatch.setitem(attention._PACKED, "flash", attend_by_bounds)
    monkeypatch.setattr(attention, "ATTENTIONS", ("flash", "grouped"))  # triton's interpreter knows no bfloat16
    monkeypatch.setattr("mpm_ops.attention.attention_obstacle", lambda *_: None)
    for module in ("decoders", "segmenter"):
        monkeypatch.setattr(f"mpm_ops.{module}.decodes_together", lambda values: True)
