"""Servers of several configurations, started through the launchers' commands on free loopback ports."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from loadtest.checking import check_integer
from loadtest.client.pictures import Item
from loadtest.client.ways import WAYS, NoAnswerError
from loadtest.ports import free_port
from loadtest.running import RunError, worker_environment
from loadtest.watching.scraping import read_metrics

MODEL = "segmenter"

_READY_SECONDS = 180.0
_STOP_SECONDS = 90.0
_DRAIN_SECONDS = 120.0
_OWN = ("way", "schedule", "align", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A way to serve.

    Attributes:
        way: server and protocol, one of `loadtest.client.ways.WAYS`.
        schedule: blocks before which tokens merge (2,5), or off.
        align: token counts after a merge are multiples of this.
        replicas: servers that share the device, and are asked in turn.
        serving: further fields of the served model's configuration, such as runtime or max_group_windows.
    """

    way: str = "torchserve"
    schedule: str = "2,5"
    align: int = 1
    replicas: int = 1
    serving: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {self.way!r}")
        for name in ("align", "replicas"):
            check_integer(name, getattr(self, name), minimum=1)

    @classmethod
    def parse(cls, text: str) -> "Configuration":
        """Read `schedule=off way=triton runtime=torch`; what is not our own field is one of the served model.

        Raises:
            ValueError: a part is no NAME=VALUE, or a value is not what its field expects.
        """
        values: dict[str, Any] = {}
        serving: dict[str, Any] = {}
        for part in text.split():
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"configuration: expected NAME=VALUE, got {part!r}")
            if name not in _OWN:
                serving[name] = yaml.safe_load(value)
            elif name in ("align", "replicas"):
                values[name] = int(value) if value.isdecimal() else value
            else:
                values[name] = value
        return cls(**values, serving=serving)

    @property
    def name(self) -> str:
        """What tells it from others: the way, the schedule and whatever is not the default."""
        parts = [self.way, "no merging" if self.schedule == "off" else f"merging {self.schedule}"]
        parts += [f"align {self.align}"] if self.align > 1 else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.serving.items())])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Served:
    """The servers of one configuration, as child processes; a context manager that stops them.

    Args:
        checkpoint: checkpoint.pth with its variant.yml beside it.
        folder: for archives and logs; made if missing.

    Raises:
        RunError: the checkpoint can't be built for the server.
    """

    def __init__(self, configuration: Configuration, checkpoint: Path, folder: Path) -> None:
        self.configuration = configuration
        self.urls: list[str] = []
        self.metrics: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for i in range(configuration.replicas):
                self._start(checkpoint, folder, i)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, picture: Item) -> None:
        """Return once every server has answered a picture.

        Raises:
            RunError: one ended, or did not in time.
        """
        deadline = time.monotonic() + _READY_SECONDS
        for url, process, log in zip(self.urls, self._processes, self._logs, strict=True):
            client = WAYS[self.configuration.way]([url], MODEL)
            try:
                while True:
                    if process.poll() is not None or time.monotonic() > deadline:
                        words = log.read_text(errors="replace").splitlines()[-15:]
                        raise RunError(f"{self.configuration.name} did not become ready:\n" + "\n".join(words))
                    try:
                        if client.ask(picture, 0, 30.0).status == 200:
                            break
                    except (NoAnswerError, TimeoutError):
                        pass
                    time.sleep(0.2)
            finally:
                client.close()

    def wait_idle(self) -> None:
        """Return once nothing is in flight any more: what a run left behind must not slow the next.

        Raises:
            RunError: it took too long.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < deadline:
            try:
                if read_metrics(self.metrics).total("mpm_inflight_requests") == 0:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RunError(f"{self.configuration.name}: still busy {_DRAIN_SECONDS:g} s after the load ended")

    def stop(self) -> None:
        """SIGTERM for each, which ends it in order."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, checkpoint: Path, folder: Path, number: int) -> None:
        configuration = self.configuration
        triton = configuration.way.startswith("triton")
        port, grpc_port, metrics_port = (free_port() for _ in range(3))
        config, out = folder / f"serving-{number}.yml", folder / f"models-{number}"
        config.write_text(yaml.safe_dump(dict(configuration.serving)), encoding="utf-8")
        options: dict[str, object] = {
            "target": "triton" if triton else "torchserve",
            "checkpoint": checkpoint,
            "name": MODEL,
            "out": out,
            "schedule": configuration.schedule,
            "align": configuration.align,
            "metrics-port": metrics_port,
            "config": config,
        }
        built = subprocess.run(
            [sys.executable, "-m", "model_store", "build", *_flags(options)],
            env=worker_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise RunError(f"{configuration.name}: {built.stderr.strip()}")
        if triton:
            command = ["handlers.launch.triton", *_flags({"model-repository": out, "grpc-port": grpc_port})]
        else:
            command = ["handlers.launch.torchserve", *_flags({"model-store": out})]
        log = folder / f"server-{number}.log"
        with log.open("wb") as output:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command, "--port", str(port)],
                    env=worker_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        self._logs.append(log)
        grpc = configuration.way == "triton-grpc"
        self.urls.append(f"127.0.0.1:{grpc_port}" if grpc else f"http://127.0.0.1:{port}")
        self.metrics.append(f"http://127.0.0.1:{metrics_port}/metrics")


def _flags(options: Mapping[str, object]) -> Sequence[str]:
    return [text for name, value in options.items() for text in (f"--{name}", os.fspath(str(value)))]
