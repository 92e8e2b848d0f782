"""What the launchers of both servers share: ports, a child process with a folder of its own, and an orderly end."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

import psutil

from .readiness import Readiness
from .supervision import Supervised, supervise

if TYPE_CHECKING:
    from .edge import Front

# TorchServe's own rule, and safe as Triton's folder name; a comma or a space would also break lists of models.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
ANSWER_MARGIN_SECONDS = 60.0  # from the models' deadline until there will be no answer
_LOST_SECONDS = 5.0
_HURRY_SECONDS = 1.0  # for what is in flight when a person stops everything
_MAX_RESTARTS = 5  # within
_RESTARTS_SECONDS = 600.0  # else whoever supervises this process should know
_LONGEST_TEMP = 70  # a Unix socket's path takes 107 bytes, and TorchServe's workers append theirs
_ENVIRONMENT = {  # that servers get unless it is set
    "OMP_WAIT_POLICY": "passive",  # see mpm_ops/_openmp.py
    # Large buffers go back to the system when they are freed: pictures of all sizes would tear holes into the heaps of
    # as many threads, and half of the memory would be free and of no use to anybody.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**24),
}
_START_SECONDS = 600.0  # a large model compiles when it is first used; whoever supervises may be less patient


class ServerError(RuntimeError):
    """The server did not come up; the message says what it printed last."""


class Server(Supervised):
    """A server as a child process; a context manager that stops it.

    Args:
        kind: what to call it in messages.
        host, port: where it listens; port 0 takes a free one.
        log: file for the server's output; None for this process's own.
        front: the edge that clients ask instead; HTTP then listens where it looks for it.

    Raises:
        ServerError: the port is taken.
    """

    max_body_bytes: int  # of a request
    answer_seconds: float  # after which there will be no answer

    def __init__(self, kind: str, host: str, port: int, log: Path | None, front: "Front | None" = None) -> None:
        self.host = host
        self.http_host = "127.0.0.1" if front else host
        self.port = front.upstream_port if front else port or free_port()
        self.log = log
        check_port(self.http_host, self.port)
        self._own_url = url_of(self.http_host, self.port)
        self.url = front.url if front else self._own_url
        self._kind = kind
        self._stop_seconds = 10.0
        temp = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp("", f"{kind.lower()}-", "/tmp" if len(temp) > _LONGEST_TEMP else temp))
        self._process: subprocess.Popen[bytes]

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def wait_ready(self, timeout_seconds: float = 180.0) -> None:
        """Return once every model has answered a real picture.

        Raises:
            ServerError: the server ended, could not load a model, or did not answer in time.
        """

    @abstractmethod
    def examples(self, sample: str) -> str:
        """Commands that ask every model for the mask of a picture, a line each, for people to copy."""

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Wait for the server to end; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        return self._process.wait(timeout_seconds)

    @abstractmethod
    def drain(self) -> None:
        """Have what comes from now on refused, and return once `stop` loses nothing that was accepted before."""

    def stop(self, timeout_seconds: float | None = None) -> None:
        """End the server and its workers, and remove their folder; what does not end in time is killed."""
        if self._process.poll() is None:
            workers = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()
            try:
                self._process.wait(self._stop_seconds if timeout_seconds is None else timeout_seconds)
            except subprocess.TimeoutExpired:
                workers = psutil.Process(self._process.pid).children(recursive=True)
                self._process.kill()
                self._process.wait()
            _, alive = psutil.wait_procs(workers, timeout=3)
            for worker in alive:
                worker.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        output = self.log.open("wb") if self.log else None
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**_ENVIRONMENT, **os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        finally:
            if output:
                output.close()

    def _check_starting(self, deadline: float) -> None:
        """Raise a ServerError if the server ended or the deadline, on the monotonic clock, is over."""
        if self._process.poll() is not None:
            raise ServerError(f"{self._kind} ended with status {self._process.returncode}{self._last_words()}")
        if time.monotonic() > deadline:
            raise ServerError(f"{self._kind} was not ready in time{self._last_words()}")

    def _last_words(self) -> str:
        if self.log is None:
            return ""
        return ":\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def run_in_foreground(
    start: Callable[..., Server],
    *,
    front: "Callable[[], Front] | None" = None,
    sample: str = "photo.jpg",
    host: str = "127.0.0.1",
    ready_port: int = 0,
    lame_duck_seconds: float = 0.0,
) -> int:
    """Run a server until it is dead for good, or SIGINT or SIGTERM comes; returns the exit status.

    Behind an edge (`front`), which lives on, a server that ended or whose model is dead is started again; without one
    that is for whoever supervises this process. When it is ready it is said how to ask it, with `sample` as picture.

    SIGINT is a person's, and stops at once. SIGTERM is an orderly end: `ready_port` says 503 from now on, the
    server goes on for `lame_duck_seconds`, in which whoever sends requests should notice; the edge accepts no more and
    finishes, and the server drains.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stopping
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        if ready_port:
            check_port(host, ready_port)
        with Readiness(host, ready_port) as readiness, front() if front else nullcontext() as edge:
            restarts: list[float] = []
            while True:
                with start(front=edge) as server:
                    status = _run(server, edge, readiness, sample, lame_duck_seconds)
                restarts = [then for then in restarts if time.monotonic() - then < _RESTARTS_SECONDS]
                if edge is None or status == 0 or len(restarts) == _MAX_RESTARTS:
                    return status
                restarts.append(time.monotonic())
                print(f"{server.kind} ended with status {status}; starting it again", file=sys.stderr, flush=True)
                edge.count_restart()
    except (KeyboardInterrupt, _Terminated):
        return 0
    except (ServerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(server: Server, edge: "Front | None", readiness: Readiness, sample: str, lame_duck_seconds: float) -> int:
    """Until the server is dead (status not 0), or has drained after SIGTERM."""
    try:
        if edge:
            edge.open(server)
        server.wait_ready(_START_SECONDS)
        try:
            readiness.ready = True
            print(f"\nReady on {server.url}. Try:\n\n{server.examples(sample)}\n")
            if edge and edge.has_page:
                print(f"Or open {edge.url} in a browser.\n")
            print("Ctrl-C stops the server.", flush=True)
            status = supervise(server, readiness)
            readiness.ready = False
            server.stop(_LOST_SECONDS)  # there is nobody left to be waited for
            return status
        except _Terminated:
            readiness.ready = False
            with suppress(subprocess.TimeoutExpired):
                server.wait(lame_duck_seconds)
            if edge:
                edge.stop(server.answer_seconds)
            server.drain()
            return 0
    except BaseException:
        if edge:
            edge.stop(_HURRY_SECONDS)
        raise


class _Terminated(BaseException):
    """SIGTERM came."""


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raise a ServerError where nothing could listen."""
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; on `::` for IPv4 too. Raises a ServerError where nothing can."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=host == "::")
    except OSError as error:
        cause = (error.strerror or str(error)).partition(" (while")[0]
        raise ServerError(f"cannot listen on {netloc(host, port)}: {cause}") from None


def netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url_of(host: str, port: int) -> str:
    """Where this machine reaches what listens on a host."""
    return "http://" + netloc({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
