"""A run over all of locust's processes.

Every process that has users prepares (`Worker`), and sends `READY`. Once all are ready, and with `--rate` all users
are there, the process that has the page or the command line (`Controller`: the master, or the only process) sends
`BEGIN`. Records come back with locust's own statistics and with `FINISHED`. It ends the run, sums it up and sets the
exit status.
"""

import json
import math
import signal
import sys
import time
import urllib.parse
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import psutil
from gevent.event import Event
from locust.env import Environment
from locust.exception import LocustError
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from .masks import OK, read_masks
from .options import LoadSettings
from .page import told, write_report
from .pictures import PAINTED, ensure_pictures
from .run import UNSENT, Pulse, Record, Share
from .server import Sampler, find_server, sample_memory, sample_metrics
from .summary import RunResult, summarize

READY, BEGIN, CLOSE, FINISHED = "load_ready", "load_begin", "load_close", "load_finished"
_BEGIN_SECONDS = 0.5  # from the last READY to the beginning, where messages go over a network
_LOST_SECONDS = 5.0  # after the last answer could have come: a worker that has not finished then is lost
KEPT, BROKEN, NO_RUN, NOT_VALID = 0, 1, 2, 3


class RequestFailedError(LocustError):
    """A request failed, or was answered wrongly; the message groups well."""


class Worker:
    """The share of a process that has users: the only one, or one of locust's workers."""

    def __init__(self, environment: Environment) -> None:
        self.share: Share | None = None
        self._environment = environment
        environment.events.test_start.add_listener(self._on_test_start)
        environment.events.test_stopping.add_listener(self._on_test_stopping)
        if not isinstance(environment.runner, MasterRunner):
            environment.runner.register_message(BEGIN, self._on_begin, concurrent=True)  # type: ignore[union-attr]
            environment.runner.register_message(CLOSE, self._on_close, concurrent=True)  # type: ignore[union-attr]
        if isinstance(environment.runner, WorkerRunner):
            environment.events.report_to_master.add_listener(self._on_report)

    def _on_test_start(self, environment: Environment, **_: Any) -> None:
        if isinstance(environment.runner, MasterRunner):
            return
        tasks = [task for user in environment.user_classes for task in user.tasks]
        kinds = {kind for task in tasks for kind in task.locust_tag_set}  # type: ignore[union-attr]
        options = environment.parsed_options
        try:
            settings = LoadSettings.read(options, environment.host, kinds)
        except (OSError, ValueError) as error:
            self.share = None
            self._send(READY, {"problem": str(error), "library": {}})
            return
        self.share = share = Share(settings, partial(self._count, settings))
        gevent.spawn(self._prepare, share, getattr(options, "library", {}))

    def _prepare(self, share: Share, library: dict[str, bytes]) -> None:
        try:
            if share.settings.protocol == "triton-grpc":
                import grpc.experimental.gevent

                grpc.experimental.gevent.init_gevent()  # else a call would block every greenlet
            if share.settings.pictures == PAINTED:
                ensure_pictures()
            share.prepare(library)
            agreement = share.references.library_agreement
        except (OSError, ValueError) as error:
            share.problem = str(error)
            share.close()
            agreement = {}
        self._send(READY, {"problem": share.problem, "library": agreement})

    def _on_begin(self, environment: Environment, msg: Any) -> None:
        gevent.sleep(max(0.0, msg.data["at"] - time.time()))
        if self.share:
            self.share.begin(msg.data["index"], msg.data["of"], lambda: environment.runner.user_count)  # type: ignore[union-attr]
            gevent.spawn(self._report_end, self.share)

    def _report_end(self, share: Share) -> None:
        share.finished.wait()
        self._send(FINISHED, self._records(share) | {"gave_up": share.gave_up})

    def _on_close(self, environment: Environment, msg: Any) -> None:
        if self.share:
            self.share.close()

    def _on_test_stopping(self, environment: Environment, **_: Any) -> None:
        """Let what is in flight be answered before locust stops the users."""
        if self.share:
            self.share.close()
            self.share.finished.wait()
            gevent.sleep(0)

    def _on_report(self, client_id: str, data: dict[str, Any]) -> None:
        if self.share:
            data["load"] = self._records(self.share)

    def _records(self, share: Share) -> dict[str, Any]:
        records, pulses = share.take()
        return {"records": [list(record) for record in records], "pulses": [list(pulse) for pulse in pulses]}

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        self._environment.runner.send_message(kind, data)  # type: ignore[union-attr]

    def _count(self, settings: LoadSettings, record: Record, num_bytes: int) -> None:
        """Into locust's statistics: latency from when a request was due, and apart the time from sending it."""
        self._environment.events.request.fire(
            request_type=settings.protocol,
            name=record.kind,
            response_time=None if record.outcome == UNSENT else 1000 * record.seconds,
            response_length=num_bytes,
            exception=None if record.outcome == OK else RequestFailedError(record.outcome),
            context={},
        )
        if settings.is_open and record.outcome != UNSENT:  # an entry of its own, which the total leaves out
            entry = self._environment.stats.entries[f"{record.kind}, from sending", settings.protocol]
            entry.log(round(1000 * (record.seconds - record.late)), num_bytes)


class Controller:
    """Begins and ends runs, and sums them up; what shapes ask for the time."""

    def __init__(self, environment: Environment) -> None:
        self.options: Any = environment.parsed_options
        assert self.options is not None
        self.settings: LoadSettings | None = None
        self.summary: dict[str, Any] | None = None
        self.is_over = False
        self._problem = ""
        self._expected: set[str] = set()
        self._active = self._ending = False
        self._began_at = 0.0
        self._summed_up = Event()
        runner = environment.runner
        assert isinstance(runner, LocalRunner | MasterRunner)
        self._runner = runner
        runner.register_message(READY, self._on_ready, concurrent=True)
        runner.register_message(FINISHED, self._on_finished, concurrent=True)
        events = environment.events
        events.test_start.add_listener(self._on_test_start)
        events.test_stopping.add_listener(self._on_test_stopping)
        events.test_stop.add_listener(self._on_test_stop)
        events.spawning_complete.add_listener(self._on_spawned)
        events.worker_report.add_listener(self._on_report)
        events.quitting.add_listener(self._on_quitting)
        if self.options.headless:  # locust takes the signal only after a run with a shape
            gevent.signal_handler(signal.SIGTERM, self._on_terminate)

    @property
    def elapsed(self) -> float:
        """Seconds since the first request could be sent; 0 before."""
        return max(0.0, time.time() - self._began_at) if self._began_at else 0.0

    def _on_test_start(self, environment: Environment, **_: Any) -> None:
        self.is_over, self.summary, self._problem, self._began_at = False, None, "", 0.0
        self._ready: set[str] = set()
        self._finished: dict[str, bool] = {}
        self._records: list[Record] = []
        self._pulses: list[Pulse] = []
        self._library: dict[str, float] = {}
        self._spawned, self._active, self._ending = False, True, False
        self._all_finished, self._summed_up = Event(), Event()
        self._samplers: list[Sampler[Any]] = []
        clients = getattr(self._runner, "clients", None)
        found = [*clients.ready, *clients.running, *clients.spawning] if clients is not None else []
        self._expected = {client.id for client in found} or {"local"}
        options = self.options
        if environment.shape_class:
            options.shape = type(environment.shape_class).__name__.lower()
        options.seconds = options.run_time  # as the shape: locust keeps both from its workers
        try:
            self.settings = LoadSettings.read(options, environment.host)
            if self.settings.pictures == PAINTED:
                ensure_pictures()
            # travels to the workers with the options
            options.library = read_masks(Path(options.library_masks)) if options.library_masks else {}
            metrics, pid = self.settings.metrics, server_pid(options.server_pid, self.settings.hosts[0])
        except (OSError, ValueError) as error:
            self._fail(str(error))
            return
        self._samplers = [
            Sampler(partial(sample_metrics, metrics) if metrics else None),
            Sampler(partial(sample_memory, pid) if pid else None),
        ]

    def _on_ready(self, environment: Environment, msg: Any) -> None:
        if msg.data["problem"]:
            self._fail(msg.data["problem"])
        for name, agreement in msg.data["library"].items():
            self._library[name] = min(agreement, self._library.get(name, 1.0))
        self._ready.add(msg.node_id)
        self._begin_if_ready()

    def _on_spawned(self, **_: Any) -> None:
        self._spawned = True
        self._begin_if_ready()

    def _begin_if_ready(self) -> None:
        settings = self.settings
        if self._began_at or self._problem or not self._active or settings is None:
            return
        if not self._expected <= self._ready or (settings.is_open and not self._spawned):
            return
        distributed = isinstance(self._runner, MasterRunner)
        self._began_at = time.time() + (_BEGIN_SECONDS if distributed else 0.0)
        for index, client in enumerate(sorted(self._expected)):
            data = {"at": self._began_at, "index": index, "of": len(self._expected)}
            gevent.spawn(self._runner.send_message, BEGIN, data, client)
        if settings.seconds < math.inf:
            gevent.spawn_later(settings.seconds + settings.timeout_seconds + _LOST_SECONDS, self._end)

    def _on_report(self, client_id: str, data: dict[str, Any]) -> None:
        self._keep(data.pop("load", {}))

    def _on_finished(self, environment: Environment, msg: Any) -> None:
        self._keep(msg.data)
        self._finished[msg.node_id] = msg.data["gave_up"]
        if self._missing():
            if msg.data["gave_up"]:
                self._close_workers()
            return
        self._all_finished.set()
        self._end()

    def _missing(self) -> set[str]:
        """Workers that have not finished, as far as they are still there."""
        clients = getattr(self._runner, "clients", None)
        there = {"local"} if clients is None else {each.id for each in clients.values() if each.state != "missing"}
        return (self._expected & there) - self._finished.keys()

    def _keep(self, data: dict[str, Any]) -> None:
        if self._active:
            self._records += [Record(*row) for row in data.get("records", ())]
            self._pulses += [Pulse(*row) for row in data.get("pulses", ())]

    def _fail(self, problem: str) -> None:
        if not self._problem:
            self._problem = problem
            print(problem, file=sys.stderr)
        self._end()

    def _end(self) -> None:
        """Stop the run; from a greenlet that stopping does not wait for."""
        self.is_over = True
        if self._active and not self._ending:
            self._ending = True
            gevent.spawn(self._runner.quit if self.options.headless else self._runner.stop)

    def _on_terminate(self) -> None:
        if self.settings is None:
            sys.exit(NO_RUN)
        self._end()

    def _close_workers(self) -> None:
        if isinstance(self._runner, MasterRunner):
            self._runner.send_message(CLOSE)

    def _on_test_stopping(self, environment: Environment, **_: Any) -> None:
        """Let workers finish before the master tells them to quit."""
        self.is_over = self._ending = True
        if not (self._active and self._began_at and isinstance(self._runner, MasterRunner)):
            return
        self._close_workers()
        assert self.settings is not None
        deadline = time.monotonic() + self.settings.timeout_seconds + _LOST_SECONDS
        while self._missing() and time.monotonic() < deadline:
            self._all_finished.wait(0.2)

    def _on_test_stop(self, environment: Environment, **_: Any) -> None:
        if not self._active:
            return
        self._active = False
        for sampler in self._samplers:
            sampler.stop()
        try:
            if not self._problem and self._began_at and self.settings is not None:
                self._sum_up(self.settings)
        except OSError as error:
            self._problem = str(error)
            print(error, file=sys.stderr)
        finally:
            self._summed_up.set()

    def _sum_up(self, settings: LoadSettings) -> None:
        scraped, watched = self._samplers
        result = RunResult(
            began_at=self._began_at,
            seconds=min(settings.seconds, max(0.001, self.elapsed)),
            gave_up=any(self._finished.values()),
            workers=len(self._expected),
            workers_finished=len(self._finished),
            records=sorted(self._records),
            pulses=sorted(self._pulses),
            samples=scraped.samples,
            num_missed=scraped.num_missed,
            library=self._library,
            memory=watched.samples,
        )
        self.summary = summarize(settings, result)
        print(told(self.summary))
        if self.options.report == "-":
            print(json.dumps(self.summary, allow_nan=False), flush=True)
        elif self.options.report:
            write_report(self.summary, Path(self.options.report))
            print(f"\n{self.options.report}", flush=True)

    def _on_quitting(self, environment: Environment, **_: Any) -> None:
        if self.settings is not None:  # locust does not wait for a stop that another greenlet began
            self._summed_up.wait(_LOST_SECONDS + self.settings.timeout_seconds)
        if self._problem or (self.options.headless and self.summary is None):
            environment.process_exit_code = NO_RUN
        elif self.summary is not None and not self.summary["valid"]:
            environment.process_exit_code = NOT_VALID
        elif self.summary is not None:
            environment.process_exit_code = KEPT if self.summary["held"] else self.options.exit_code_on_error


def server_pid(text: str, host: str) -> int | None:
    """The process whose memory is watched: its id as text, or "auto", who listens at `host` here; None for none."""
    if text == "auto":
        pid = find_server(urllib.parse.urlsplit(f"//{host.rpartition('//')[2]}").port or 80)
        if pid is None:
            print(f"server-pid: this user sees no process that listens at {host} here", file=sys.stderr)
        return pid
    if text and not (text.isdecimal() and psutil.pid_exists(int(text))):
        raise ValueError(f"server-pid: expected a process of this machine, or auto, got {text}")
    return int(text) if text else None
