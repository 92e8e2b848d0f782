"""Kinds of checkpoints, by name: which files each recognises, and how they become a network.

To add one: write its file here, with `recognises(path)` and `build(path, inference)`, and name it in MODELS. What it
builds is a `Segmenter` or computes as one does: `embed`, `run_parts`, `score`, a `tower` for mergers, and logits of
every patch, of which `label_map` makes labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpm_ops.merging import make_merger
from mpm_ops.runtime import make_runtime
from mpm_ops.segmenter import Segmenter

from . import segmenter
from .segmenter import CheckpointError, read_variant, read_weights, trained_on

__all__ = ["MODELS", "CheckpointError", "ModelKind", "load_segmenter", "read_variant", "read_weights", "trained_on"]


@dataclass(frozen=True, slots=True)
class ModelKind:
    """An entry of MODELS.

    Attributes:
        recognises: whether a file is of this kind, without reading all of it.
        build: a network in float32 and evaluation mode from it, with fields of `InferenceConfig` to override.
    """

    recognises: Callable[[Path], bool]
    build: Callable[[Path, Mapping[str, Any]], Segmenter]


MODELS: Mapping[str, ModelKind] = {"segmenter": ModelKind(segmenter.recognises, segmenter.build)}


def load_segmenter(
    path: str | Path,
    schedule: Sequence[int] = (),
    align: int = 1,
    *,
    merger: str | None = None,
    inference: Mapping[str, Any] | None = None,
    runtime: str = "torch",
    precision: str | None = None,
    device: str | torch.device = "cpu",
) -> Segmenter:
    """Load a checkpoint of one of MODELS, such as an official Segmenter's, and say how its tokens merge.

    Nothing is downloaded and no code in the files is run.

    Args:
        path: `checkpoint.pth`; an official Segmenter's `variant.yml` is read from the same folder.
        schedule: encoder blocks before which tokens merge, 0-based; () for no merging, (2, 5) as in the paper.
        align: see `merge_tokens`.
        merger: another way to merge, such as "tome:r=46" or "algm", instead of a schedule; see `make_merger`.
        inference: fields of `InferenceConfig` that override the checkpoint's.
        runtime: what blocks and decoder run on, see `make_runtime`; "auto" is the servers' default.
        precision: "auto", "fp32", "bf16" or "fp16"; by default "auto" for runtime "auto", as the servers have it,
            and "fp32" otherwise.
        device: where the model goes.

    Returns:
        A float32 Segmenter in evaluation mode.

    Raises:
        FileNotFoundError: either file is missing.
        CheckpointError: a file is unreadable, or keys are missing, unexpected or of another shape.
        ValueError: the schedule, align, merger or inference do not fit the network, or the runtime can't run here.

    Source: rstrudel/segmenter@20d1bfad, `segm/model/factory.py`.
    """
    path = Path(path)
    kind = next((kind for kind in MODELS.values() if kind.recognises(path)), None)
    if kind is None:
        raise CheckpointError(f"{path}: expected a file of one of {', '.join(MODELS)}, such as checkpoint.pth")
    model = kind.build(path, inference or {})
    if merger is None:
        model.merger = model.mpm(schedule, align)
    elif schedule or align != 1:
        raise ValueError(f"merger: expected no schedule and align beside it, got {merger!r} and {tuple(schedule)}")
    else:
        model.merger = make_merger(merger, model.tower)
    model.to(device)
    if precision is None:
        precision = "auto" if runtime == "auto" else "fp32"
    if (runtime, precision) != ("torch", "fp32"):  # what it builds by itself, when it is first asked for it
        model.runtime = make_runtime(model, runtime, precision)
    return model
