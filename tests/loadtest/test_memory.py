"""The memory of a server is that of all its processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from locust_runs import Run

from handlers.launch.processes import free_port
from loadtest.page import render, told
from loadtest.server import find_server, sample_memory

pytest_plugins = ("load_fixtures",)

MIB = 2**20
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
CHILD = f"held = bytearray({64 * MIB}); held[::4096] = b'1' * {16 * 1024}; print('held', flush=True); input()"


@pytest.fixture
def family() -> Iterator[int]:
    """A process whose child holds 64 MiB."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "held\n"
        yield parent.pid
        parent.stdin.write("\n")


def test_of_a_process_and_its_children(family: int) -> None:
    found = sample_memory(family)
    assert 64 + 5 < found.mib < 64 + 60
    assert sample_memory(os.getpid()).mib > found.mib  # whose child it is


def test_a_process_that_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(ProcessLookupError):
        sample_memory(ended.pid)


def test_who_listens() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        assert find_server(listening.getsockname()[1]) == os.getpid()
    assert find_server(free_port()) is None


@pytest.mark.parametrize("pid", ["auto", str(os.getpid())], ids=["auto", "of a process"])
def test_a_run_watches(run_locust: Run, pid: str) -> None:
    ended = run_locust(rate=10, run_time=3, server_pid=pid)
    assert ended.status == 0, ended.output
    assert "not watched" not in ended.output
    memory = ended.summary["memory"]
    assert memory["last_mib"] > 10
    assert "Memory of all processes" in render(ended.summary)
    unwatched = ended.summary | {"memory": None, "series": ended.summary["series"] | {"memory": None}}
    assert "Memory of all processes" not in render(unwatched)
    assert "processes: not watched" in told(unwatched)


def test_growth_that_is_not_known_is_not_kept(run_locust: Run) -> None:
    ended = run_locust(rate=10, run_time=3, server_pid="auto", max_growth="5%")
    checks = {check["name"]: check for check in ended.summary["checks"]}
    assert checks["memory growth, total"]["value"] is None
    assert ended.status == 1
