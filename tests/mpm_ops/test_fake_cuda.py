"""The GPU's code path without a GPU: tensors that have a shape, a type and a device but no numbers.

They find what meets on two devices or in two types, and shapes that don't fit. Whatever asks for a number gets one
that fits: lengths after a merge, and zeros for labels.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from mpm_ops import Segmenter, labels
from mpm_ops.kernels import has_triton
from mpm_ops.packed import bounds_of
from mpm_ops.runtime import PRECISIONS, Runtime, make_runtime
from mpm_ops.runtime.graphs import Captured, GraphRuntime
from mpm_ops.windows import WindowPlan

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install -e '.[kernels]'"),
]
MERGED = 12  # tokens that a merge leaves of any window


class Answers(TorchFunctionMode):
    """What a build for CPUs can't do with tensors of another device, and numbers that aren't there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            kwargs.pop("pin_memory", None)
        if func is Tensor.to and _target(args, kwargs).startswith("cuda"):
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


def some_bounds(bounds: Tensor) -> list[int]:
    """Where sequences start after a merge."""
    return [0, *accumulate([MERGED] * (len(bounds) - 1))]


def _index(x: Tensor, index: Any) -> Tensor:
    """Index a tensor of the same shape on the CPU, whose build indexes no others."""
    parts = index if isinstance(index, tuple) else (index,)
    assert all(part.device == x.device for part in parts if isinstance(part, Tensor)), "indices on another device"
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    at = tuple(torch.empty(part.shape, dtype=part.dtype) if isinstance(part, Tensor) else part for part in parts)
    found = there[at]
    return torch.empty_strided(found.shape, found.stride(), dtype=x.dtype, device=x.device)


def _target(args: Any, kwargs: Any) -> str:
    return str(kwargs.get("device", args[1] if len(args) > 1 and isinstance(args[1], str | torch.device) else ""))


@pytest.fixture
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(FakeTensor, "tolist", some_bounds)
    monkeypatch.setattr(nn.Module, "_apply", replace_parameters)
    caches = (bounds_of, labels._axes_on)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def replace_parameters(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """As `nn.Module._apply` does with tensors that have numbers."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(change(parameter), requires_grad=False))
    return module


def on_cuda(model: Segmenter) -> Segmenter:
    replace_parameters(model, lambda p: torch.empty(p.shape, dtype=p.dtype, device="cuda"))
    return model


def rerun(function: Callable[[], Tensor]) -> Captured:
    result = function()
    return lambda: result.copy_(function()), result


def graphs(model: Segmenter, precision: str) -> Runtime:
    return GraphRuntime(model, precision, budget_bytes=2**30, capture=rerun, reserved=lambda: 0)


def plain(model: Segmenter, precision: str) -> Runtime:
    return make_runtime(model, "auto", precision)


def padded(model: Segmenter, precision: str) -> Runtime:
    return make_runtime(model, "torch", precision, padded=True)


CASES: list[tuple[dict[str, Any], str, Callable[..., Runtime]]] = [
    ({}, precision, make) for precision in PRECISIONS for make in (plain, padded, graphs)
]
CASES += [(fields, "bf16", plain) for fields in ({"distilled": True}, {"decoder": "linear"}, {"schedule": ()})]
CASES += [(fields, "fp32", graphs) for fields in ({"distilled": True}, {"schedule": ()})]


@pytest.mark.usefixtures("_fake_gpu")
@pytest.mark.parametrize(
    ("fields", "precision", "make"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
@torch.inference_mode()
def test_devices_and_types_agree(
    fields: dict[str, Any], precision: str, make: Callable[..., Runtime], tiny_model: Callable[..., Segmenter]
) -> None:
    model = tiny_model(**{"schedule": (1, 2), **fields})
    with FakeTensorMode(), Answers():
        model.runtime = make(on_cuda(model), precision)
        assert (model.runtime.name, model.runtime.precision) == ("torch", precision)
        for _ in range(4 if make is graphs else 1):  # captured at the third time
            logits = model.window_logits(torch.empty(3, 3, 64, 64, device="cuda"))
            assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (3, 5, 4, 4))
        if isinstance(model.runtime, GraphRuntime):
            assert model.runtime.policy.counts["replay"] > 0
        plan = WindowPlan((70, 100), (64, 92), (64, 92), 64, (0,), (0, 14, 28))
        assert labels.label_map(logits, plan, 16).labels.shape == (70, 100)


@pytest.mark.usefixtures("_fake_gpu")
def test_what_meets_on_two_devices_is_found(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1, 2))
    with FakeTensorMode(), Answers():
        model.runtime = plain(on_cuda(model), "fp32")
        with pytest.raises(RuntimeError, match=r"two devices|same device"):
            model.window_logits(torch.empty(3, 3, 64, 64))
