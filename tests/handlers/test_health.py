"""The probe against servers that answer, refuse, lie or say nothing."""

import http.server
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from handlers.health import UnhealthyError, check_model, main, tiny_picture

MASK = io.BytesIO()
Image.new("P", (16, 16)).save(MASK, "PNG")
Answer = tuple[int, bytes]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server that gives answers in turn, the last for ever; returns its URL for a path."""
    servers = []

    def start(*answers: Answer, path: str = "/predictions/x") -> str:
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.rfile.read(int(self.headers["Content-Length"])) == tiny_picture()
                status, body = left.pop(0) if len(left) > 1 else left[0]
                triton = self.path == "/v2/models/x/infer"
                assert triton or self.path == "/predictions/x"
                described = b"{}" if triton else b""
                self.send_response(status)
                if triton:
                    assert self.headers["Inference-Header-Content-Length"] == "0"
                    self.send_header("Inference-Header-Content-Length", "2")
                    body = described + len(body).to_bytes(4, "little") + body
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}{path}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("path", ["/predictions/x", "/v2/models/x"])
def test_alive(serve: Callable[..., str], path: str) -> None:
    check_model(serve((200, MASK.getvalue()), path=path), timeout_seconds=10)


def test_busy_and_then_alive(serve: Callable[..., str]) -> None:
    """An overloaded server must not be restarted for it."""
    check_model(serve((503, b"busy"), (503, b"busy"), (200, MASK.getvalue())), timeout_seconds=10)


def test_busy_for_ever(serve: Callable[..., str]) -> None:
    """A stuck model refuses for lack of room too, but room never comes."""
    with pytest.raises(UnhealthyError, match=r"not answered within 0\.5 s; last it said status 503: busy"):
        check_model(serve((503, b"busy")), timeout_seconds=0.5)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((500, b"broken"), "status 500: broken"),
        ((404, b"no such model"), "status 404: no such model"),
        ((200, b""), "expected the mask of the picture"),
        ((200, b"fine"), "expected the mask of the picture"),
        ((200, tiny_picture()[:12]), "expected the mask of the picture"),
    ],
)
def test_another_answer(serve: Callable[..., str], answer: Answer, told: str) -> None:
    with pytest.raises(UnhealthyError, match=told):
        check_model(serve(answer), timeout_seconds=10)


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/predictions/x"
        with pytest.raises(UnhealthyError, match="Connection refused"):
            check_model(url, timeout_seconds=10)


def test_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(UnhealthyError, match="timed out"):
            check_model(f"http://127.0.0.1:{silent.getsockname()[1]}/predictions/x", timeout_seconds=0.3)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://h/predictions/x", "http:///predictions/x", "http://h:1/", "http://h/v2"]
)
def test_no_model_s_url(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["health", url])
    assert main() == 1
    assert capsys.readouterr().err.startswith("url: expected http://HOST:PORT/predictions/NAME")


def test_status_of_the_command(serve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for url, status in ((serve((200, MASK.getvalue())), 0), (serve((500, b"broken")), 1)):
        done = subprocess.run([sys.executable, "-m", "handlers.health", url], capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.count("\n") == status


def test_it_starts_without_the_model_s_libraries() -> None:
    code = "import sys, handlers.health; print(*(name for name in sys.modules if name in ('torch', 'numpy', 'PIL')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_picture_is_one() -> None:
    image = Image.open(io.BytesIO(tiny_picture()))
    image.load()
    assert image.size == (16, 16)
