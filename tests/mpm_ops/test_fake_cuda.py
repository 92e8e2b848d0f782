"""The GPU's code path without a GPU, see `fake_cuda`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import Rerun, fake_gpu, on_cuda

from mpm_ops import Segmenter, labels
from mpm_ops.kernels import has_triton
from mpm_ops.runtime import PRECISIONS, Runtime, make_runtime
from mpm_ops.runtime.eager import TorchRuntime
from mpm_ops.runtime.graphs import GraphRuntime
from mpm_ops.windows import WindowPlan

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install -e '.[kernels]'"),
]


def graphs(model: Segmenter, precision: str) -> Runtime:
    return GraphRuntime(model, precision, budget_bytes=2**30, capture=Rerun())


def plain(model: Segmenter, precision: str) -> Runtime:
    return make_runtime(model, "auto", precision)


CASES: list[tuple[dict[str, Any], str, Callable[..., Runtime]]] = [
    ({}, precision, make) for precision in PRECISIONS for make in (plain, graphs)
]
CASES += [(fields, "bf16", plain) for fields in ({"distilled": True}, {"decoder": "linear"}, {"schedule": ()})]
CASES += [(fields, "fp32", graphs) for fields in ({"distilled": True}, {"schedule": ()})]


@pytest.mark.parametrize(
    ("fields", "precision", "make"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
@torch.inference_mode()
def test_devices_and_types_agree(
    fields: dict[str, Any], precision: str, make: Callable[..., Runtime], tiny_model: Callable[..., Segmenter]
) -> None:
    model = tiny_model(**{"schedule": (1, 2), **fields})
    with fake_gpu():
        model.runtime = make(on_cuda(model), precision)
        assert (model.runtime.name, model.runtime.precision) == ("torch", precision)
        for _ in range(4 if make is graphs else 1):  # captured at the third time
            logits = model.window_logits(torch.empty(3, 3, 64, 64, device="cuda"))
            assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (3, 5, 4, 4))
        if isinstance(model.runtime, GraphRuntime):
            assert model.runtime.policy.counts["replay"] > 0
        plan = WindowPlan((70, 100), (64, 92), (64, 92), 64, (0,), (0, 14, 28))
        assert labels.label_map(logits, plan, 16).labels.shape == (70, 100)


def test_what_meets_on_two_devices_is_found(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(schedule=(1, 2))
    with fake_gpu():
        model.runtime = plain(on_cuda(model), "fp32")
        with pytest.raises(RuntimeError, match=r"two devices|same device"):
            model.window_logits(torch.empty(3, 3, 64, 64))


@pytest.mark.parametrize("make", [plain, graphs])
@torch.inference_mode()
def test_a_merge_is_launched_without_waiting(
    make: Callable[..., Runtime], tiny_model: Callable[..., Segmenter]
) -> None:
    model = tiny_model(schedule=(1, 2))
    with fake_gpu() as log:
        runtime = make(on_cuda(model), "bf16")
        batch = model.embed(torch.empty(3, 3, 64, 64, device="cuda"))
        for stage in model.stages[:2]:  # the second extends the maps of the first
            assert isinstance(runtime, TorchRuntime)
            batch = runtime.run_blocks(stage, batch)
            log.clear()
            assert stage.merger is not None
            merging = stage.merger.launch(batch)
            assert log == ["mark"]
            batch = merging()
            assert log == ["mark", "wait", "read"]
            assert batch.tokens.lengths == (12, 12, 12)


def test_a_model_that_is_moved_before_its_first_use_computes_as_suits_the_device(
    tiny_model: Callable[..., Segmenter],
) -> None:
    model = tiny_model()
    with fake_gpu():
        on_cuda(model)
        assert isinstance(model.runtime, TorchRuntime)
        assert model.runtime is model.runtime
        backends = {getattr(part, "attention_backend", None) for part in model.runtime._network.modules()}
        assert backends == {None, "efficient"}
        assert not hasattr(model.encoder.blocks[0].attn, "attention_backend"), "other runtimes keep their attention"
