"""What docker/haproxy.cfg lets through to a replica, and what it refuses; spoken to over plain sockets."""

import json
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from proxying import proxy, require_haproxy
from rendering import ROOT
from smuggling import AMBIGUOUS

from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.launch.torchserve import TorchServe
from mpm_ops import Segmenter
from mpm_ops.classes import Classes

pytest_plugins = ("tiny_server",)

LIMIT_BYTES = 33 * 2**20
CURL = re.findall(r"^curl .*\$URL.*$", (ROOT / "README.md").read_text(), re.MULTILINE)


class Replica(ThreadingHTTPServer):
    """Answers 200 to everything, `/ready` included, and remembers what else was asked: the head, as it came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.heads: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: Replica

    def _answer(self) -> None:
        if self.path != "/ready":
            self.server.heads.append(f"{self.requestline}\n{self.headers}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        with suppress(ConnectionError):  # who asks for readiness may not wait for the end
            self.wfile.write(b"ok")

    do_GET = do_POST = do_PUT = do_OPTIONS = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """A test's output is no log."""


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with Replica() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def address(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Of an HAProxy in front of it."""
    haproxy = require_haproxy()
    behind = (f"127.0.0.1:{replica.server_port}", replica.server_port)
    with proxy(haproxy, [behind, behind], tmp_path_factory.mktemp("haproxy") / "log") as listening:
        host, _, port = listening.partition(":")
        yield host, int(port)


def ask(address: tuple[str, int], head: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body that come for these bytes."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"Host: a\r\nConnection: close\r\n\r\n" + body)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return int(received.split(b" ", 2)[1]), received.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_picture_passes(address: tuple[str, int], replica: Replica, method: str) -> None:
    replica.heads.clear()
    assert ask(address, f"{method} /predictions/a HTTP/1.1\nContent-Length: 2\n", b"ab") == (200, b"ok")
    (head,) = replica.heads
    assert head.startswith(f"{method} /predictions/a")
    assert re.findall(r"(?i)^(content-length|transfer-encoding)", head, re.MULTILINE) == ["content-length"]


def test_a_question_without_a_body_passes(address: tuple[str, int]) -> None:
    assert ask(address, "GET /v2/models/a HTTP/1.1\n") == (200, b"ok")


def test_the_largest_body_passes(address: tuple[str, int]) -> None:
    assert ask(address, f"POST /a HTTP/1.1\nContent-Length: {LIMIT_BYTES}\n", bytes(LIMIT_BYTES)) == (200, b"ok")


CHUNKED = b"2\r\nab\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "body", "status", "told"),
    [
        (f"Content-Length: {LIMIT_BYTES + 1}", b"ab", 413, f"at most {LIMIT_BYTES}, got {LIMIT_BYTES + 1}"),
        (f"Content-Length: {2**32 + 1}", b"ab", 413, f"got {2**32 + 1}"),
        (f"Content-Length: {2**64 + 1}", b"ab", 413, "Content-Length: expected at most"),
        ("Content-Encoding: gzip\nContent-Length: 2", b"ab", 415, "Content-Encoding: expected none"),
        ("Content-Encoding: deflate\nContent-Length: 2", b"ab", 415, "Content-Encoding: expected none"),
        ("Transfer-Encoding: chunked", CHUNKED, 411, "Content-Length: expected the number of bytes"),
        (
            "Content-Length: 2\nTransfer-Encoding: chunked",
            CHUNKED,
            411,
            "Content-Length: expected the number of bytes",
        ),
        (
            "Transfer-Encoding: chunked\nContent-Length: 14",
            CHUNKED,
            411,
            "Content-Length: expected the number of bytes",
        ),
        ("Content-Length: 2\nTransfer-Encoding: gzip", b"ab", 400, None),
        ("Content-Length: 2\nContent-Length: 3", b"abc", 400, None),
        ("Content-Length: 2, 3", b"abc", 400, None),
        ("Content-Length: -2", b"ab", 400, None),
        ("X-Nothing: 1", b"", 411, "Content-Length: expected the number of bytes"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_refusal_says_why_and_reaches_nobody(
    address: tuple[str, int], replica: Replica, method: str, head: str, body: bytes, status: int, told: str | None
) -> None:
    replica.heads.clear()
    found, answer = ask(address, f"{method} /predictions/a HTTP/1.1\n{head}\n", body)
    assert found == status
    if told is not None:  # else HAProxy's own page
        assert json.loads(answer)["code"] == status
        assert told in json.loads(answer)["error"]
    assert replica.heads == []


class RawReplica:
    """Keeps every byte of every connection that is none of HAProxy's own checks, and answers each with 200."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])

    def serve(self) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(0.2)
        received = b""
        with connection, suppress(OSError):
            while b"\r\n\r\n" not in received and (part := connection.recv(65_536)):
                received += part
            if received.startswith(b"GET /ready"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with suppress(TimeoutError):  # whatever may follow
                while part := connection.recv(65_536):
                    received += part
            self.seen.append(received)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RawReplica, tuple[str, int]]]:
    haproxy, replica = require_haproxy(), RawReplica()
    threading.Thread(target=replica.serve, daemon=True).start()
    behind = (f"127.0.0.1:{replica.port}", replica.port)
    with proxy(haproxy, [behind, behind], tmp_path_factory.mktemp("raw") / "log") as listening:
        host, _, port = listening.partition(":")
        yield replica, (host, int(port))
    replica.close()


PLAIN = re.compile(rb"[A-Z]+ /[!-~]* HTTP/1\.1\r\n(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[^\r\n\0]*\r\n)*\r\n")


@pytest.mark.parametrize("data", AMBIGUOUS)
def test_what_two_servers_could_read_differently(data: bytes, raw: tuple[RawReplica, tuple[str, int]]) -> None:
    """It is refused, or what reaches the replica has one reading: one request, of one length."""
    replica, address = raw
    replica.seen.clear()
    with socket.create_connection(address, timeout=2) as client:
        client.sendall(data)
        answer = b""
        with suppress(TimeoutError, ConnectionResetError):
            while part := client.recv(65_536):
                answer += part
    if not replica.seen:
        assert answer == b"" or re.match(rb"HTTP/1\.[01] (400|405|411|413|415|422|501)", answer), answer[:100]
        return
    (received,) = replica.seen
    head, _, body = received.partition(b"\r\n\r\n")
    assert PLAIN.fullmatch(head + b"\r\n\r\n"), head
    lengths = re.findall(rb"(?im)^content-length: *(\S*)\r?$", head)
    assert not re.search(rb"(?im)^transfer-encoding", head)
    assert len(lengths) == (head[:4] in (b"POST", b"PUT "))
    assert len(body) == sum(map(int, lengths)), received


@pytest.mark.parametrize(("options", "passes"), [(["--data-binary", "ab"], True), (["-T", "-"], False)])
def test_a_body_without_a_length_over_http_2(
    address: tuple[str, int], replica: Replica, options: list[str], passes: bool
) -> None:
    """Where chunks need no header. The stream's end may overtake the refusal, so what curl says isn't looked at."""
    replica.heads.clear()
    url = "http://{}:{}/predictions/a".format(*address)
    command = ["curl", "-sS", "-m", "10", "--http2-prior-knowledge", *options, url]
    done = subprocess.run(command, input=b"ab", capture_output=True)
    if done.returncode == 2:
        pytest.skip(f"curl: {done.stderr.decode()}")
    assert (done.stdout == b"ok") is passes, done.stderr
    assert len(replica.heads) == passes


@pytest.mark.parametrize("line", CURL)
def test_the_curl_lines_of_the_readme(
    line: str,
    server: TorchServe,
    photo: Callable[..., np.ndarray],
    model: Segmenter,
    classes: Classes,
    replica: Replica,
    tmp_path: Path,
) -> None:
    """As they are typed, against a real TorchServe behind the proxy."""
    picture = photo(0)
    for name in re.findall(r"[\w/]+\.jpg", line):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_picture(picture, "image/png"))  # lossless, for the mask to be known
    behind = (f"127.0.0.1:{server.port}", replica.server_port)
    with proxy(require_haproxy(), [behind, behind], tmp_path / "log") as listening:
        url = f"http://{listening}/predictions/tiny"
        command = shlex.split(line.replace("$URL", url), comments=True)
        done = subprocess.run([*command, "-sS", "--fail-with-body"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "-o" not in command:
        assert json.loads(done.stdout)["classes"]
    elif "mask.png" in command:
        assert (tmp_path / "mask.png").read_bytes() == encode_mask_png(model.segment(picture), classes)
    else:
        assert (tmp_path / command[command.index("-o") + 1]).stat().st_size > 100


def test_there_are_such_lines() -> None:
    assert len(CURL) >= 5
    assert any(" -F " in line for line in CURL), "a form is a POST"
    assert any(" -T " in line for line in CURL), "a file is a PUT"
