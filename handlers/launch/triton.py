"""Start and stop the Triton server that the wheel `nvidia-pytriton` brings.

What changes the server (loading and unloading models, shared memory, tracing, logging) asks for the header
`x-admin` with a secret that is made up at each start, and written into a file if one is named. Triton takes it on its
command line alone, where every user of the machine can read it: it keeps out who only has the network.
"""

import importlib.util
import math
import os
import re
import secrets
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from handlers.api.headers import OPTION_HEADERS

from .edge import Front
from .health import UnhealthyError, check_model
from .models import Watch, read_repository
from .processes import ANSWER_MARGIN_SECONDS, MODEL_NAME, Server, ServerError, check_port, free_port, url_of

ADMIN_HEADER = "x-admin"

# Triton looks for the pattern anywhere in a header's name, and what it finds becomes a parameter of the request.
_FORWARDED = f"^(?i:{'|'.join(map(re.escape, OPTION_HEADERS))})$"
_RESTRICTED = "model-repository,shared-memory,trace,logging"
_SHELL_SAFE = re.compile(r"[A-Za-z0-9/._-]+")
_SURE = 2  # a process was seen to have ended, and its model did not answer
_STALL_MARGIN_SECONDS = 30.0  # after stall_seconds an engine whose device hangs ends its process
_SHM_FOLDER = Path("/dev/shm")
_SHM_BYTES = 64 * 2**20  # of a model's region, which grows in steps and never shrinks


class Triton(Server):
    """A Triton server as a child process; a context manager that stops it.

    Args:
        model_repository: folder with models, all of which are loaded.
        host, port: where HTTP listens.
        grpc_port: where gRPC listens, on the same host.
        metrics_port: where Triton's own metrics listen, on the models' `metrics_host`; some port on loopback if 0.
        admin_secret_file: gets the secret of this start; None for nowhere.
        exit_seconds: what is in flight at the end has so long, and so long does an idle connection hold the end; the
            longest deadline of the models if None.
        log: file for the server's output; None for this process's own.
        front: the edge that clients of HTTP ask instead.

    Raises:
        ValueError: the repository holds no model.
        ServerError: a port is taken, the temp folder's path holds what a shell would act on, the secret can't be
            written, or Triton is not installed.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        admin_secret_file: Path | None = None,
        exit_seconds: int | None = None,
        log: Path | None = None,
        front: Front | None = None,
    ) -> None:
        self.models = sorted(path.parent.name for path in model_repository.glob("*/config.pbtxt"))
        if not self.models:
            raise ValueError(f"model_repository: expected models with config.pbtxt in it, got {model_repository}")
        for name in self.models:
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"{model_repository / name}: expected a name of letters, digits, '.', '_' and '-'")
            if any(
                "handlers.triton_model" in file.read_text() for file in (model_repository / name).glob("*/model.py")
            ):
                raise ValueError(f"{model_repository / name}: built by an older version; build it again")
        installed = _find_server()
        if not _SHELL_SAFE.fullmatch(tempfile.gettempdir()):
            raise ServerError(
                f"TMPDIR: expected letters, digits, '/', '.', '_' and '-', got {tempfile.gettempdir()!r}"
            )
        super().__init__("Triton", host, port, log, front)
        self.grpc_port = grpc_port or free_port()
        check_port(host, self.grpc_port)
        configs = {name: read_repository(model_repository / name) for name in self.models}
        self._metrics_host = next(iter(configs.values())).metrics_host if metrics_port else "127.0.0.1"
        self.metrics_port = metrics_port or free_port()
        check_port(self._metrics_host, self.metrics_port)
        self.admin_secret = secrets.token_urlsafe()  # what the header `x-admin` has to hold
        if admin_secret_file is not None:
            _write_secret(admin_secret_file, self.admin_secret)
        longest = math.ceil(max(config.deadline_seconds for config in configs.values()))
        self.max_body_bytes = max(config.max_body_bytes for config in configs.values())
        self.answer_seconds = longest + ANSWER_MARGIN_SECONDS
        self._exit_seconds = longest if exit_seconds is None else exit_seconds
        self._stop_seconds += self._exit_seconds
        self._patience = max(config.stall_seconds for config in configs.values()) + _STALL_MARGIN_SECONDS
        self._metrics = Watch(configs)
        self._forgotten: set[int] = set()
        self._shm_prefix = f"{self._folder.name}-"
        self._start(installed, model_repository.resolve())

    @property
    def grpc_url(self) -> str:
        return url_of(self.host, self.grpc_port).removeprefix("http://")

    def wait_ready(self, timeout_seconds: float = 180.0) -> None:
        """Return once every model has answered a real picture.

        Raises:
            ServerError: the server ended, which it does if a model does not load, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        for name in self.models:
            while True:
                self._check_starting(deadline)
                try:
                    check_model(f"{self._own_url}/v2/models/{name}", timeout_seconds=30)
                    break
                except UnhealthyError:
                    time.sleep(0.1)

    def examples(self, sample: str) -> str:
        told = {"url": self.url, "grpc": self.grpc_url, "sample": sample}
        return "\n\n".join(_EXAMPLES.format(name=name, **told) for name in self.models)

    def drain(self) -> None:
        """Nothing to do: Triton drains when it stops."""

    @property
    def watched(self) -> Mapping[str, str]:
        return {f"{self._own_url}/v2/models/{name}": self._metrics.urls[name] for name in self.models}

    def ailment(self) -> str:
        dead = _zombies(self.pid) - self._forgotten
        return f"{len(dead)} of the processes that hold models ended" if dead else ""

    def forget(self) -> None:
        self._forgotten = _zombies(self.pid)  # Triton never buries one that was killed

    def may_recover(self, num_failures: int, ill_seconds: float) -> bool:
        """Triton starts no model again; only an operator may, in between."""
        return num_failures < _SURE if self.ailment() else ill_seconds < self._patience

    def stop(self, timeout_seconds: float | None = None) -> None:
        """End the server, and remove what it leaves behind."""
        super().stop(timeout_seconds)
        for region in _SHM_FOLDER.glob(f"{self._shm_prefix}*"):  # a killed model leaves its region behind
            region.unlink(missing_ok=True)

    def _start(self, installed: Path, model_repository: Path) -> None:
        backend = self._folder / "backends" / "python"
        backend.mkdir(parents=True)
        stub = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
        for file in (
            "backends/python/libtriton_python.so",
            "backends/python/triton_python_backend_utils.py",
            stub,
        ):
            (backend / Path(file).name).symlink_to(installed / file)
        # Triton starts the stub through a shell, which would take a path with a space apart.
        models = self._folder / "models"
        models.symlink_to(model_repository)
        options = {
            "model-repository": models,
            "model-control-mode": "explicit",  # a dead model comes back by unload and load
            "load-model": "*",
            "backend-directory": backend.parent,
            "cache-directory": installed / "caches",
            "http-address": _event_address(self.http_host),
            "http-port": self.port,
            "grpc-address": f"[{self.host}]" if ":" in self.host else self.host,
            "grpc-port": self.grpc_port,
            "metrics-address": _event_address(self._metrics_host),
            "metrics-port": self.metrics_port,
            "allow-gpu-metrics": "false",
            "pinned-memory-pool-byte-size": 0,
            "log-info": "false",
            "exit-timeout-secs": self._exit_seconds,
            "http-header-forward-pattern": _FORWARDED,
            "grpc-header-forward-pattern": _FORWARDED,
            "http-restricted-api": f"{_RESTRICTED}:{ADMIN_HEADER}={self.admin_secret}",
            "grpc-restricted-protocol": f"{_RESTRICTED}:{ADMIN_HEADER}={self.admin_secret}",
        }
        backend_options = {
            "shm-default-byte-size": _SHM_BYTES,
            "shm-region-prefix-name": self._shm_prefix,
            "stub-timeout-seconds": self._exit_seconds,
        }
        command = [
            str(installed / "bin" / "tritonserver"),
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--backend-config=python,{name}={value}" for name, value in backend_options.items()),
            "--disable-auto-complete-config",
        ]
        # The stub finds its interpreter, and with it the installed packages, through PATH alone; Triton finds bash so.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        libraries = str(sysconfig.get_config_var("LIBDIR"))
        self._spawn(command, {"PATH": path, "LD_LIBRARY_PATH": libraries, **self._metrics.environment})


def _event_address(host: str) -> str:
    """As libevent, below Triton's HTTP, wants it."""
    return f"ipv6:{host}" if ":" in host else host


def _zombies(pid: int) -> set[int]:
    """Children of a process that have ended, and that it did not wait for."""
    with suppress(psutil.NoSuchProcess):
        return {child.pid for child in psutil.Process(pid).children() if child.status() == psutil.STATUS_ZOMBIE}
    return set()


def _write_secret(path: Path, secret: str) -> None:
    """Into a file that nobody else may read, from its first moment on; in place of an old one."""
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret + "\n")
    except OSError as error:
        raise ServerError(f"--admin-secret-file: {error}") from None


def _find_server() -> Path:
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise ServerError("Triton is not installed; install this project with its extra `triton`")
    return Path(found.origin).parent / "tritonserver"


_EXAMPLES = """\
  n=$(curl -sS -H 'Inference-Header-Content-Length: 0' -H 'X-MPM-Outputs: MASK_PNG' --data-binary @{sample} \\
    {url}/v2/models/{name}/infer -o reply -w '%header{{inference-header-content-length}}') &&
    tail -c +$((n+5)) reply > mask.png

  mpm segment {sample} --url {url}/v2/models/{name} --out masks

or in Python

  import numpy
  import tritonclient.grpc as triton
  picture = triton.InferInput("IMAGE", [1, 1], "BYTES")
  picture.set_data_from_numpy(numpy.array([[open("{sample}", "rb").read()]], object))
  wanted = [triton.InferRequestedOutput("MASK")]
  labels = triton.InferenceServerClient("{grpc}").infer("{name}", [picture], outputs=wanted).as_numpy("MASK")[0]"""
