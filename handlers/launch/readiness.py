"""Should requests be sent here? A port of its own that says so, because both servers answer "healthy" to the end."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_CLIENT_SECONDS = 5.0  # for a whole request; a client that says nothing holds a thread


class Readiness:
    """Answers GET and HEAD, on any path, with 200 while `ready` and 503 otherwise; a context manager.

    Args:
        host, port: where it listens; port 0 is nowhere.

    Raises:
        OSError: on entering, the port can't be had.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.ready = False
        self._address = (host, port)
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        if self._address[1]:
            self._server = _Server(self._address, self)
            threading.Thread(target=self._server.serve_forever, name="readiness", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], readiness: Readiness) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        self.readiness = readiness


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        assert isinstance(self.server, _Server)
        ready = self.server.readiness.ready
        body = b"ready\n" if ready else b"not ready\n"
        self.send_response(200 if ready else 503)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a check every second would drown the log."""
