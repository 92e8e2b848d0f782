"""The edge in front of a server: a process that is started again when it ends, on a socket that stays open."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .processes import Server, free_port, listen, url_of

_PAUSE_SECONDS = 0.5  # before an edge that ended is started again


class Front:
    """Listens where clients ask; a context manager that closes that.

    Args:
        host, port: where clients ask; port 0 takes a free one.
        server: `torchserve` or `triton`.
        origins: whose pages may call from a browser.
        has_page: at its root is a page for people.
        examples: pictures that the page offers.

    Attributes:
        url: for clients.
        upstream_port: on loopback, where the server behind has to listen.

    Raises:
        ServerError: the port can't be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        server: str,
        origins: Sequence[str] = (),
        has_page: bool = True,
        examples: Sequence[Path] = (),
    ) -> None:
        self._listening = listen(host, port)
        self.url = url_of(host, self._listening.getsockname()[1])
        self.upstream_port = free_port()
        self.has_page = has_page
        self._server, self._origins, self._examples = server, origins, examples
        self._folder = Path(tempfile.mkdtemp(prefix="edge-"))
        self._restarts = {"edge": 0, "server": 0}
        self._stopping = threading.Event()
        self._changing = threading.Lock()  # held while an edge is started, and while none may be any more
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(1.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, server: Server) -> None:
        """Pass requests on to a server, from the first one that is started on."""
        models = {url.rpartition("/")[2]: metrics for url, metrics in server.watched.items()}
        _write(self._models_file, json.dumps(models))  # ports change with every start
        if self._process is None:
            self.count_restart("")
            self._command = [
                *(sys.executable, "-m", "handlers.edge", f"--fd={self._listening.fileno()}"),
                *(f"--upstream=http://127.0.0.1:{self.upstream_port}", f"--server={self._server}"),
                *(f"--max-body-bytes={server.max_body_bytes}", f"--answer-seconds={server.answer_seconds}"),
                *(f"--restarts={self._restarts_file}", *(f"--cors-origin={origin}" for origin in self._origins)),
                *(f"--models={self._models_file}", *(f"--example={picture}" for picture in self._examples)),
                *([] if self.has_page else ["--no-page"]),
            ]
            self._spawn()
            self._keeper = threading.Thread(target=self._keep, name="edge", daemon=True)
            self._keeper.start()

    def count_restart(self, process: str = "server") -> None:
        """Tell in the edge's metrics that a process is started again."""
        if process:
            self._restarts[process] += 1
        name = "mpm_restarts_total"
        lines = [f"# HELP {name} Processes that ended and were started again.", f"# TYPE {name} counter"]
        lines += [f'{name}{{process="{each}"}} {number}' for each, number in self._restarts.items()]
        _write(self._restarts_file, "\n".join(lines) + "\n")

    def stop(self, seconds: float) -> None:
        """Accept no more, and end when all that was accepted is answered, or after so long."""
        with self._changing:
            self._stopping.set()
        self._listening.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def _restarts_file(self) -> Path:
        return self._folder / "restarts"

    @property
    def _models_file(self) -> Path:
        return self._folder / "models"

    def _spawn(self) -> None:
        self._process = subprocess.Popen(
            self._command, pass_fds=[self._listening.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _keep(self) -> None:
        while self._process is not None:
            status = self._process.wait()
            if self._stopping.wait(_PAUSE_SECONDS):
                return
            print(f"the edge ended with status {status}; starting it again", file=sys.stderr, flush=True)
            self.count_restart("edge")
            with self._changing:
                if self._stopping.is_set():
                    return
                self._spawn()


def _write(file: Path, text: str) -> None:
    """All at once, whoever reads it meanwhile."""
    written = file.with_suffix(".new")
    written.write_text(text)
    written.replace(file)
