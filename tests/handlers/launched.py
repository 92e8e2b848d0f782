"""The commands that serve, as processes of their own."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from handlers.client import fetch
from handlers.launch.processes import free_port

SECONDS_TO_START = 150


class Launched:
    """A launcher that runs.

    Attributes:
        url: of the server.
        process: the launcher.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, ready_url: str, log: Path) -> None:
        self.process, self.url, self._ready_url, self._log = process, url, ready_url, log

    @property
    def told(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_ready(self) -> bool:
        return fetch(self._ready_url, timeout_seconds=10).status == 200

    def children(self, text: str) -> list[psutil.Process]:
        """Living processes below it with a text in their command lines."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        alive = [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in alive if any(text in part for part in child.cmdline())]

    def wait_until(self, condition: Callable[[], bool], seconds: float = SECONDS_TO_START) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.told[-3000:]
            assert time.monotonic() < deadline, self.told[-3000:]
            time.sleep(0.1)


@contextmanager
def launched(server: str, folder: Path, log: Path, *options: object, edge: bool = False) -> Iterator[Launched]:
    """Start a launcher on its model store or repository; it is stopped in the end, and leaves no process."""
    port, ready_port = free_port(), free_port()
    command = [sys.executable, "-m", "handlers", "serve", str(folder), "--server", server, "--port", str(port)]
    if not edge:
        command.append("--no-edge")
    if server == "triton":
        command += ["--grpc-port", "0"]
    command += ["--ready-port", str(ready_port), *map(str, options)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        running = Launched(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ready_port}", log)
        processes: list[psutil.Process] = []
        try:
            running.wait_until(lambda: "Ctrl-C stops the server" in running.told)
            processes = psutil.Process(process.pid).children(recursive=True)
            yield running
        finally:
            process.terminate()
            process.wait(150)
    assert not [child for child in processes if child.is_running()]
