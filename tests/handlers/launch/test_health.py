"""The probe against servers that answer, refuse, lie or say nothing."""

import http.server
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
from PIL import Image

from handlers.cli import main
from handlers.launch.health import UnhealthyError, check_model, read_progress, tiny_picture

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


class Metrics:
    """Metrics whose counters grow by so much at every look."""

    def __init__(self, serve_text: Callable[[Callable[[], str]], str], model: str = "x") -> None:
        self.tokens, self.growth, self.model = 0, 0, model
        self.url = serve_text(self.text)

    def text(self) -> str:
        self.tokens += self.growth
        return (
            'mpm_images_total{model="other"} 99.0\n'
            f'mpm_images_total{{model="{self.model}"}} 3.0\n'
            f'mpm_tokens_total{{model="{self.model}",point="in",stage="0"}} {self.tokens}.0\n'
            f'mpm_tokens_total{{model="{self.model}",point="out",stage="0"}} 1e3\n'
            'mpm_tokens_created{model="x"} 5.0\n'
        )


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    servers = []

    def serve_text(text: Callable[[], str]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text().encode())

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/metrics"

    yield Metrics(serve_text)
    for server in servers:
        server.shutdown()
        server.server_close()


class TestOverload:
    @pytest.mark.parametrize("model_url", ["http://h/predictions/x", "http://h/v2/models/x"])
    def test_progress(self, metrics: Metrics, model_url: str) -> None:
        assert read_progress(metrics.url, model_url) == (3, 1000)
        assert read_progress(metrics.url, model_url + "2") == (0, 0)
        assert read_progress("", model_url) is None
        assert read_progress("http://127.0.0.1:1/metrics", model_url) is None

    def test_no_room_while_it_computes(self, serve: Callable[..., str], metrics: Metrics) -> None:
        metrics.growth = 64
        check_model(serve((503, b"busy")), timeout_seconds=30, metrics_url=metrics.url)

    def test_no_room_while_it_does_nothing(self, serve: Callable[..., str], metrics: Metrics) -> None:
        with pytest.raises(UnhealthyError, match="last it said status 503: busy"):
            check_model(serve((503, b"busy")), timeout_seconds=0.5, metrics_url=metrics.url)

    @pytest.mark.parametrize("growth", [0, 64])
    def test_late(self, metrics: Metrics, growth: int) -> None:
        metrics.growth = growth
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/predictions/x"
            with nullcontext() if growth else pytest.raises(UnhealthyError, match=r"not answered within 0\.3 s"):
                check_model(url, timeout_seconds=0.3, metrics_url=metrics.url)

    def test_what_computes_and_fails_is_ill(self, serve: Callable[..., str], metrics: Metrics) -> None:
        metrics.growth = 64
        with pytest.raises(UnhealthyError, match="status 500: broken") as caught:
            check_model(serve((500, b"broken")), timeout_seconds=10, metrics_url=metrics.url)
        assert caught.value.status == 500

    def test_of_the_command(self, serve: Callable[..., str], metrics: Metrics) -> None:
        metrics.growth = 64
        command = [sys.executable, "-m", "handlers", "health", serve((503, b"busy")), "--timeout", "1"]
        assert subprocess.run([*command, "--metrics", metrics.url]).returncode == 0
        assert subprocess.run([*command, "--metrics", ""], stderr=subprocess.DEVNULL).returncode == 1


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
        with pytest.raises(UnhealthyError, match=r"not answered within 0\.3 s"):
            check_model(f"http://127.0.0.1:{silent.getsockname()[1]}/predictions/x", timeout_seconds=0.3)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://h/predictions/x", "http:///predictions/x", "http://h:1/", "http://h/v2"]
)
def test_no_model_s_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", url]) == 2
    assert capsys.readouterr().err.startswith("url: expected http(s)://HOST:PORT/predictions/NAME")


def test_status_of_the_command(serve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    for url, status in ((serve((200, MASK.getvalue())), 0), (serve((500, b"broken")), 1)):
        done = subprocess.run([sys.executable, "-m", "handlers", "health", url], capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.count("\n") == status


def test_the_picture_is_one() -> None:
    image = Image.open(io.BytesIO(tiny_picture()))
    image.load()
    assert image.size == (16, 16)
