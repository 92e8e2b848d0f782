"""What is made before a run, each in a process of its own: it loads what the client never needs."""

import subprocess
import sys
from pathlib import Path

from .running import RunError, worker_environment

PAINTED = Path("build/loadtest/pictures")


def ensure_painted(folder: Path) -> None:
    """Paint pictures into a folder that has none; in a process of its own, which loads what this one never needs.

    Raises:
        RunError: they can't be painted.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    command = [sys.executable, "-m", "loadtest.pictures", "--out", str(folder)]
    painted = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    if painted.returncode:
        raise RunError(f"no pictures could be painted into {folder}: {painted.stderr.strip()[-500:]}")
