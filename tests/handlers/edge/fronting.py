"""An edge as a process of its own in front of a server that is there already, and one that only writes down."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests


class Upstream(ThreadingHTTPServer):
    """Answers every request with what came, and keeps it.

    Attributes:
        seen: method, path, headers with names in lower case, and body of each request.
        left: set when a client of /slow left before its answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Recorder)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.left = threading.Event()
        self.asked = threading.Event()
        self.release = threading.Event()
        self.answer = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Recorder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        assert isinstance(self.server, Upstream)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if self.path == "/slow":
            self.server.asked.set()
            self.connection.settimeout(10)
            if self.connection.recv(1) == b"":
                self.server.left.set()
            return
        if self.path == "/wait":
            self.server.asked.set()
            self.server.release.wait(10)
        answer = self.server.answer or body
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("X-MPM-Tokens", "in=5, out=3")
        self.end_headers()
        self.wfile.write(answer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def ask(url: str, target: str, data: bytes | str = b"", headers: Mapping[str, str] | None = None) -> requests.Response:
    """A POST whose target reaches the server as it is, whatever requests would make of it."""
    prepared = requests.Request("POST", url, data=data, headers=headers).prepare()
    prepared.url = url + target
    with requests.Session() as session:
        return session.send(prepared)


class Front:
    """An edge that runs.

    Attributes:
        url, address: where it listens.
        process: that it is.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", address: tuple[str, int]) -> None:
        self.process, self.address = process, address
        self.url = f"http://127.0.0.1:{address[1]}"

    def send(self, *pieces: bytes, timeout: float = 5) -> bytes:
        """All that is answered to bytes on a connection of their own, until it is closed."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            for piece in pieces:
                connection.sendall(piece)
            received = b""
            try:
                while piece := connection.recv(65536):
                    received += piece
            except (TimeoutError, ConnectionResetError):
                pass
            return received


@contextmanager
def fronted(upstream: str, server: str, *options: str) -> Iterator[Front]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        command = [sys.executable, "-m", "handlers.edge", "--fd", str(listening.fileno()), "--upstream", upstream]
        process = subprocess.Popen([*command, "--server", server, *options], pass_fds=[listening.fileno()])
    with process:
        yield Front(process, address)
        process.terminate()
        assert process.wait(20) == 0
