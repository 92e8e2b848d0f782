"""How the network runs, by name: a runtime is chosen once and never changes by itself.

To add one: write its file here, a `Runtime`, and name it in RUNTIMES, in the order in which "auto" tries them.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .base import PRECISIONS, Runtime

if TYPE_CHECKING:
    from mpm_ops.merging import Merger
    from mpm_ops.segmenter import Segmenter

__all__ = ["PRECISIONS", "RUNTIMES", "Runtime", "make_runtime"]


def _openvino() -> type[Runtime]:
    if importlib.util.find_spec("openvino") is None:
        raise ValueError("runtime: openvino needs the package openvino, which is not installed")
    from .openvino import OpenVINORuntime

    return OpenVINORuntime


def _torch() -> type[Runtime]:
    from .eager import TorchRuntime

    return TorchRuntime


# Imported when asked for: not every package is everywhere.
RUNTIMES: Mapping[str, Callable[[], type[Runtime]]] = {"openvino": _openvino, "torch": _torch}


def make_runtime(
    model: "Segmenter",
    name: str = "auto",
    precision: str = "auto",
    *,
    mergers: Sequence["Merger"] = (),
    graph_bytes: int = 0,
    threads: int = 0,
    streams: int | str = 1,
) -> Runtime:
    """Build a runtime for a model's weights as they are now.

    "auto" takes OpenVINO for a model on a CPU where it is installed, torch elsewhere; and bf16 where the
    device multiplies it natively, fp32 elsewhere.

    Args:
        name: "auto", or one of RUNTIMES.
        precision: "auto", or one of PRECISIONS.
        mergers: that will be run, beside the model's own.
        graph_bytes: what captured graphs may take on a GPU, see `GraphRuntime`; 0 captures none.
        threads: of OpenVINO; 0 for `usable_cores`. Torch has threads of its own.
        streams: into which OpenVINO divides them, see `Runtime.streams`; "auto" for one a core, 1 for none.

    Raises:
        ValueError: a name is unknown, or what it names can't run here.
    """
    for field, value, known in (("runtime", name, RUNTIMES), ("precision", precision, PRECISIONS)):
        if value not in ("auto", *known):
            raise ValueError(f"{field}: expected one of auto, {', '.join(known)}, got {value!r}")
    kind = _first_that_runs(model) if name == "auto" else RUNTIMES[name]()
    if obstacle := kind.obstacle(model):
        raise ValueError(f"runtime: {kind.name} {obstacle}")
    return kind.build(
        model,
        precision,
        mergers=(model.merger, *mergers),
        graph_bytes=graph_bytes,
        threads=threads,
        streams=streams,
    )


def _first_that_runs(model: "Segmenter") -> type[Runtime]:
    for name, load in RUNTIMES.items():
        if importlib.util.find_spec(name) and load().obstacle(model) is None:
            return load()
    raise ValueError(f"runtime: none of {', '.join(RUNTIMES)} can run this model here")
