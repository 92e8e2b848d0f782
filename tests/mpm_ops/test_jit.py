"""Compiled loops work where nothing can be written, and are kept where it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import numba.core.caching as caching
{deny}
import torch
from mpm_ops.labels import label_map
from mpm_ops.windows import WindowPlan
plan = WindowPlan((32, 32), (32, 32), (32, 32), 32, (0,), (0,))
print(label_map(torch.eye(4).reshape(1, 4, 2, 2), plan, 16).labels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist())
"""


@pytest.mark.parametrize("writable", [True, False])
def test_with_and_without_a_place_for_machine_code(writable: bool, tmp_path: Path) -> None:
    deny = "" if writable else "caching._CacheLocator.ensure_cache_path = lambda self: open('/proc/nowhere', 'w')"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-c", PROGRAM.format(deny=deny)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[0, 1, 2, 3]\n", done.stderr
    assert any(tmp_path.rglob("*.nbc")) is writable
