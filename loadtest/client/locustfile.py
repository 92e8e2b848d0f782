"""Locust's entrance: `python -m loadtest` starts `locust -f` this file, as one process or as a master with workers.

`--mpm-settings` is a file of `loadtest.settings.LoadSettings`, which the master hands to its workers; `--mpm-result`
is where all records are written in the end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, Runner

from loadtest.client.part import BEGIN, FINISHED, READY, REPORT, Part
from loadtest.client.users import ClosedLoopUser, OpenLoopUser
from loadtest.settings import LoadSettings

__all__ = ["ClosedLoopUser", "OpenLoopUser"]

_BEGIN_SECONDS = 0.5  # from the last worker's readiness: longer than a message takes
_LOST_SECONDS = 5.0  # after the last answer could have come: who has not finished then never will
_QUIT_SECONDS = 0.05


class Collection:
    """What the workers hand in; it says when to begin, and writes everything down in the end."""

    def __init__(self, environment: Environment, settings: LoadSettings, result: Path) -> None:
        self._environment = environment
        self._settings = settings
        self._result = result
        self._problems: dict[str, str] = {}
        self._library: dict[str, float] = {}
        self._finished: dict[str, bool] = {}
        self._begin_at = 0.0
        self._ended = False
        self._records: list[Any] = []
        self._pulses: list[Any] = []

    def on_ready(self, environment: Environment, msg: Any) -> None:
        self._problems[msg.node_id] = msg.data["problem"]
        for name, agreement in msg.data["library"].items():
            self._library[name] = min(agreement, self._library.get(name, 1.0))
        problem = next((told for told in self._problems.values() if told), "")
        if problem or len(self._problems) == self._settings.num_workers:
            self._begin_at = time.time() + (_BEGIN_SECONDS if self._settings.num_workers > 1 else 0.0)
            environment.runner.send_message(BEGIN, {"at": self._begin_at, "problem": problem})  # type: ignore[union-attr]
            last = _BEGIN_SECONDS + self._settings.seconds + self._settings.timeout_seconds + _LOST_SECONDS
            gevent.spawn_later(last, self._end, "")
        if problem:
            self._end(problem)

    def on_report(self, client_id: str, data: dict[str, Any]) -> None:
        if REPORT in data:
            self._keep(data.pop(REPORT))

    def on_finished(self, environment: Environment, msg: Any) -> None:
        self._keep(msg.data)
        self._finished[msg.node_id] = msg.data["gave_up"]
        if len(self._finished) == self._settings.num_workers:
            self._end("")

    def _keep(self, report: dict[str, Any]) -> None:
        self._records += report["records"]
        self._pulses += report["pulses"]

    def _end(self, problem: str) -> None:
        if self._ended:
            return
        self._ended = True
        told = {
            "problem": problem,
            "began_at": self._begin_at,
            "gave_up": any(self._finished.values()),
            "workers_finished": len(self._finished),
            "library": self._library,
            "records": self._records,
            "pulses": self._pulses,
        }
        partial = self._result.with_suffix(".part")
        partial.write_text(json.dumps(told))
        partial.rename(self._result)
        self._environment.process_exit_code = 1 if problem else 0
        assert self._environment.runner is not None
        gevent.spawn_later(_QUIT_SECONDS, self._environment.runner.quit)  # not from a user, whom it would wait for


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--mpm-settings", default="", include_in_web_ui=False, help="file of LoadSettings")
    parser.add_argument("--mpm-result", default="", include_in_web_ui=False, help="where all records are written")
    parser.add_argument(
        "--load", default="", include_in_web_ui=False, help="LoadSettings as JSON; the master fills it"
    )


@events.init.add_listener
def _wire(environment: Environment, runner: Runner, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    if not isinstance(runner, MasterRunner):
        part = Part(environment)
        environment.part = part  # type: ignore[attr-defined]

        def on_begin(environment: Environment, msg: Any) -> None:
            part.begin(msg.data["at"], msg.data["problem"])

        def on_report(client_id: str, data: dict[str, Any]) -> None:
            data[REPORT] = part.report()

        runner.register_message(BEGIN, on_begin, concurrent=True)
        if not isinstance(runner, LocalRunner):
            environment.events.report_to_master.add_listener(on_report)
            return
    if not options.mpm_settings or not options.mpm_result:
        sys.exit("--mpm-settings, --mpm-result: expected files; `python -m loadtest` starts locust with both")
    options.load = Path(options.mpm_settings).read_text(encoding="utf-8")
    collection = Collection(environment, LoadSettings.from_json(options.load), Path(options.mpm_result))
    runner.register_message(READY, collection.on_ready, concurrent=True)
    runner.register_message(FINISHED, collection.on_finished, concurrent=True)
    environment.events.worker_report.add_listener(collection.on_report)
