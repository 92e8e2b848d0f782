"""Starting, dying, recovering, changing models, stopping: what goes wrong is noticed, and nothing is left behind."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from asking_triton import TIMEOUT, infer_raw, raw_outputs, stub_of
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from handlers.api.formats.views import encode_picture
from handlers.cli import main
from handlers.client import Answer, fetch
from handlers.launch.processes import ServerError, free_port
from handlers.launch.triton import Triton
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

SECONDS_TO_START = 150
# The adapter and the engine as they are, with a valve between them: closed while a file exists.
MODEL_WITH_VALVE = """
import os, threading, time
from handlers.servers.triton import TritonPythonModel as Served

class TritonPythonModel(Served):
    def initialize(self, args):
        super().initialize(args)
        take, closed = self._engine.take, os.path.join(args["model_repository"], "closed")

        def take_when_open(*request):
            def wait():
                while os.path.exists(closed):
                    time.sleep(0.01)
                take(*request)

            threading.Thread(target=wait, daemon=True).start()

        self._engine.take = take_when_open
"""


@pytest.fixture
def picture(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(0), "image/png")


@pytest.fixture(scope="module")
def own_metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def own_repository(checkpoint: Path, own_metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own repository")
    serving = {"schedule": [0, 1], "deadline_seconds": 4, "metrics_port": own_metrics_port}
    build_model(checkpoint, name="tiny", out=out, serving=serving, max_inflight=2, max_queue_size=3)
    (out / "tiny" / "1" / "model.py").write_text(MODEL_WITH_VALVE)
    return out


@pytest.fixture
def valve(own_repository: Path) -> Iterator[Path]:
    """A closed valve; unlink it to open it."""
    file = own_repository / "tiny" / "closed"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def own_triton(own_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A server that tests may hurt."""
    log = tmp_path_factory.mktemp("own_triton") / "triton.log"
    with Triton(own_repository, log=log, exit_seconds=4) as running:
        running.wait_ready(SECONDS_TO_START)
        yield running
    assert not list(Path("/dev/shm").glob(f"{running._shm_prefix}*"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., list[str]]]:
    """Runs the command with arguments that it must refuse; returns what it prints."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> list[str]:
        assert main(["serve", "--server", "triton", *map(str, arguments)]) == 1
        return capsys.readouterr().err.splitlines()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def change(server: Triton, model: str, action: str) -> None:
    url = f"{server.url}/v2/repository/models/{model}/{action}"
    answer = fetch(url, b"", headers={"x-admin": server.admin_secret}, timeout_seconds=TIMEOUT)
    assert answer.status == 200, answer.error


def is_healthy(server: Triton, *, timeout_seconds: float) -> bool:
    url = f"{server.url}/v2/models/tiny"
    command = [sys.executable, "-m", "handlers", "health", url, "--timeout", str(timeout_seconds)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert time.monotonic() - start < timeout_seconds + 5
    assert done.stderr.count("\n") == done.returncode
    return done.returncode == 0


def num_requests(metrics_port: int) -> Counter[str]:
    """Requests by the code that they ended with."""
    return Counter({s.labels["code"]: int(s.value) for s in samples(metrics_port) if s.name == "mpm_requests_total"})


def wait_queued(server: Triton, number: int) -> None:
    """Wait until so many requests are in Triton's queue, and those before them on their way to the engine."""
    name = "nv_inference_pending_request_count"
    wait_for(lambda: sum(s.value for s in samples(server.metrics_port) if s.name == name) == number)


def samples(metrics_port: int) -> list[Sample]:
    text = fetch(f"http://127.0.0.1:{metrics_port}/metrics", timeout_seconds=TIMEOUT).body.decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def ready(server: Triton) -> int:
    return fetch(f"{server.url}/v2/health/ready").status


class TestRefusals:
    @pytest.mark.parametrize("option", ["--port", "--grpc-port"])
    def test_port_in_use(self, own_repository: Path, run: Callable[..., list[str]], option: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            ports = {"--port": 0, "--grpc-port": 0} | {option: port}
            printed = run(own_repository, *[part for item in ports.items() for part in item])
            assert printed == [f"cannot listen on 127.0.0.1:{port}: Address already in use"]

    def test_no_model(self, tmp_path: Path, run: Callable[..., list[str]]) -> None:
        assert run(tmp_path) == [f"model_repository: expected models with config.pbtxt in it, got {tmp_path}"]

    def test_name_that_no_model_may_have(self, tmp_path: Path, run: Callable[..., list[str]]) -> None:
        (tmp_path / "a b").mkdir()
        (tmp_path / "a b" / "config.pbtxt").write_text("")
        (line,) = run(tmp_path)
        assert "expected a name of letters, digits" in line

    @pytest.mark.slow
    def test_model_that_does_not_load(self, own_repository: Path, tmp_path: Path) -> None:
        shutil.copytree(own_repository / "tiny", tmp_path / "store" / "tiny")
        (tmp_path / "store" / "tiny" / "1" / "serving.yaml").write_text("windos: 3")
        with Triton(tmp_path / "store", log=tmp_path / "log") as server:
            with pytest.raises(ServerError, match="Triton ended with status 1") as caught:
                server.wait_ready(SECONDS_TO_START)
            assert "unknown fields windos" in str(caught.value)


class TestDeathAndRecovery:
    def test_killed_model(self, own_triton: Triton, picture: bytes) -> None:
        assert is_healthy(own_triton, timeout_seconds=20)
        stub_of(own_triton, "tiny").kill()
        assert ready(own_triton) == 200  # which is why the model has to be asked
        assert not is_healthy(own_triton, timeout_seconds=3)
        assert own_triton.ailment() == "1 of the processes that hold models ended"
        change(own_triton, "tiny", "unload")
        change(own_triton, "tiny", "load")
        assert is_healthy(own_triton, timeout_seconds=20)
        own_triton.forget()  # the dead process is still there
        assert not own_triton.ailment()
        assert infer_raw(own_triton.url, "tiny", picture).status == 200

    def test_stuck_engine(self, own_triton: Triton, own_metrics_port: int, picture: bytes, valve: Path) -> None:
        """Requests end by the deadline in the model, also those that wait for room, and no place in it is lost."""
        before = num_requests(own_metrics_port)
        with ThreadPoolExecutor(3) as clients:  # one more than the model takes
            answers = list(clients.map(lambda _: infer_raw(own_triton.url, "tiny", picture), range(3)))
        assert {answer.error for answer in answers} == {"not answered within 4 s"}
        assert num_requests(own_metrics_port) - before == {"504": 3}
        assert not is_healthy(own_triton, timeout_seconds=2)
        assert ready(own_triton) == 200
        response = infer_raw(own_triton.url, "tiny", picture)
        assert response.status == 503
        assert response.error == "not answered within 4 s"
        valve.unlink()
        assert is_healthy(own_triton, timeout_seconds=20)

    @pytest.mark.slow
    def test_stopped_process(self, own_repository: Path, tmp_path: Path) -> None:
        """Triton may end then, as it sees a lock that nobody gives back; the probe tells either way."""
        with Triton(own_repository, log=tmp_path / "log", exit_seconds=1) as server:
            server.wait_ready(SECONDS_TO_START)
            stub = stub_of(server, "tiny")
            stub.suspend()
            try:
                assert not is_healthy(server, timeout_seconds=2)
            finally:
                stub.kill()


class TestTritonsQueue:
    """Because `execute` blocks while the engine is full, requests wait where Triton's rules hold."""

    def test_limit(self, own_triton: Triton, picture: bytes, valve: Path) -> None:
        with ThreadPoolExecutor(16) as clients:
            answers = []
            for number in (0, 0, 0, 1, 2):  # in turn, for a queue of three has no room for a burst of them
                answers.append(clients.submit(infer_raw, own_triton.url, "tiny", picture))
                time.sleep(0.1)
                wait_queued(own_triton, number)
            answers += [clients.submit(infer_raw, own_triton.url, "tiny", picture) for _ in range(11)]
            wait_for(lambda: sum(answer.done() for answer in answers) >= 8)  # refused at once
            assert {answer.result().status for answer in answers if answer.done()} == {503}
            valve.unlink()
            statuses = [answer.result().status for answer in answers]
        assert 2 + 3 <= statuses.count(200) <= 8  # in the engine, in the queue, and on the way between them

    def test_timeout(self, own_triton: Triton, picture: bytes, valve: Path) -> None:
        with ThreadPoolExecutor(6) as clients:
            answers = [clients.submit(infer_raw, own_triton.url, "tiny", picture) for _ in range(4)]
            time.sleep(0.5)
            wait_queued(own_triton, 1)  # two are in the engine, one is on its way there
            more = [clients.submit(infer_described, own_triton, picture, timeout=200_000) for _ in range(2)]
            refused = [answer.result() for answer in more]
            assert [response.status for response in refused] == [503, 503]
            assert "Request timeout expired" in refused[-1].error
            valve.unlink()
            assert [answer.result().status for answer in answers] == [200] * 4

    def test_priority(self, own_triton: Triton, picture: bytes, valve: Path) -> None:
        done: dict[str, float] = {}

        def ask(name: str, priority: int) -> None:
            assert infer_described(own_triton, picture, priority=priority).status == 200
            done[name] = time.monotonic()

        with ThreadPoolExecutor(12) as clients:
            before = [clients.submit(infer_raw, own_triton.url, "tiny", picture) for _ in range(4)]
            time.sleep(0.5)
            asked: list[Future[None]] = [clients.submit(ask, f"bulk {i}", 2) for i in range(3)]
            time.sleep(0.3)
            asked += [clients.submit(ask, f"interactive {i}", 1) for i in range(2)]
            time.sleep(0.3)
            valve.unlink()
            assert [answer.result().status for answer in before] == [200] * 4
            assert [answer.result() for answer in asked] == [None] * 5
        assert max(done[f"interactive {i}"] for i in range(2)) < max(done[f"bulk {i}"] for i in range(3))
        order = sorted(done, key=lambda name: done[name])
        assert order.index("interactive 1") < 4


class TestVersions:
    def test_a_new_version_beside_the_old_one(
        self, own_triton: Triton, own_repository: Path, checkpoint: Path, picture: bytes
    ) -> None:
        """While the new one loads, the old one answers; then both do, and the new one by default."""
        old = raw_outputs(infer_raw(own_triton.url, "tiny", picture))
        build_model(checkpoint, name="tiny", out=own_repository, serving={"schedule": []}, version=2)
        statuses = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                statuses.append(infer_raw(own_triton.url, "tiny", picture).status)

        asking = threading.Thread(target=ask)
        asking.start()
        with tritonclient.grpc.InferenceServerClient(own_triton.grpc_url) as client:  # over HTTP it holds up others
            client.load_model("tiny", headers={"triton-grpc-protocol-x-admin": own_triton.admin_secret})
        stop.set()
        asking.join()
        assert len(statuses) > 3
        assert set(statuses) == {200}

        assert raw_outputs(infer_raw(own_triton.url, "tiny/versions/1", picture))["MASK"] == old["MASK"]
        new = raw_outputs(infer_raw(own_triton.url, "tiny/versions/2", picture))
        assert new["MASK"] == raw_outputs(infer_raw(own_triton.url, "tiny", picture))["MASK"] != old["MASK"]
        wait_for(lambda: len(living(own_triton)) == 2)  # an engine each, once the replaced one is through

    def test_a_new_version_that_does_not_load(self, own_triton: Triton, own_repository: Path, picture: bytes) -> None:
        warm_up = own_repository / "tiny" / "warmup" / "broken.jpg"
        warm_up.write_bytes(b"junk")
        (own_repository / "tiny" / "2" / "serving.yaml").touch()  # Triton loads again what has changed
        try:
            with pytest.raises(AssertionError, match="image: expected JPEG"):
                change(own_triton, "tiny", "load")
        finally:
            warm_up.unlink()
        assert infer_raw(own_triton.url, "tiny", picture).status == 200

    def test_unload(self, own_triton: Triton, picture: bytes) -> None:
        change(own_triton, "tiny", "unload")
        wait_for(lambda: not living(own_triton))
        assert infer_raw(own_triton.url, "tiny", picture).status == 404
        assert not is_healthy(own_triton, timeout_seconds=5)
        change(own_triton, "tiny", "load")
        assert infer_raw(own_triton.url, "tiny", picture).status == 200


@pytest.fixture
def first_version(own_repository: Path, tmp_path: Path) -> Path:
    """A repository with the model as it was before a new version came beside it."""
    shutil.copytree(own_repository / "tiny", tmp_path / "store" / "tiny", ignore=shutil.ignore_patterns("2"))
    return tmp_path / "store"


class TestStopping:
    def test_nothing_accepted_is_lost(self, first_version: Path, picture: bytes, tmp_path: Path) -> None:
        valve = first_version / "tiny" / "closed"
        with (
            Triton(first_version, log=tmp_path / "log", exit_seconds=30) as server,
            ThreadPoolExecutor(6) as clients,
        ):
            server.wait_ready(SECONDS_TO_START)
            valve.touch()
            answers = [clients.submit(infer_raw, server.url, "tiny", picture) for _ in range(5)]
            time.sleep(0.5)  # some in the engine, some on the way, some in the queue
            assert not any(answer.done() for answer in answers)
            processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            stopping = clients.submit(server.stop)
            time.sleep(1)
            valve.unlink()
            assert [answer.result().status for answer in answers] == [200] * 5
            stopping.result()
        assert not [process for process in processes if process.is_running()]
        assert "stopped with 0 pictures in flight" in (tmp_path / "log").read_text()

    def test_ctrl_c(self, first_version: Path, picture: bytes, tmp_path: Path) -> None:
        port, log, temp = free_port(), tmp_path / "log", tmp_path / "temp"
        temp.mkdir()
        command = [sys.executable, "-m", "handlers", "serve", str(first_version)]
        ports = ["--port", str(port), "--grpc-port", "0"]
        environment = {"TMPDIR": str(temp), "http_proxy": "http://127.0.0.1:9"}  # a proxy that isn't there
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [*command, *ports],
                stdout=output,
                stderr=output,
                env=environment,
            ) as launcher,
        ):
            try:
                wait_for(lambda: "Ctrl-C stops the server" in log.read_text() or launcher.poll() is not None)
                assert f"Ready on http://127.0.0.1:{port}" in log.read_text()
                assert infer_raw(f"http://127.0.0.1:{port}", "tiny", picture).status == 200
                processes = psutil.Process(launcher.pid).children(recursive=True)
                assert len(processes) >= 2  # the server and a model
                launcher.send_signal(signal.SIGINT)
                time.sleep(0.3)
                launcher.send_signal(signal.SIGINT)  # an impatient person
                assert launcher.wait(60) == 0
            finally:
                launcher.terminate()
        assert not [process for process in processes if process.is_running()]
        assert not list(temp.glob("triton-*"))
        assert "Traceback" not in log.read_text()


def living(server: Triton) -> list[psutil.Process]:
    """The processes that hold models, without those that Triton has not buried."""
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


def infer_described(server: Triton, picture: bytes, **parameters: int) -> Answer:
    """With Triton's own parameters, which a raw body can't carry."""
    size = {"binary_data_size": len(picture) + 4}
    described = json.dumps(
        {
            "parameters": parameters,
            "inputs": [{"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES", "parameters": size}],
            "outputs": [{"name": "RESULT_JSON"}],
        }
    ).encode()
    return fetch(
        f"{server.url}/v2/models/tiny/infer",
        described + len(picture).to_bytes(4, "little") + picture,
        headers={"Inference-Header-Content-Length": str(len(described))},
        timeout_seconds=TIMEOUT,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
