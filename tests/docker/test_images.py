"""The images, built and run for real: what they hold, what they answer, and how they end."""

import ctypes
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import psutil
import pytest
from image_building import CannotBuildError, build_image, install_programs

from handlers.api.decode import decode_image
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.classes import Classes, load_classes

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 150
CONFINED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]

pytest_plugins = ("tiny_server",)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Server:
    """Where a target of the Dockerfile answers."""

    target: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"


TORCHSERVE = Server("torchserve", 8080, "/predictions/segmenter")
TRITON = Server("triton", 8000, "/v2/models/segmenter")


class Container:
    """A container in a network of its own, so that its ports are those of the image and disturb nobody.

    A context manager that removes it. What is asked of it is asked by threads that live in its network.
    """

    def __init__(self, image: str, *options: str, command: Sequence[str] = (), memory: str = "4g") -> None:
        limits = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096", "--memory", memory]
        limits += ["--shm-size", "256m"]
        common = ["--detach", "--runtime", "runc", "--network", "none", "--no-healthcheck"]
        self._id = podman("run", *common, *limits, *CONFINED, *options, image, *command).strip()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        podman("rm", "--force", "--time", "1", "--volumes", self._id)

    @property
    def pid(self) -> int:
        return int(self.inspect("{{.State.Pid}}"))

    def inspect(self, template: str) -> str:
        return podman("inspect", "--format", template, self._id).strip()

    def logs(self) -> str:
        return subprocess.run(
            ["podman", "logs", self._id], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout

    def execute(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["podman", "exec", self._id, *command], capture_output=True, text=True, timeout=120)

    def signal(self, number: signal.Signals) -> None:
        podman("kill", "--signal", number.name, self._id)

    def wait(self, timeout_seconds: float) -> int:
        """The exit status, once there is one."""
        deadline = time.monotonic() + timeout_seconds
        while self.inspect("{{.State.Status}}") not in ("exited", "stopped"):
            assert time.monotonic() < deadline, f"still running after {timeout_seconds} s:\n{self.logs()}"
            time.sleep(0.1)
        return int(self.inspect("{{.State.ExitCode}}"))

    def wait_ready(self) -> "Container":
        deadline = time.monotonic() + SECONDS_TO_START
        while "Ctrl-C stops the server." not in self.logs():
            assert self.inspect("{{.State.Status}}") == "running", self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)
        return self

    def clients(self, number: int = 1) -> ThreadPoolExecutor:
        """Threads in the container's network."""
        return ThreadPoolExecutor(number, initializer=enter_network, initargs=(self.pid,))

    def models(self) -> list[psutil.Process]:
        """The processes that hold a model: the last of their line."""
        return [process for process in self.processes()[1:] if "python" in process.name()][-1:]

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]

    def peak_memory_bytes(self) -> int:
        found: dict[str, str] = {}
        for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found[controllers] = path
        if "memory" in found:
            folder = Path("/sys/fs/cgroup/memory" + found["memory"])
            return int((folder / "memory.max_usage_in_bytes").read_text())
        return int(Path("/sys/fs/cgroup" + found[""], "memory.peak").read_text())


def podman(*arguments: str) -> str:
    # Its monitor leaves a file `oom` in the folder where it is started, when that is what happened.
    done = subprocess.run(
        ["podman", *arguments], capture_output=True, text=True, timeout=180, cwd=tempfile.gettempdir()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def enter_network(pid: int) -> None:
    """Move this thread into the network of a process; sockets it opens from now on are there."""
    with open(f"/proc/{pid}/ns/net") as network:
        clone_newnet = 0x40000000
        assert ctypes.CDLL(None, use_errno=True).setns(network.fileno(), clone_newnet) == 0, os.strerror(
            ctypes.get_errno()
        )


def ask(server: Server, picture: bytes, timeout_seconds: float = 90) -> tuple[int, bytes]:
    """Status and mask, or whatever else came, on a connection of its own."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=timeout_seconds)
    headers = {"Content-Type": "image/png", "Connection": "close"}
    path = server.path
    if server is TRITON:
        headers |= {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": "MASK_PNG"}
        path += "/infer"
    try:
        connection.request("POST", path, picture, headers)
        response = connection.getresponse()
        body = response.read()
        if server is TRITON and response.status == 200:
            body = body[int(response.getheader("Inference-Header-Content-Length", "0")) + 4 :]
        return response.status, body
    finally:
        connection.close()


@pytest.fixture(scope="module", params=[TORCHSERVE, TRITON], ids=lambda server: server.target)
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.param
    return found


@pytest.fixture(scope="module")
def image(server: Server) -> str:
    try:
        install_programs()
        return build_image(server.target)
    except CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def running(image: str) -> Iterator[Container]:
    """A container that only looks are taken at."""
    with Container(image) as container:
        yield container.wait_ready()


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path) -> tuple[Segmenter, Classes]:
    model = load_segmenter(demo_checkpoint, (2, 5), runtime="auto", precision="auto")
    return model, load_classes(demo_checkpoint.parent, model.config.n_cls)


@pytest.fixture(scope="module")
def picture(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(0, 240, 320), "image/png")


def mask_of(model: Segmenter, classes: Classes, picture: bytes) -> bytes:
    image = decode_image(picture, max_bytes=len(picture), max_pixels=10**6)
    return encode_mask_png(model.segment(image), classes)


class TestAnswers:
    def test_the_librarys_bytes(
        self, running: Container, server: Server, demo: tuple[Segmenter, Classes], picture: bytes
    ) -> None:
        with running.clients() as clients:
            assert clients.submit(ask, server, picture).result() == (200, mask_of(*demo, picture))

    def test_metrics(self, running: Container) -> None:
        def scrape() -> bytes:
            connection = HTTPConnection("127.0.0.1", 8090, timeout=10)
            connection.request("GET", "/metrics")
            return connection.getresponse().read()

        with running.clients() as clients:
            assert b"mpm_model_info{" in clients.submit(scrape).result()

    def test_health_check_of_the_image(self, running: Container, image: str) -> None:
        (check,) = json.loads(podman("image", "inspect", "--format", "json", image))
        kind, *command = check["Healthcheck"]["Test"]
        assert kind == "CMD"
        done = running.execute(*command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestConfinement:
    def test_user_and_rights(self, running: Container) -> None:
        assert running.execute("id", "--user").stdout.strip() == "10001"
        assert running.execute("id", "--group").stdout.strip() == "10001"
        status = running.execute("cat", "/proc/1/status").stdout
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status

    @pytest.mark.parametrize("folder", ["/", "/opt/mpm", "/models", "/etc", "/opt/mpm/lib"])
    def test_nothing_is_written_there(self, running: Container, folder: str) -> None:
        assert "Read-only file system" in running.execute("touch", f"{folder}/x").stderr

    def test_no_compiler_no_installer(self, running: Container) -> None:
        told = "find / -xdev -type f -perm /111 -regextype posix-extended -regex "
        pattern = r"'.*/(gcc|g\+\+|cc|c\+\+|cc1|cc1plus|clang|clang\+\+|ld|as|make|cmake|ninja|pip[0-9.]*)(-[0-9.]+)?'"
        done = running.execute(
            "sh", "-c", f"{told}{pattern} 2>/dev/null; test -x /opt/mpm/bin/python && echo searched"
        )
        assert done.stdout.split() == ["searched"]

    @pytest.mark.parametrize(("folder", "found"), [("/cache/numba", True), ("/tmp/nothing", False)])
    def test_what_was_compiled_in_the_build_is_used(self, running: Container, folder: str, found: bool) -> None:
        script = (
            "import torch; from mpm_ops import merge_cpu; merge_cpu.merge_tokens_cpu(torch.randn(64, 192));"
            "print([bool(f.stats.cache_hits) for f in (merge_cpu._normalize, merge_cpu._update, merge_cpu._average)])"
        )
        done = running.execute("env", f"NUMBA_CACHE_DIR={folder}", "python", "-c", script)
        assert done.stdout.strip() == str([found] * 3), done.stderr


class TestContent:
    def test_bill_of_materials(self, running: Container) -> None:
        bill = json.loads(running.execute("cat", "/opt/mpm/sbom.cdx.json").stdout)
        assert bill["bomFormat"] == "CycloneDX"
        listed = {
            component["name"].lower().replace("_", "-"): component["version"] for component in bill["components"]
        }
        there = running.execute(
            "python",
            "-c",
            "import importlib.metadata as m, json;"
            "print(json.dumps([(d.name.lower().replace('_', '-'), d.version) for d in m.distributions()]))",
        )
        assert listed == dict(json.loads(there.stdout))
        lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
        pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line)
        unpinned = {name: version for name, version in listed.items() if pins.get(name) != version.partition("+")[0]}
        assert unpinned.keys() == {"mpm-segmenter"}
        assert listed["torch"].endswith("+cpu")

    def test_labels(self, image: str, server: Server) -> None:
        labels = json.loads(podman("image", "inspect", "--format", "{{json .Labels}}", image))
        assert labels["org.opencontainers.image.title"] == f"mpm-segmenter-{server.target}"
        assert labels["org.opencontainers.image.version"]

    def test_size(self, image: str, record_property: Callable[[str, object], None]) -> None:
        """A CUDA library or a compiler that slipped in is larger than what is left to the bound."""
        size = int(podman("image", "inspect", "--format", "{{.Size}}", image))
        print(f"{image}: {size / 1e9:.2f} GB")
        record_property("size_bytes", size)
        assert size < 2.2e9


class TestModelOfOnesOwn:
    def test_from_checkpoint_to_mask(
        self,
        image: str,
        server: Server,
        checkpoint: Path,
        model: Segmenter,
        classes: Classes,
        picture: bytes,
        tmp_path: Path,
    ) -> None:
        models, config = tmp_path / "models", tmp_path / "config"
        for folder in (models, config):
            folder.mkdir()
        os.chown(models, 10001, 10001)
        for path in (*checkpoint.parent.iterdir(), checkpoint.parent, *checkpoint.parents[1:3], tmp_path):
            path.chmod(path.stat().st_mode | 0o555)
        (config / "serving.yml").write_text("metrics_host: 0.0.0.0\nmax_group_windows: 4\n")
        command = ["mpm", "build", "--target", server.target]
        command += ["--checkpoint", "/checkpoint/checkpoint.pth", "--name", "segmenter", "--schedule", "0,1"]
        command += ["--metrics-port", "8090", "--config", "/config/serving.yml", "--out", "/models"]
        mounts = ["-v", f"{checkpoint.parent}:/checkpoint:ro", "-v", f"{config}:/config:ro", "-v", f"{models}:/models"]
        with Container(image, *mounts, command=command) as init:
            assert init.wait(60) == 0, init.logs()
        with Container(image, "-v", f"{models}:/models:ro") as container:
            container.wait_ready()
            with container.clients() as clients:
                assert clients.submit(ask, server, picture).result() == (200, mask_of(model, classes, picture))


class TestLoadTest:
    @pytest.fixture(scope="class")
    def image(self) -> str:
        try:
            install_programs()
            return build_image("loadtest")
        except CannotBuildError as error:
            pytest.skip(str(error))

    def test_runs_where_nothing_is_written(self, image: str) -> None:
        with Container(image, command=["mpm", "loadtest", "compare", "--help"]) as container:
            assert container.wait(60) == 0
            assert "--old" in container.logs()

    def test_has_what_asks_and_paints_not_what_computes(self, image: str) -> None:
        needed = "import importlib.util as u, locust, numpy, tritonclient.grpc, model_store.demo.painter;"
        script = f"{needed} print([name for name in ('torch', 'numba', 'ts') if u.find_spec(name)])"
        with Container(image, command=["python", "-c", script]) as container:
            assert container.wait(60) == 0, container.logs()
            assert container.logs().strip() == "[]"


class TestEnds:
    def test_health_check_fails_when_the_model_hangs(self, image: str, server: Server) -> None:
        command = ("mpm", "health", server.url, "--timeout", "3")
        with Container(image) as container:
            container.wait_ready()
            assert container.execute(*command).returncode == 0
            (model,) = container.models()
            model.suspend()
            try:
                done = container.execute(*command)
                assert done.returncode == 1
                assert server.url in done.stderr
                assert "Traceback" not in done.stderr
            finally:
                model.resume()

    def test_health_check_fails_when_the_model_is_dead(self, image: str, server: Server) -> None:
        """TorchServe brings it back within seconds; Triton never does, so that somebody has to notice."""
        command = ("mpm", "health", server.url, "--timeout", "3")
        with Container(image) as container:
            container.wait_ready()
            (model,) = container.models()
            model.kill()
            assert container.execute(*command).returncode == 1
            if server is TORCHSERVE:
                deadline = time.monotonic() + 60
                while container.execute(*command).returncode:
                    assert time.monotonic() < deadline
            else:
                time.sleep(5)
                assert container.execute(*command).returncode == 1

    def test_sigterm_under_load_loses_nothing(self, image: str, server: Server, picture: bytes) -> None:
        with Container(image) as container, container.clients(8) as clients:
            container.wait_ready()
            expected = clients.submit(ask, server, picture).result()
            assert expected[0] == 200
            stopping = time.monotonic() + 3
            loops = [clients.submit(ask_until_refused, server, picture, stopping + 60) for _ in range(8)]
            time.sleep(stopping - time.monotonic())
            told = time.monotonic()
            container.signal(signal.SIGTERM)
            assert container.wait(45) == 0, container.logs()
            took = time.monotonic() - told
            outcomes = [outcome for loop in loops for outcome in loop.result()]
            assert "Traceback" not in container.logs()
        before = [outcome for outcome in outcomes if outcome.sent < told]
        assert len(before) >= 8
        assert {outcome.answer for outcome in before} == {expected}
        after = [outcome for outcome in outcomes if outcome.sent >= told]
        refused = [outcome for outcome in after if outcome.answer != expected]
        assert {outcome.kind for outcome in refused} <= {"503", "connection"}
        print(f"{server.target}: {len(before)} before, {len(after)} after SIGTERM; ended in {took:.1f} s")


class TestMemory:
    def test_enough_for_the_demo_model_under_load(self, image: str, server: Server, picture: bytes) -> None:
        """Java's heap and a second copy of every body make the difference between the servers."""
        with Container(image, memory={"torchserve": "1536m", "triton": "1g"}[server.target]) as container:
            container.wait_ready()
            with container.clients(8) as clients:
                answers = [clients.submit(ask, server, picture) for _ in range(40)]
                assert len({answer.result() for answer in answers}) == 1
            assert answers[0].result()[0] == 200
            held = sum(process.memory_full_info().uss for process in container.processes()) / 2**20
            print(f"{server.target}: {held:.0f} MiB held, {container.peak_memory_bytes() / 2**20:.0f} at the most")

    def test_too_little_ends_it(self, image: str) -> None:
        """Not a server that looks alive without a model."""
        with Container(image, memory="300m") as container:
            status = container.wait(SECONDS_TO_START)
            assert status == 137 or (status == 1 and "ended" in container.logs().strip().splitlines()[-1])


@dataclass(frozen=True)
class Outcome:
    """Of a request: when it was sent, on the monotonic clock, and what came of it."""

    sent: float
    answer: tuple[int, bytes] | None

    @property
    def kind(self) -> str:
        return "connection" if self.answer is None else str(self.answer[0])


def ask_until_refused(server: Server, picture: bytes, until: float) -> list[Outcome]:
    """Ask again and again, until the first connection that is refused or reset."""
    outcomes: list[Outcome] = []
    while time.monotonic() < until:
        sent = time.monotonic()
        try:
            outcomes.append(Outcome(sent, ask(server, picture)))
        except (OSError, HTTPException):
            outcomes.append(Outcome(sent, None))
            break
    return outcomes
