"""Run a Prometheus with our rules beside local servers, and query it."""

import json
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handlers.client import fetch
from handlers.launch.processes import free_port

RULES = Path(__file__).resolve().parent / "rules.yml"

_START_SECONDS = 30


class Prometheus:
    """A Prometheus on loopback that scrapes servers and evaluates our rules; a context manager that stops it.

    Args:
        targets: `host:port` of each metrics port.
        folder: for configuration, data and log; they stay.
        program: of Prometheus; the one on the PATH by default.
        labels: added to every series of the targets, like those of a discovered pod.
        others: scrape configurations of other exporters, in Prometheus's own format.
        rules: file of rules to evaluate.
        alertmanager: `host:port` that alerts are sent to; none by default.
        scrape_seconds: between two scrapes, and between two evaluations.
        port: to listen on; 0 for a free one.

    Raises:
        RuntimeError: Prometheus is not installed, or did not start.
    """

    def __init__(
        self,
        targets: Sequence[str],
        folder: Path,
        *,
        program: Path | None = None,
        labels: Mapping[str, str] | None = None,
        others: Sequence[Mapping[str, Any]] = (),
        rules: Path = RULES,
        alertmanager: str = "",
        scrape_seconds: int = 1,
        port: int = 0,
    ) -> None:
        found = program or shutil.which("prometheus")
        if not found:
            raise RuntimeError(
                "prometheus: not installed; install your distribution's package `prometheus`, "
                "or use docker/compose/compose.yml, which brings Grafana too"
            )
        self.port = port or free_port()
        self._folder = folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        ours = {"job_name": "mpm", "static_configs": [{"targets": list(targets), "labels": dict(labels or {})}]}
        interval = f"{scrape_seconds}s"
        config: dict[str, Any] = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(rules.resolve())],
            "scrape_configs": [ours, *map(dict, others)],
        }
        if alertmanager:
            config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            str(found),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
            "--rules.alert.resend-delay=5s",  # alerts sent before the Alertmanager is found are lost until then
        ]
        with (folder / "prometheus.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches our process alone, which then stops this one.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Prometheus":
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if fetch(f"{self.url}/-/ready").status == 200:
                    return self
            except OSError:
                pass
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise RuntimeError(f"prometheus: did not start; its log is {self._folder / 'prometheus.log'}")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query, in Prometheus's own format.

        Raises:
            ValueError: Prometheus refuses the query.
        """
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series of a range query; times in seconds since the epoch."""
        found: list[dict[str, Any]] = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return found

    def get(self, path: str, **parameters: object) -> Any:
        """`data` of an answer of the HTTP API.

        Raises:
            ValueError: Prometheus refuses the request.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        answer = fetch(url, timeout_seconds=30)
        if answer.status != 200:
            raise ValueError(f"prometheus: refused {parameters or path}: {answer.body.decode()}")
        return json.loads(answer.body)["data"]
