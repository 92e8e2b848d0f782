"""What `make` would do, and which Pythons it takes. Nothing is installed."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile in a checkout without an environment."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13), (3, 14), (4, 0)])
def test_a_python_is_taken_if_the_project_runs_on_it(folder: Path, version: tuple[int, int]) -> None:
    python = folder / "some-python"
    pretend = f"import sys; sys.version_info = {(*version, 1)}"
    python.write_text(f'#!/bin/sh\ntest "$1" = -c || exit 77\nexec {sys.executable} -c "{pretend}\n$2"\n')
    python.chmod(0o755)
    done = make(folder, f"PYTHON={python}", ".venv/.installed")
    supported = SpecifierSet(PYPROJECT["requires-python"]).contains("{}.{}.1".format(*version))
    told = f"Python 3.11 or 3.12 is needed, {python} is {version[0]}.{version[1]}: make PYTHON=python3.12 ..."
    assert (told in done.stderr) is not supported, done.stderr
    assert ("Error 77" in done.stderr) is supported, "the next step is the environment"


@pytest.mark.parametrize(
    ("target", "with_triton"),
    [
        *((target, False) for target in ("serve", "monitor", "loadtest", "bench", "dashboards")),
        *((target, True) for target in ("serve-triton", "env", "test", "test-all", "check")),
    ],
)
def test_triton_is_installed_where_it_is_needed(folder: Path, target: str, with_triton: bool) -> None:
    """Its wheels need a newer system than everything else."""
    done = make(folder, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    installed = [line for line in done.stdout.splitlines() if "pip install" in line]
    extras = {extra for line in installed for extra in line.partition("'.[")[2].partition("]")[0].split(",")}
    assert extras <= set(PYPROJECT["optional-dependencies"])
    assert ("triton" in extras) is with_triton
    assert {"server", "loadtest"} <= extras
