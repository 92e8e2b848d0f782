"""What becomes of a real server whose model dies, and of one that only has too much to do."""

import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from asking_triton import infer_raw
from launched import Launched, launched

from handlers.api.formats.views import encode_picture
from handlers.client import fetch
from handlers.launch.processes import free_port
from model_store.torchserve import build_archive
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

WORKER = "model_service_worker"
# A network that takes its time, wherever it runs.
SLOW = """
import time
from mpm_ops import Segmenter

embed = Segmenter.embed

def slow(self, windows):
    time.sleep(2)
    return embed(self, windows)

Segmenter.embed = slow
"""
# A worker that ends while it loads, from when a file exists.
FALLING = """
import os

if os.path.exists({file!r}):
    os._exit(3)
"""


@pytest.fixture
def build(checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """Builds `tiny` for a server, with more code in front; returns the launcher's module and the folder."""

    def build(server: str, code: str = "", **serving: object) -> tuple[str, Path]:
        out, fields = tmp_path / "store", {"schedule": [0, 1]} | serving
        if server == "triton":
            model = build_model(checkpoint, name="tiny", out=out, serving=fields) / "model.py"
            model.write_text(code + model.read_text())
            return "triton", out
        archive = build_archive(checkpoint, name="tiny", out=out, serving=fields)
        with zipfile.ZipFile(archive) as source:
            files = {name: source.read(name) for name in source.namelist()}
        files["handler.py"] = code.encode() + files["handler.py"]
        with zipfile.ZipFile(archive, "w") as target:
            for name, data in files.items():
                target.writestr(name, data)
        return "torchserve", out

    return build


def test_triton_ends_when_its_model_was_killed(build: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    """It would start no other. Before that: its own metrics, and its secret, as the command was told."""
    port, secret = free_port(), tmp_path / "secret"
    secret.write_text("an old one")
    options = ("--triton-metrics-port", port, "--admin-secret-file", secret)
    with launched(*build("triton"), tmp_path / "log", *options) as server:
        assert server.is_ready
        counted = fetch(f"http://127.0.0.1:{port}/metrics", timeout_seconds=10).body.decode()
        assert 'nv_inference_request_failure{model="tiny",reason="REJECTED"' in counted
        assert secret.stat().st_mode & 0o777 == 0o600
        for given, status in (("guess", 403), (secret.read_text().strip(), 200)):
            assert fetch(f"{server.url}/v2/repository/index", b"", headers={"x-admin": given}).status == status
        (stub,) = server.children("/tiny/")
        stub.kill()
        server.wait_until(lambda: not server.is_ready, 10)
        assert server.process.wait(60) == 1
    told = server.told
    assert "not ready: 1 of the processes that hold models ended" in told
    assert "no model comes back here" in told
    assert "Traceback" not in told


def test_torchserve_is_not_ready_until_its_worker_is_back(
    build: Callable[..., tuple[str, Path]], tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    with launched(*build("torchserve"), tmp_path / "log") as server:
        assert server.is_ready
        (worker,) = server.children(WORKER)
        worker.kill()
        server.wait_until(lambda: not server.is_ready, 10)
        server.wait_until(lambda: server.is_ready, 60)
        picture = encode_picture(photo(0), "image/png")
        assert fetch(f"{server.url}/predictions/tiny", picture, timeout_seconds=60).status == 200
    assert server.process.returncode == 0
    assert "ready again" in server.told


@pytest.mark.slow
def test_torchserve_ends_when_no_worker_comes_back(build: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with launched(*build("torchserve", FALLING.format(file=str(broken))), tmp_path / "log") as server:
        broken.touch()
        (worker,) = server.children(WORKER)
        worker.kill()
        assert server.process.wait(200) == 1
    assert "no model comes back here" in server.told


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["torchserve", "triton"])
def test_too_much_to_do_is_no_illness(
    build: Callable[..., tuple[str, Path]], tmp_path: Path, photo: Callable[..., np.ndarray], target: str
) -> None:
    """What waits takes longer than any probe does, for as long as would be three probes."""
    port = free_port()
    serving = {"max_group_windows": 1, "max_inflight_tokens": 65 * 16, "metrics_port": port}
    statuses: Counter[int] = Counter()
    end = threading.Event()
    picture = encode_picture(photo(0, 128, 128), "image/png")  # one window

    def ask(server: Launched) -> None:
        while not end.is_set():
            if target == "triton":
                statuses[infer_raw(server.url, "tiny", picture).status] += 1
            else:
                answer = fetch(f"{server.url}/predictions/tiny", picture, timeout_seconds=100)
                statuses[answer.status] += 1
            time.sleep(0.2)

    with launched(*build(target, SLOW, **serving), tmp_path / "log") as server:
        clients = [threading.Thread(target=ask, args=(server,)) for _ in range(110)]
        for client in clients:
            client.start()
        path = "v2/models/tiny" if target == "triton" else "predictions/tiny"
        probe = [sys.executable, "-m", "handlers", "health", f"{server.url}/{path}", "--timeout", "8", "--metrics"]
        begin, alive, ready = time.monotonic(), [], []
        while time.monotonic() < begin + 75:
            alive.append(subprocess.run([*probe, f"http://127.0.0.1:{port}/metrics"]).returncode)
            ready.append(server.is_ready)
            time.sleep(1)
        without_metrics = subprocess.run([*probe, ""], stderr=subprocess.DEVNULL).returncode
        assert server.process.poll() is None
        end.set()
        for client in clients:
            client.join()
    assert set(alive) == {0}
    assert all(ready)
    assert without_metrics == 1, "it was not overloaded after all"
    assert statuses[200] > 10
    assert statuses[503] > 10
    assert set(statuses) == {200, 503}
    assert "not ready" not in server.told
