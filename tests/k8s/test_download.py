"""The init container that downloads a checkpoint, against a real server."""

import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rendering import K8S

SCRIPT = K8S / "components" / "model-download" / "download.py"
CONTENT = {"checkpoint.pth": bytes(range(256)) * 8192, "variant.yml": b"net_kwargs: {}\n"}


@pytest.fixture
def failures() -> list[str]:
    """Paths that the server breaks off in the middle, once for each time that one is listed."""
    return []


@pytest.fixture
def url(failures: list[str]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = CONTENT.get(self.path[1:])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path in failures:
                failures.remove(self.path)
                content = content[: len(content) // 2]
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def download(files: object, folder: Path) -> "subprocess.CompletedProcess[str]":
    listed = folder.parent / "download.yml"
    listed.write_text(files if isinstance(files, str) else yaml.safe_dump(files))
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(listed), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def entry(url: str, name: str) -> dict[str, str]:
    return {"url": f"{url}/{name}", "sha256": hashlib.sha256(CONTENT[name]).hexdigest()}


def test_it_fetches_what_is_listed(url: str, tmp_path: Path) -> None:
    done = download({name: entry(url, name) for name in CONTENT}, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == CONTENT


def test_it_tries_again_where_the_connection_broke(url: str, failures: list[str], tmp_path: Path) -> None:
    failures.append("/checkpoint.pth")
    done = download({"checkpoint.pth": entry(url, "checkpoint.pth")}, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == CONTENT["checkpoint.pth"]


def test_it_refuses_another_file(url: str, tmp_path: Path) -> None:
    wrong = entry(url, "variant.yml") | {"sha256": "0" * 64}
    done = download({"variant.yml": wrong}, tmp_path / "out")
    assert done.returncode == 1
    assert f"variant.yml: {url}/variant.yml: expected SHA-256 {'0' * 64}, got " in done.stderr
    assert not list((tmp_path / "out").iterdir()), "nothing may be left that could be loaded"


def test_what_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    missing = {"url": f"{url}/other.pth", "sha256": "0" * 64}
    done = download({"checkpoint.pth": missing}, tmp_path / "out")
    assert done.returncode == 1
    assert "checkpoint.pth: " in done.stderr
    assert "404" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ("", "expected a mapping of file names"),
        ("[", "download.yml: "),
        ({"../x": {}}, "expected a file name without folders, got '../x'"),
        ({"x": {"url": "https://h/x"}}, "x: expected url and sha256"),
        ({"x": {"url": "ftp://h/x", "sha256": "0" * 64}}, "x: url: expected https://"),
        (
            (K8S / "components" / "model-download" / "download.yml").read_text(),
            "sha256: expected 64 hexadecimal digits",
        ),
    ],
)
def test_a_list_that_can_t_be_followed(files: object, told: str, tmp_path: Path) -> None:
    done = download(files, tmp_path / "out")
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
