"""How the network between two merges runs: a runtime is chosen by name, once, and never changes by itself."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpm_ops.stages import Stage, WindowBatch

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

RUNTIMES = ("torch", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16")


class Runtime(Protocol):
    """Runs blocks and decoder; embedding and merging are the same whatever runs between them.

    Attributes:
        name: one of RUNTIMES.
        precision: one of PRECISIONS.
    """

    name: str
    precision: str

    def bucket(self, length: int) -> int:
        """The length at which a window of `length` tokens really runs; more than it where it is padded."""

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        """Run the encoder blocks of one stage; lengths and maps stay as they are."""

    def decode(self, batch: WindowBatch) -> Tensor:
        """Logits of every patch, float32 [B, N, K]: decoded on merged tokens, copied back last."""


def make_runtime(
    model: "Segmenter",
    name: str = "auto",
    precision: str = "auto",
    *,
    schedules: Sequence[Sequence[int]] = (),
    padded: bool = False,
    graph_bytes: int = 0,
) -> Runtime:
    """Build a runtime for a model's weights as they are now.

    "auto" takes OpenVINO for a model on a CPU where it is installed, torch elsewhere; and bf16 where the
    device multiplies it natively, fp32 elsewhere.

    Args:
        name: "auto", or one of RUNTIMES.
        precision: "auto", or one of PRECISIONS. Similarity is computed in float32 all the same.
        schedules: that will be run, beside the model's own.
        padded: see `Segmenter.run_blocks`; only torch pads.
        graph_bytes: what captured graphs of small groups may take on a GPU, see `GraphRuntime`; 0 captures none.

    Raises:
        ValueError: a name is unknown, or what it names can't run here.
    """
    for field, value, known in (("runtime", name, RUNTIMES), ("precision", precision, PRECISIONS)):
        if value not in ("auto", *known):
            raise ValueError(f"{field}: expected one of auto, {', '.join(known)}, got {value!r}")
    on_cpu = model.encoder.pos_embed.device.type == "cpu"
    if name == "auto":
        name = "openvino" if on_cpu and not padded and importlib.util.find_spec("openvino") else "torch"
    if graph_bytes and (on_cpu or padded):
        raise ValueError("graph_bytes: graphs are captured on a GPU and without padding, expected 0 here (graph_mib)")
    if name == "torch":
        from .eager import TorchRuntime
        from .graphs import GraphRuntime

        precision = _torch_precision(precision, on_cpu=on_cpu)
        if graph_bytes:
            return GraphRuntime(model, precision, budget_bytes=graph_bytes)
        if on_cpu:
            return TorchRuntime(model, precision, padded=padded)
        return TorchRuntime(model, precision, padded=padded, attention="grouped" if padded else "auto")
    if not on_cpu or padded:
        raise ValueError(
            "runtime: openvino runs on the CPU, window by window; expected a model on the CPU and no padding"
        )
    from .openvino import OpenVINORuntime, resolve_precision

    return OpenVINORuntime(model, resolve_precision(precision), (model.schedule, *schedules))


def _torch_precision(precision: str, *, on_cpu: bool) -> str:
    if precision != "auto":
        return precision
    if on_cpu:
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"  # emulated elsewhere, and far slower
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
