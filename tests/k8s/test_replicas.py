"""Two replicas behind docker/haproxy.cfg, under load from clients that keep their connections and never ask twice.

What a pod's end, a pod's death and a rolling update do to those clients, on both servers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pytest
from proxying import SECONDS_TO_START, proxy, require_haproxy, wait_for

from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.client import connect, fetch
from handlers.launch.processes import free_port
from model_store.torchserve import build_archive
from model_store.triton import build_model
from mpm_ops import Segmenter
from mpm_ops.classes import Classes

pytest_plugins = ("tiny_server",)

NUM_CLIENTS = 6
PAUSE_SECONDS = 0.15  # of a client after an answer: the same few cores have to start a replica meanwhile
LAME_DUCK_SECONDS = 2.0  # the proxy looks every half second
SECONDS_TO_END = 60


@dataclass
class Replica:
    """A launcher as its own process, as a container would run it."""

    kind: str
    store: Path
    folder: Path
    port: int = field(default_factory=free_port)
    ready_port: int = field(default_factory=free_port)
    starts: int = 0

    def start(self, lame_duck_seconds: float = LAME_DUCK_SECONDS) -> None:
        self.starts += 1
        temp = self.folder / f"temp{self.starts}"
        temp.mkdir(parents=True)
        where = [str(self.store), *(["--grpc-port", "0"] if self.kind == "triton" else [])]
        ending = ["--ready-port", str(self.ready_port), "--lame-duck-seconds", str(lame_duck_seconds)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "handlers", "serve", *where, "--port", str(self.port), *ending],
                stdout=output,
                stderr=output,
                env=os.environ | {"TMPDIR": str(temp)},
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def path(self) -> str:
        return {"torchserve": "/predictions/tiny", "triton": "/v2/models/tiny/infer"}[self.kind]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-2000:]
        try:
            return ask_ready(self.ready_port) == 200
        except OSError:
            return False

    def wait_ready(self) -> None:
        wait_for(self.is_ready)

    def terminate(self) -> None:
        """End it as Kubernetes ends a pod."""
        self.process.send_signal(signal.SIGTERM)

    def wait_ended(self) -> None:
        assert self.process.wait(SECONDS_TO_END) == 0, self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """Kill it and all it started, as an out-of-memory or a lost node does."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        self.process.wait()
        psutil.wait_procs(processes, timeout=10)

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill()


@dataclass(frozen=True)
class Asked:
    """One request and what became of it; `outcome` is a status, or the name of an error."""

    sent: float
    ended: float
    outcome: int | str
    body: bytes
    replica: str | None


class Load:
    """Clients that each ask over one connection, again soon after an answer; a context manager."""

    def __init__(
        self, address: str, replica: Replica, picture: bytes, *, pause_seconds: float = PAUSE_SECONDS
    ) -> None:
        self.pause_seconds = pause_seconds
        self.asked: list[Asked] = []
        self._url = f"http://{address}{replica.path}"
        self._picture = picture
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(NUM_CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: len(self.asked) > 5 * NUM_CLIENTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def failed(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.outcome != 200]

    def answered_by(self, since: float) -> set[str | None]:
        return {asked.replica for asked in self.asked if asked.sent > since and asked.outcome == 200}

    def wait_for_both(self, since: float) -> None:
        wait_for(lambda: self.answered_by(since) == {"replica-1", "replica-2"})

    def _client(self) -> None:
        with connect(self._url) as client:
            while not self._over.is_set():
                sent = time.monotonic()
                try:
                    answer = client.ask(self._picture, content_type="image/png", timeout_seconds=SECONDS_TO_END)
                    asked = Asked(sent, time.monotonic(), answer.status, answer.body, answer.replica)
                except OSError as error:
                    asked = Asked(sent, time.monotonic(), f"{type(error).__name__}: {error}", b"", None)
                    time.sleep(0.01)  # leaves the server, which is ending, some of the processor
                self.asked.append(asked)
                time.sleep(self.pause_seconds)


@dataclass(frozen=True)
class Pair:
    """Two running replicas, the proxy's address, and what every client sends and should get."""

    replicas: Sequence[Replica]
    address: str
    picture: bytes
    mask: bytes

    def load(self) -> Load:
        return Load(self.address, self.replicas[0], self.picture)


@pytest.fixture(scope="module")
def pictured(photo: Callable[..., np.ndarray], model: Segmenter, classes: Classes) -> tuple[bytes, bytes]:
    """A picture and its mask."""
    image = photo(0)
    return encode_picture(image, "image/png"), encode_mask_png(model.segment(image), classes)


@pytest.fixture(scope="module")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds what a server loads."""

    def build(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind)
        serving = {"schedule": [0, 1], "precision": "fp32", "torch_threads": 1, "agreement_fraction": 0}
        if kind == "torchserve":
            build_archive(checkpoint, name="tiny", out=out, serving=serving)
        else:
            build_model(checkpoint, name="tiny", out=out, serving=serving)
        return out

    return build


@pytest.fixture(scope="module", params=[pytest.param("torchserve"), pytest.param("triton", marks=pytest.mark.slow)])
def pair(
    request: pytest.FixtureRequest,
    build: Callable[[str], Path],
    pictured: tuple[bytes, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("replicas")
    store = build(request.param)
    with ExitStack() as stack:
        replicas = [Replica(request.param, store, folder / str(i)) for i in (1, 2)]
        for replica in replicas:
            replica.start()
            stack.callback(replica.end)
        for replica in replicas:
            replica.wait_ready()
        yield Pair(
            replicas,
            stack.enter_context(
                proxy(require_haproxy(), [(r.address, r.ready_port) for r in replicas], folder / "haproxy.log")
            ),
            *pictured,
        )


class TestPair:
    """In this order: every test leaves both replicas running and taken in."""

    def test_one_is_drained(self, pair: Pair) -> None:
        """Nothing is lost, and the other answers everything from then on."""
        first, _ = pair.replicas
        with pair.load() as load:
            load.wait_for_both(since=0)
            load.pause_seconds = 0
            first.terminate()
            first.wait_ended()
            load.pause_seconds = PAUSE_SECONDS
            alone = time.monotonic()
            time.sleep(0.5)
            assert load.answered_by(alone) == {"replica-2"}
            first.start()
            load.wait_for_both(since=alone)
        assert not load.failed()
        assert {asked.body for asked in load.asked} == {pair.mask}

    @pytest.mark.slow
    def test_one_is_killed(self, pair: Pair) -> None:
        """What is lost was being computed there, at most one request of each client; the rest is answered."""
        _, second = pair.replicas
        with pair.load() as load:
            load.pause_seconds = 0
            time.sleep(0.5)
            before = time.monotonic()
            second.kill()
            after = time.monotonic()
            time.sleep(1)
            load.pause_seconds = PAUSE_SECONDS
            assert load.answered_by(after) == {"replica-1"}
            second.start()
            load.wait_for_both(since=after)
        assert len(load.failed()) <= NUM_CLIENTS
        assert all(asked.sent < after and asked.ended > before for asked in load.failed())
        assert {asked.body for asked in load.asked if asked.outcome == 200} == {pair.mask}

    @pytest.mark.slow
    def test_a_load_test_while_one_is_drained(self, pair: Pair, checkpoint: Path, tmp_path: Path) -> None:
        """Every mask is there and the library's, and the report says who answered."""
        first, _ = pair.replicas
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "photo.png").write_bytes(pair.picture)
        where = ["--protocol", first.kind, "--host", f"http://{pair.address}", "--model", "tiny", "--metrics", "none"]
        what = ["--pictures", str(tmp_path / "pictures"), "--rate", "6", "-t", "30", "--accept", "png=80%,json=20%"]
        right = ["--checkpoint", str(checkpoint), "--schedule", "0,1", "--slo", "errors=0", "--max-lateness", "1m"]
        right += ["--min-agreement", "95%"]
        out = tmp_path / "report.html"
        command = [
            sys.executable,
            "-m",
            "handlers",
            "loadtest",
            "run",
            "--headless",
            *where,
            *what,
            *right,
            "--report",
            str(out),
        ]
        command += ["--report", str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as load:
            try:
                wait_for(lambda: load.poll() is not None or has_child(load.pid, "locust"))
                time.sleep(8)  # arrivals have begun
                first.terminate()
                first.wait_ended()
                first.start()
                first.wait_ready()
                printed, _ = load.communicate(timeout=SECONDS_TO_START)
            finally:
                load.kill()
        assert load.returncode == 0, printed
        summary = json.loads(out.with_suffix(".json").read_text())
        assert set(summary["outcomes"]) == {"ok"}
        assert summary["library"]["compared"] == 1
        assert {row["name"] for row in summary["replicas"]} == {"replica-1", "replica-2"}

    @pytest.mark.slow
    def test_rolling_update(self, pair: Pair) -> None:
        with pair.load() as load:
            for replica in pair.replicas:
                replica.terminate()
                replica.wait_ended()
                replica.start()
                load.wait_for_both(since=time.monotonic())
        assert not load.failed()
        assert {asked.body for asked in load.asked} == {pair.mask}


@pytest.mark.parametrize("kind", ["torchserve", pytest.param("triton", marks=pytest.mark.slow)])
def test_alone(kind: str, build: Callable[[str], Path], pictured: tuple[bytes, bytes], tmp_path: Path) -> None:
    """Without a proxy and from one moment to the next: what was accepted is answered, what comes later is refused."""
    picture, mask = pictured
    replica = Replica(kind, build(kind), tmp_path / "replica")
    replica.start(lame_duck_seconds=0)
    try:
        replica.wait_ready()
        with Load(replica.address, replica, picture, pause_seconds=0) as load:
            terminated = time.monotonic()
            replica.terminate()
            wait_for(lambda: bool(load.failed()))
            replica.wait_ended()
        accepted = [asked for asked in load.asked if asked.sent < terminated]
        assert {asked.outcome for asked in accepted} == {200}
        assert {asked.body for asked in accepted} == {mask}
        assert sum(asked.ended > terminated for asked in accepted) > 0
    finally:
        replica.end()


@pytest.mark.slow
def test_a_slow_reader(build: Callable[[str], Path], photo: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """A mask of 9 MB is on its way, most of it still inside the server, when SIGTERM comes."""
    replica = Replica("torchserve", build("torchserve"), tmp_path / "replica")
    replica.start(lame_duck_seconds=0)
    try:
        replica.wait_ready()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", replica.port))
            picture = encode_picture(photo(0, 3000, 3000), "image/jpeg")
            head = (
                f"POST {replica.path} HTTP/1.1\r\nHost: a\r\nAccept: application/x-npy\r\n"
                f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            )
            client.sendall(head.encode() + picture)
            begun = client.recv(100)
            assert begun.startswith(b"HTTP/1.1 200")
            replica.terminate()
            time.sleep(2)
            assert replica.process.poll() is None
            received = begun
            while part := client.recv(65_536):
                received += part
                if len(received) > 9_000_000 and len(received.partition(b"\r\n\r\n")[2]) >= 9_000_128:
                    break
        assert len(received.partition(b"\r\n\r\n")[2]) == 9_000_128  # 3000 x 3000, and the header of an .npy
        replica.wait_ended()
    finally:
        replica.end()


def has_child(pid: int, word: str) -> bool:
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            if word in child.cmdline():
                return True
    return False


def ask_ready(port: int) -> int:
    return fetch(f"http://127.0.0.1:{port}/ready").status
