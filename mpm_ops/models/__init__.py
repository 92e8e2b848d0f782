"""Kinds of checkpoints, by name: which files each recognises, and how they become a network.

To add one: write its file here, with `recognises`, `build` and `copy`, and name it in MODELS. What it builds is a
`Segmenter` or computes as one does: `embed`, `run_parts`, `score`, a `tower` for mergers, and logits of every patch,
of which `label_map` makes labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpm_ops.merging import make_merger
from mpm_ops.runtime import make_runtime
from mpm_ops.segmenter import Segmenter

from . import mmsegmentation, segmenter
from .files import Checkpoint, CheckpointError, check_finite, find_checkpoint, read_checkpoint
from .segmenter import read_variant, trained_on

__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointError",
    "ModelKind",
    "check_finite",
    "copy_checkpoint",
    "find_checkpoint",
    "load_segmenter",
    "read_checkpoint",
    "read_variant",
    "trained_on",
]


@dataclass(frozen=True, slots=True)
class ModelKind:
    """An entry of MODELS.

    Attributes:
        anchor: the name of a weight that each of them has; the same with something in front is read as this one.
        recognises: whether a checkpoint is of this kind.
        build: a network in float32 and evaluation mode from it, with fields of `InferenceConfig` to override.
        copy: write what `build` needs into a folder, as checkpoint.pth and what stands beside it.
    """

    anchor: str
    recognises: Callable[[Checkpoint], bool]
    build: Callable[[Checkpoint, Mapping[str, Any]], Segmenter]
    copy: Callable[[Checkpoint, Path], None]


MODELS: Mapping[str, ModelKind] = {
    "mmsegmentation": ModelKind(
        mmsegmentation.ANCHOR, mmsegmentation.recognises, mmsegmentation.build, mmsegmentation.copy
    ),
    "segmenter": ModelKind(segmenter.ANCHOR, segmenter.recognises, segmenter.build, segmenter.copy),
}


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
        path: the checkpoint, or its folder; an official Segmenter's `variant.yml` is read from the same folder.
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
    kind, checkpoint = _read(Path(path))
    model = kind.build(checkpoint, inference or {})
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


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Write all that `load_segmenter` needs of a checkpoint, and nothing else that is in it, into a folder.

    Raises:
        FileNotFoundError, CheckpointError: see `load_segmenter`.
    """
    kind, checkpoint = _read(path)
    kind.copy(checkpoint, folder)


def _read(path: Path) -> tuple[ModelKind, Checkpoint]:
    checkpoint = read_checkpoint(path, [kind.anchor for kind in MODELS.values()])
    kind = next((kind for kind in MODELS.values() if kind.recognises(checkpoint)), None)
    if kind is None:
        raise CheckpointError(f"{checkpoint.path}: expected a checkpoint of Segmenter, {_guess(checkpoint)}")
    return kind, checkpoint


def _guess(checkpoint: Checkpoint) -> str:
    """What weights of no known kind are."""
    names = checkpoint.weights
    if "blocks.0.attn.qkv.weight" in names and "patch_embed.proj.weight" in names:
        return "got a ViT of timm without a decoder: train one on it, or use patch_timm for its features"
    if any(name.startswith(("backbone.", "decode_head.")) for name in names):
        return "got another network of mmsegmentation: a plain ViT with Segmenter's head is expected there"
    return f"got weights called {', '.join(list(names)[:3])}"
