"""Compiled loops work where nothing can be written, and are kept where it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOP = """
from _jit import jit  # without the rest of the package, which takes seconds to import

@jit
def total(n):
    found = 0
    for i in range(n):
        found += i
    return found
"""
PROGRAM = """
import numba.core.caching as caching
{deny}
from loop import total
print(total(5), len(total.signatures))
"""


@pytest.mark.parametrize("writable", [True, False])
def test_with_and_without_a_place_for_machine_code(writable: bool, tmp_path: Path) -> None:
    deny = "" if writable else "caching._CacheLocator.ensure_cache_path = lambda self: open('/proc/nowhere', 'w')"
    (tmp_path / "loop.py").write_text(LOOP)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2] / "mpm_ops")])
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    program = [sys.executable, "-c", PROGRAM.format(deny=deny)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "10 1\n", done.stderr
    assert any(tmp_path.rglob("*.nbc")) is writable
