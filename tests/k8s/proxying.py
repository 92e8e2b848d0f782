"""A real HAProxy with docker/haproxy.cfg."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlers.launch.processes import free_port
from handlers.monitoring.binaries import MissingToolError, find_tool, library_path

CONFIG = Path(__file__).resolve().parents[2] / "docker" / "haproxy.cfg"
SECONDS_TO_START = 150


def require_haproxy() -> Path:
    """Its program; a test without one is skipped."""
    try:
        return find_tool("haproxy")
    except MissingToolError as error:
        pytest.skip(str(error))


@contextmanager
def proxy(haproxy: Path, replicas: Sequence[tuple[str, int]], log: Path) -> Iterator[str]:
    """A running HAProxy in front of two replicas, each its address and its --ready-port; gives its own address."""
    listen = f"127.0.0.1:{free_port()}"
    environment = {"LISTEN": listen}
    for i, (address, ready_port) in enumerate(replicas, 1):
        environment |= {f"REPLICA_{i}": address, f"REPLICA_{i}_READY": str(ready_port)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [haproxy, "-db", "-f", CONFIG],
            stdout=output,
            stderr=output,
            env=os.environ | library_path(haproxy) | environment,
        )
    try:
        wait_for(lambda: accepts(listen))
        yield listen
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(10)


def accepts(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
