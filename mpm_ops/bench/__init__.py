"""Speed, as JSON: one module for each question, `python -m mpm_ops.bench QUESTION`.

Everything that is compared runs in turn, so that a change of the machine's speed meets all alike:
quote the ratios, not the milliseconds.
"""

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


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
        "commit": commit.strip() or None,
    }


def read_images(path: Path) -> list[np.ndarray]:
    """The picture, or all pictures of a folder, as uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file, or the folder is empty.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no pictures")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
