"""Locust as a process, without its page."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_server import FakeServer

from loadtest.cli import LOCUSTFILE
from loadtest.masks import environment

COMMAND = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]


@dataclass(frozen=True)
class Ended:
    """A locust that has ended.

    Attributes:
        summary: of its report; empty if it wrote none.
    """

    status: int
    output: str
    summary: dict[str, Any]

    @property
    def due(self) -> list[float]:
        """When requests for masks were due, in seconds of the run."""
        return [at for at, _, _ in self.summary["series"]["requests"]]

    @property
    def outcomes(self) -> dict[str, int]:
        found: dict[str, int] = self.summary["outcomes"]
        return found


@dataclass(frozen=True)
class Run:
    """Runs locust without its page against the fake server, or what the options say."""

    fake: FakeServer
    pictures: Path
    folder: Path

    def command(self, *more: object, **options: object) -> list[str]:
        asked: dict[str, object] = {
            "host": self.fake.url,
            "model": "fake",
            "pictures": self.pictures,
            "metrics": "none",
            "arrivals": "even",
            "request_timeout": "10s",
            "max_lateness": "1m",
            "report": self.folder / "report.html",
        }
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (asked | options).items()]
        return [*COMMAND, "--headless", "--only-summary", "--loglevel=WARNING", *flags, *map(str, more)]

    def __call__(self, *more: object, **options: object) -> Ended:
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        ended = subprocess.run(
            self.command(*more, **options),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        summary = json.loads(report.read_text()) if report.exists() else {}
        assert "Traceback" not in ended.stdout, ended.stdout
        return Ended(ended.returncode, ended.stdout, summary)
