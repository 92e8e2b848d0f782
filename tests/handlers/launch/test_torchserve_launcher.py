"""Starting and stopping: nothing is left behind, and what goes wrong is said in a line."""

import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from handlers.api.formats.views import encode_picture
from handlers.cli import main
from handlers.client import fetch
from handlers.launch.torchserve import ServerError, TorchServe, free_port

pytest_plugins = ("tiny_server",)

SECONDS_TO_START = 150
# Nobody listens there: who asks this proxy for a server on loopback never finds it ready.
ENVIRONMENT = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture
def picture(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(0), "image/png")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., list[str]]]:
    """Runs the command with arguments that it must refuse; returns what it prints."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> list[str]:
        assert main(["serve", "--server", "torchserve", *map(str, arguments)]) == 1
        return capsys.readouterr().err.splitlines()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class TestRefusals:
    @pytest.mark.parametrize("option", ["--port", "--ready-port"])
    def test_port_in_use(self, store: Path, run: Callable[..., list[str]], option: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert run(store, "--port", 0, option, port) == [
                f"cannot listen on 127.0.0.1:{port}: Address already in use"
            ]

    def test_no_such_host(self, store: Path, run: Callable[..., list[str]]) -> None:
        (line,) = run(store, "--port", 0, "--host", "192.0.2.1")
        assert line.startswith("cannot listen on 192.0.2.1:")

    def test_no_archive(self, tmp_path: Path, run: Callable[..., list[str]]) -> None:
        assert run(tmp_path) == [f"model_store: expected a folder with .mar files, got {tmp_path}"]

    @pytest.mark.parametrize("content", ["nothing", "junk", "cut", "another zip"])
    def test_no_model_archive(self, store: Path, tmp_path: Path, run: Callable[..., list[str]], content: str) -> None:
        broken = tmp_path / "broken.mar"
        if content == "another zip":
            with zipfile.ZipFile(broken, "w") as archive:
                archive.writestr("readme", "hello")
        else:
            whole = (store / "tiny.mar").read_bytes()
            broken.write_bytes({"nothing": b"", "junk": b"junk", "cut": whole[: len(whole) // 2]}[content])
        assert run(tmp_path) == [f"{broken}: not a TorchServe model archive"]

    @pytest.mark.parametrize("name", ["a b", "a,b", "é", "-a"])
    def test_name_that_no_model_may_have(
        self, store: Path, tmp_path: Path, run: Callable[..., list[str]], name: str
    ) -> None:
        shutil.copy(store / "tiny.mar", tmp_path / f"{name}.mar")
        (line,) = run(tmp_path)
        assert "expected a name of letters, digits" in line

    def test_archive_that_torchserve_refuses(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "refused.mar", "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", "{")
        with (
            TorchServe(tmp_path, log=tmp_path / "log") as server,
            pytest.raises(ServerError, match=r"refused\.mar: TorchServe refused the archive"),
        ):
            server.wait_ready(SECONDS_TO_START)

    @pytest.mark.slow
    def test_model_that_does_not_load(self, store: Path, tmp_path: Path) -> None:
        with (
            zipfile.ZipFile(store / "tiny.mar") as good,
            zipfile.ZipFile(tmp_path / "broken.mar", "w") as broken,
        ):
            for name in good.namelist():
                broken.writestr(name, b"junk" if name == "checkpoint.pth" else good.read(name))
        with TorchServe(tmp_path, log=tmp_path / "log") as server:
            with pytest.raises(ServerError, match=r"broken\.mar: its worker ended") as caught:
                server.wait_ready(SECONDS_TO_START)
            assert "not a weights-only torch checkpoint" in str(caught.value)


@pytest.fixture
def second_store(store: Path, tmp_path: Path) -> Path:
    """The model `tiny` under another name, which is the name of its file."""
    folder = tmp_path / "second store"
    folder.mkdir()
    shutil.copy(store / "tiny.mar", folder / "renamed.mar")
    return folder


def test_two_servers_and_ctrl_c(server: TorchServe, second_store: Path, picture: bytes, tmp_path: Path) -> None:
    expected = predict(server.url, "tiny", picture)
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "handlers", "serve", str(second_store)]
    temp = tmp_path / ("too-long-for-the-path-of-a-socket" * 2)
    temp.mkdir()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=output, env=ENVIRONMENT | {"TMPDIR": str(temp)}
        ) as launcher,
    ):
        try:
            wait_for(f"Ready on http://127.0.0.1:{port}", log, launcher)
            assert predict(f"http://127.0.0.1:{port}", "renamed", picture) == expected
            assert predict(server.url, "tiny", picture) == expected
            processes = psutil.Process(launcher.pid).children(recursive=True)
            assert len(processes) >= 2  # Java and a worker

            launcher.send_signal(signal.SIGINT)
            time.sleep(0.5)
            launcher.send_signal(signal.SIGINT)  # an impatient person
            assert launcher.wait(60) == 0
        finally:
            launcher.terminate()
    assert not [process for process in processes if process.is_running()]
    assert not list(temp.glob("torchserve-*"))
    assert "Traceback" not in log.read_text()
    assert predict(server.url, "tiny", picture) == expected


def predict(url: str, model: str, picture: bytes) -> bytes:
    response = fetch(f"{url}/predictions/{model}", picture, timeout_seconds=60)
    assert response.status == 200
    return response.body


def wait_for(text: str, log: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
