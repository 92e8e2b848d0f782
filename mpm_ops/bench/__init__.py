"""Speed, as JSON: one module for each question, `python -m mpm_ops.bench QUESTION`.

Everything that is compared runs in turn, so that a change of the machine's speed meets all alike:
quote the ratios, not the milliseconds.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpm_ops.segmenter import Segmenter

_PACKAGES = ("numpy", "openvino", "timm", "triton")  # beside torch, which calls itself by its build


def parsers(
    program: str, description: str, questions: Sequence[Any]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of a command line, and that of each question by its name; see `answer`."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    commands = parser.add_subparsers(required=True)
    for question in questions:
        question.add_command(commands)
    return parser, dict(commands.choices)


def answer(program: str, description: str, questions: Sequence[Any], argv: Sequence[str] | None = None) -> int:
    """Read the command line and answer one question.

    Args:
        questions: modules whose `add_command` adds a parser with `run` among its defaults. What `run` raises of
            input, parity and missing packages is told in a line.
        argv: the command line; that of this process by default.
    """
    arguments = parsers(program, description, questions)[0].parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: device, versions, threads, commit."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    except OSError:  # no git
        commit = ""
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "commit": commit.strip() or None,
    }


def write_report(path: Path | None, fields: Mapping[str, Any], *, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Add to figures what they depend on, and write all of it as JSON where a path is given.

    Args:
        shapes: sizes of what was computed, such as those of `model_shapes`.
    """
    report = {"environment": environment(), "shapes": dict(shapes), **fields}
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
    return report


def model_shapes(model: Segmenter) -> dict[str, Any]:
    """Sizes of a network and its windows."""
    return {
        "window": model.inference.window_size,
        "patch": model.config.patch_size,
        "width": model.config.d_model,
        "blocks": model.config.n_layers,
        "classes": model.config.n_cls,
        "schedule": list(model.schedule),
        "align": model.align,
    }


def read_images(path: Path, most: int | None = None) -> list[np.ndarray]:
    """The picture, or the pictures of a folder, as uint8 RGB.

    Args:
        most: read at most so many of a folder, evenly chosen; None reads all.

    Raises:
        FileNotFoundError: there is no such file, or the folder is empty.
        ValueError: most < 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"most: expected at least 1, got {most}")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no pictures")
    if most is not None:
        files = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files)), dtype=int)]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def time_in_turn(
    ways: Mapping[str, Callable[[], object]], *, repeats: int, seconds: float = 0
) -> dict[str, list[float]]:
    """Seconds of every call of each way, all ways in turn, at least `repeats` times and for about so many seconds."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    done, end = 0, perf_counter() + seconds
    while done < repeats or perf_counter() < end:
        for name, way in ways.items():
            start = perf_counter()
            way()
            samples[name].append(perf_counter() - start)
        done += 1
    return samples


def percentile_ms(seconds: Sequence[float], percent: float = 50) -> float:
    """Milliseconds that so many per cent do not exceed; the median if nothing is said."""
    return round(1000 * float(np.percentile(seconds, percent)), 3)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
