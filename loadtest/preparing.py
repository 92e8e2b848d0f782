"""What is made before a run, each in a process of its own: it loads what the client never needs."""

import base64
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .running import RunError, worker_environment
from .watching.scraping import read_metrics

PAINTED = Path("build/loadtest/pictures")


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The model as the library runs it, which a server has to agree with.

    Attributes:
        checkpoint: checkpoint.pth with its variant.yml beside it.
        schedule: blocks before which tokens merge (2,5), or off.
        align: token counts after a merge are multiples of this.
        inference: fields of the checkpoint's inference that the server overrides.
    """

    checkpoint: Path
    schedule: str
    align: int = 1
    inference: Mapping[str, Any] = field(default_factory=dict)


def ensure_painted(folder: Path) -> None:
    """Paint pictures into a folder that has none.

    Raises:
        RunError: they can't be painted.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    if problem := _run("loadtest.client.pictures", "--out", str(folder)):
        raise RunError(f"no pictures could be painted into {folder}: {problem}")


def library_masks(library: Library, pictures: Sequence[Path]) -> dict[str, str]:
    """Segment pictures without a server; PNGs of class ids in base64, by the names of the files.

    Raises:
        RunError: the library can't load the checkpoint, or not read a picture.
    """
    with tempfile.TemporaryDirectory(prefix="loadtest-library-") as folder:
        problem = _run(
            "loadtest.library",
            *("--checkpoint", str(library.checkpoint)),
            *("--schedule", library.schedule),
            *("--align", str(library.align)),
            *("--inference", json.dumps(dict(library.inference))),
            *("--out", folder),
            *map(str, pictures),
        )
        if problem:
            raise RunError(f"no masks of the library: {problem}")
        return read_masks(Path(folder))


def read_masks(folder: Path) -> dict[str, str]:
    """What `python -m loadtest.library` wrote.

    Raises:
        ValueError: there is nothing.
        OSError: it can't be read.
    """
    masks = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.glob("*.png"))}
    if not masks:
        raise ValueError(f"library-masks: expected what python -m loadtest.library writes in {folder}, got nothing")
    return masks


def draw_sample(folder: Path, names: Sequence[str], most: int, seed: int) -> list[Path]:
    """Some of the pictures of a folder, the same for the same seed; all of them if there are not more."""
    chosen = names if len(names) <= most else random.Random(seed).sample(sorted(names), most)
    return [folder / name for name in sorted(chosen)]


def served_library(checkpoint: Path, metrics: Sequence[str]) -> Library:
    """The library as the servers run it, by what their metrics tell.

    Raises:
        ValueError: they tell nothing, or differ.
    """
    try:
        told = read_metrics(metrics)
    except (OSError, ValueError) as error:
        raise ValueError(f"schedule: expected --schedule, or metrics that tell it: {error}") from None
    schedule, align = (_only(name, told.labels("mpm_model_info", name)) for name in ("schedule", "align"))
    return Library(checkpoint=checkpoint, schedule=schedule, align=int(align))


def _only(name: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        told = " and ".join(values) or "none"
        raise ValueError(f"{name}: expected --schedule, or metrics (mpm_model_info) that tell one {name}, got {told}")
    return values[0]


def _run(module: str, *arguments: str) -> str:
    """Run a command of this package; what went wrong, or nothing."""
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    return (ended.stderr.strip()[-500:] or f"status {ended.returncode}") if ended.returncode else ""
