"""Start locust for a run, watch it and the server, and bring home what was recorded."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .client.records import Pulse, Record
from .ports import free_port
from .settings import LoadSettings
from .watching.memory import MemorySample, read_memory
from .watching.sampling import Sampler
from .watching.scraping import Sample, check_metrics_url, read_metrics

LOCUSTFILE = Path(__file__).with_name("client") / "locustfile.py"
_READY_SECONDS = 180.0  # for all workers to connect and to ask for their references
_STOP_SECONDS = 10.0


class RunError(RuntimeError):
    """There is no result; the message says why."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What happened.

    Attributes:
        began_at: seconds since the epoch; the time 0 of records and pulses.
        gave_up: whether it ended early because `give_up` could not be kept any more.
        workers_finished: how many handed in their records.
        records: of all requests, in order of their numbers.
        pulses: of all workers.
        samples: the server's metrics, from a little before the beginning.
        num_missed: readings of metrics that failed.
        library: share of pixels that idle servers and the library agreed on at least, by the names of the pictures.
        memory: of the server's processes, if they were watched.
    """

    began_at: float
    gave_up: bool
    workers_finished: int
    records: Sequence[Record]
    pulses: Sequence[Pulse]
    samples: Sequence[Sample]
    num_missed: int
    library: Mapping[str, float] = field(default_factory=dict)
    memory: Sequence[MemorySample] = ()


def run_load(
    settings: LoadSettings,
    *,
    metrics: Sequence[str] = (),
    server_pid: int | None = None,
    bind: tuple[str, int] | None = None,
    log: Path | None = None,
) -> RunResult:
    """Send the load and wait for its end, which comes `timeout_seconds` after the last request is due at the latest.

    Args:
        settings: of the run. More than one worker means as many processes on this machine.
        metrics: URLs of the servers' metrics.
        server_pid: of a server on this machine, whose memory is watched, with all that it started.
        bind: workers are not started but expected: here, over the network.
        log: locust's output; None for a temporary file, of which the end is told if the run fails.

    Raises:
        RunError: there is no result.
        ValueError: a URL is not one of metrics.
    """
    for url in metrics:
        check_metrics_url(url)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-")))
        log = log or folder / "locust.log"
        result = folder / "result.json"
        (folder / "settings.json").write_text(settings.to_json(), encoding="utf-8")
        commands = _commands(settings, folder / "settings.json", result, bind)
        scraper = stack.enter_context(Sampler(partial(read_metrics, metrics) if metrics else None))
        watched = stack.enter_context(Sampler(partial(read_memory, server_pid) if server_pid else None))
        output = stack.enter_context(log.open("wb"))
        processes = [_spawn(command, output) for command in commands]
        try:
            _wait(processes, result, settings)
        finally:
            _stop(processes)
        if not result.exists():
            words = log.read_text(errors="replace").splitlines()[-20:]
            raise RunError("locust ended without a result:\n" + "\n".join(words))
        told: dict[str, Any] = json.loads(result.read_text())
    if told["problem"]:
        raise RunError(told["problem"])
    return RunResult(
        told["began_at"],
        told["gave_up"],
        told["workers_finished"],
        sorted(Record(*row) for row in told["records"]),
        sorted(Pulse(*row) for row in told["pulses"]),
        scraper.samples,
        scraper.num_missed,
        told["library"],
        watched.samples,
    )


def worker_command(host: str, port: int) -> list[str]:
    """Locust as a worker of a master elsewhere."""
    return [*_LOCUST, "--worker", "--master-host", host, "--master-port", str(port)]


def worker_environment() -> dict[str, str]:
    """This process's environment, with this package where Python looks first."""
    paths = [str(LOCUSTFILE.parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


_LOCUST = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--loglevel", "WARNING"]


def _commands(
    settings: LoadSettings, settings_file: Path, result: Path, bind: tuple[str, int] | None
) -> list[list[str]]:
    """The one process that does everything, or the master and then its workers."""
    users = settings.closed or settings.num_workers
    head = [
        *_LOCUST,
        "--headless",
        "--only-summary",
        f"--users={users}",
        f"--spawn-rate={users}",
        f"--mpm-settings={settings_file}",
        f"--mpm-result={result}",
    ]
    user = "ClosedLoopUser" if settings.closed else "OpenLoopUser"
    if settings.num_workers == 1 and bind is None:
        return [[*head, user]]
    host, port = bind or ("127.0.0.1", free_port())
    master = [
        *head,
        "--master",
        f"--master-bind-host={host}",
        f"--master-bind-port={port}",
        f"--expect-workers={settings.num_workers}",
        f"--expect-workers-max-wait={_READY_SECONDS:.0f}",
        user,
    ]
    workers = 0 if bind else settings.num_workers
    return [master, *(worker_command(host, port) for _ in range(workers))]


def _spawn(command: Sequence[str], output: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=worker_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others in order
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]], result: Path, settings: LoadSettings) -> None:
    deadline = time.monotonic() + _READY_SECONDS + settings.seconds + 2 * settings.timeout_seconds
    while not result.exists() and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 1.5  # what has finished ends by itself
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
