"""Files of weights, whoever wrote them: found, told apart by content, and read without running code in them."""

import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Where trainers put weights in a file, in order of preference: averages of weights are taken where nothing else is.
_HOLDERS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "params")
_AVERAGES = ("model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema", "averaged_model")
_ADVICE = "save the weights alone, as torch.save({'model': network.state_dict()}, 'checkpoint.pth')"
_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


class CheckpointError(ValueError):
    """A checkpoint or its variant.yml can't be used; the message says what is wrong with which part."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file's weights.

    Attributes:
        path: the file.
        weights: by name, as stored, without what DDP, torch.compile and Lightning put in front of names.
        meta: what the trainer says about them; empty if it does not.
    """

    path: Path
    weights: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's file: the path itself, or checkpoint.pth, or else the only file of weights, in that folder.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are several, none of them checkpoint.pth.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint, nor a folder with one")
    if (path / "checkpoint.pth").is_file():
        return path / "checkpoint.pth"
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not found:
        raise FileNotFoundError(f"{path}: expected checkpoint.pth in this folder, found no weights")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: expected checkpoint.pth or one file of weights in this folder, found {names}")
    return found[0]


def read_checkpoint(path: Path, anchors: Collection[str] = ()) -> Checkpoint:
    """The weights of a checkpoint, by name, as stored.

    They lie in the file, mapped, until they are touched, so that what training leaves beside them (an optimizer's
    state is as large, or twice) never comes into memory. Files of torch before 1.6 can't be mapped: read whole.
    Objects of classes that aren't torch's become empty ones; no code in a file is run.

    Args:
        path: the file, or its folder.
        anchors: names that weights of known kinds have; what stands in front of one is a prefix of all.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint.
    """
    path = find_checkpoint(path)
    data: Any = None
    with path.open("rb") as file:
        head = file.read(64)
    if obstacle := _obstacle(head, path.stat().st_size):
        raise CheckpointError(f"{path}: {obstacle}")
    try:
        data = load_file(path) if _is_safetensors(head) else _load(path)
    except Exception as error:  # a damaged file can raise anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds code ({blocked[1]}), which is never run: {_ADVICE}" if blocked else _damage(head, error)
        raise CheckpointError(f"{path}: not a torch checkpoint: {reason}") from None
    weights = _weights_in(data, path)
    return Checkpoint(path, _without_prefix(weights, anchors), _meta_in(data))


class _Unknown:
    """Stands for an object of a class that isn't torch's."""

    def __new__(cls, *args: object, **options: object) -> "_Unknown":
        return object.__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _load(path: Path) -> Any:
    stand_ins: list[Any] = []
    if is_archive := zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(type(name, (_Unknown,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error says it better
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8  # its own limit on headers


def _obstacle(head: bytes, size: int) -> str | None:
    """What a file is, where its first bytes show that it holds no weights, and what to do."""
    start = head.lstrip()[:40].lower()
    if not size:
        return "an empty file: copy or download it again"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page, not a checkpoint: the download was answered by a web page; open its address in a browser"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} bytes, not the file itself: run `git lfs pull` where it was cloned"
    if start.startswith(b"\x1f\x8b"):
        return "compressed by gzip: unpack it first"
    return None


def _damage(head: bytes, error: Exception) -> str:
    if head.startswith(b"PK") or _is_safetensors(head):
        return f"damaged or incomplete ({type(error).__name__}): copy or download it again"
    return f"expected what torch.save or safetensors wrote ({type(error).__name__})"


def _weights_in(data: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a file holds."""
    inner = data
    while isinstance(inner, dict) and not any(isinstance(value, Tensor) for value in inner.values()):
        holder = next((name for name in (*_HOLDERS, *_AVERAGES) if name in inner), None)
        if holder is None:
            break
        inner = inner[holder]
    if isinstance(inner, _Unknown):
        name = type(inner).__name__
        raise CheckpointError(f"{path}: holds a whole {name} object, whose code is never run: {_ADVICE}")
    if not isinstance(inner, dict) or not inner or not all(_is_weight(*item) for item in inner.items()):
        known = ", ".join(_HOLDERS[:3])
        got = f"keys {', '.join(map(str, list(data)[:4]))}" if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"{path}: expected a state_dict, or one under {known} or the like, got {got}")
    return inner


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _without_prefix(weights: Mapping[str, Tensor], anchors: Collection[str]) -> dict[str, Tensor]:
    named = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    ends = tuple(f".{anchor}" for anchor in anchors)
    if any(anchor in named for anchor in anchors) or not ends:
        return named
    anchor = next((name for name in named if name.endswith(ends)), "")
    prefix = next((anchor.removesuffix(end) + "." for end in ends if anchor.endswith(end)), "")
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _meta_in(data: Any) -> Mapping[str, Any]:
    meta = data.get("meta") if isinstance(data, dict) else None
    return meta if isinstance(meta, dict) else {}


def load_strictly(model: torch.nn.Module, weights: Mapping[str, Tensor], path: Path, described_by: str) -> None:
    """Load all weights of a network and nothing else.

    Args:
        described_by: what the network's shape was read from.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    problems = [
        *(f"missing {key} {list(expected[key].shape)}" for key in expected if key not in weights),
        *(f"unexpected {key} {list(weights[key].shape)}" for key in weights if key not in expected),
        *(
            f"{key}: expected shape {list(expected[key].shape)}, got {list(weights[key].shape)}"
            for key in expected
            if key in weights and weights[key].shape != expected[key].shape
        ),
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path}: does not fit the network of {described_by}: {shown}")
    model.load_state_dict(weights)


def check_finite(model: torch.nn.Module, path: Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: names the first of them.
    """
    for name, value in model.named_parameters():
        if num := int((~value.isfinite()).sum()):
            raise CheckpointError(
                f"{path}: {name}: expected finite numbers, got NaN or infinity in {num} of {value.numel()}; take a "
                "checkpoint from before training diverged"
            )
