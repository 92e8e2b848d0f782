"""The pins resolve as on a stranger's machine: with pip's own configuration, whatever this one has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip as if nobody had configured it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    plain["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extras", ["server,loadtest,dev", "triton", "kernels,tracing"])
def test_pins_resolve_with_pips_own_configuration(extras: str) -> None:
    if pip("--timeout=10", "--retries=0", "index", "versions", "pip").returncode:
        pytest.skip("no package index answers")
    done = pip("install", "--dry-run", "--quiet", "--ignore-installed", "-c", "constraints.txt", f".[{extras}]")
    assert done.returncode == 0, done.stderr
