"""Start and ask a Prometheus and an Alertmanager of one's own."""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handlers.launch.processes import free_port

from .binaries import find_tool

RULES = Path(__file__).resolve().parents[2] / "k8s" / "monitoring" / "rules.yml"

_START_SECONDS = 30


class Prometheus:
    """A Prometheus on loopback that scrapes some servers, evaluates our rules and sends alerts to its Alertmanager.

    A context manager that stops both. What they store stays in the folder.

    Args:
        targets: `host:port` of each metrics port.
        labels: that every series of the targets gets, as those of the pod that discovery would find them by.
        others: scrape configurations of other exporters, in Prometheus's own terms.
        folder: for configuration, data and logs.
        rules: rules to evaluate.
        scrape_seconds: between two scrapes, and between two evaluations.
        port: where it listens; 0 for any.

    Raises:
        MissingToolError: a program can't be had.
    """

    def __init__(
        self,
        targets: Sequence[str],
        folder: Path,
        *,
        labels: Mapping[str, str] | None = None,
        others: Sequence[Mapping[str, Any]] = (),
        rules: Path = RULES,
        scrape_seconds: int = 1,
        port: int = 0,
    ) -> None:
        self.port = port or free_port()
        self.alertmanager_port = free_port()
        self._folder = folder = folder.resolve()
        programs = [find_tool("prometheus"), find_tool("prometheus-alertmanager")]
        folder.mkdir(parents=True, exist_ok=True)
        ours = {"job_name": "mpm", "static_configs": [{"targets": list(targets), "labels": dict(labels or {})}]}
        self._configure([ours, *map(dict, others)], rules, scrape_seconds)
        self._processes: list[subprocess.Popen[bytes]] = []
        arguments = [
            [
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--enable-feature=exemplar-storage",
                "--rules.alert.resend-delay=5s",  # alerts before the Alertmanager is found are lost until then
            ],
            [
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address=127.0.0.1:{self.alertmanager_port}",
                "--cluster.listen-address=",
            ],
        ]
        for program, flags in zip(programs, arguments, strict=True):
            with (folder / f"{program.name}.log").open("wb") as log:
                command = [str(program), *flags]
                # A session of its own: Ctrl-C reaches our process alone, which then stops both in order.
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=program.parents[2],
                        start_new_session=True,
                    )
                )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Prometheus":
        deadline = time.monotonic() + _START_SECONDS
        ready = [f"{self.url}/-/ready", f"http://127.0.0.1:{self.alertmanager_port}/-/ready"]
        while ready:
            try:
                with urllib.request.urlopen(ready[0], timeout=5):
                    ready.pop(0)
            except OSError:
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    self.stop()
                    raise RuntimeError(f"Prometheus did not start; its log is in {self._folder}") from None
                time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query, as Prometheus gives them.

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
        """`data` of an answer of the HTTP API."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
            ) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"Prometheus refused {parameters or path}: {error.read().decode()}") from None

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that reached the Alertmanager."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.alertmanager_port}/api/v2/alerts", timeout=30
        ) as response:
            found: list[dict[str, Any]] = json.load(response)
            return found

    def _configure(self, jobs: Sequence[dict[str, Any]], rules: Path, scrape_seconds: int) -> None:
        prometheus = {
            "global": {
                "scrape_interval": f"{scrape_seconds}s",
                "scrape_timeout": f"{scrape_seconds}s",
                "evaluation_interval": f"{scrape_seconds}s",
            },
            "rule_files": [str(rules.resolve())],
            "scrape_configs": list(jobs),
            "alerting": {
                "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{self.alertmanager_port}"]}]}]
            },
        }
        alertmanager = {"route": {"receiver": "nobody", "group_wait": "1s"}, "receivers": [{"name": "nobody"}]}
        for name, config in (("prometheus", prometheus), ("alertmanager", alertmanager)):
            (self._folder / f"{name}.yml").write_text(yaml.safe_dump(config))
