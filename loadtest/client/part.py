"""A worker among workers: all get ready, begin together, and hand in what they recorded."""

import logging
import time
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import Semaphore
from locust.env import Environment
from locust.runners import LocalRunner, WorkerRunner

from loadtest.settings import LoadSettings

from .masks import OK
from .records import Record
from .session import Session

logger = logging.getLogger(__name__)

READY, BEGIN, FINISHED = "load_ready", "load_begin", "load_finished"
REPORT = "load_report"  # in what locust's workers tell their master every few seconds


class Part:
    """What one process does of a run.

    Args:
        environment: of locust; its runner is local or a worker.
    """

    def __init__(self, environment: Environment) -> None:
        self.session: Session
        self._environment = environment
        self._lock = Semaphore()
        self._begin = Event()
        self._begin_at = 0.0
        self._prepared = False
        self._users = 0
        self._problem = ""

    def enter(self, *, alone: bool = False) -> bool:
        """Wait for the common beginning; False if there is none, or nothing to do for a second dispatcher."""
        with self._lock:
            if alone and self._prepared:
                return False  # locust moves the users of a lost worker to others, but its requests are lost
            self._users += 1
            if not self._prepared:
                self._prepare()
                self._prepared = True
        self._begin.wait()
        if not self._problem:
            gevent.sleep(max(0.0, self._begin_at - time.time()))
        return not self._problem

    def leave(self) -> None:
        """A user is done; the last one hands in the rest."""
        self._users -= 1
        if self._users == 0:
            self._send(FINISHED, self.report() | {"gave_up": self.session.gave_up})

    def report(self) -> dict[str, Any]:
        """What is new, as plain data."""
        if not self._prepared or self._problem:
            return {"records": [], "pulses": []}
        records, pulses = self.session.take()
        return {"records": [list(record) for record in records], "pulses": [list(pulse) for pulse in pulses]}

    def begin(self, at: float, problem: str = "") -> None:
        """Everyone is ready: start at that time, in seconds since the epoch; or don't, because of a problem."""
        self._begin_at, self._problem = at, problem
        self._begin.set()

    def _prepare(self) -> None:
        runner = self._environment.runner
        index = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        problem, agreement = "", {}
        try:
            settings = LoadSettings.from_json(self._environment.parsed_options.load)  # type: ignore[union-attr]
            if settings.way == "triton-grpc":
                import grpc.experimental.gevent

                grpc.experimental.gevent.init_gevent()  # or a call would block every greenlet
            self.session = Session(settings, index, self._fire)
            self.session.prepare()
            agreement = self.session.references.library_agreement
        except (OSError, ValueError) as error:
            problem = str(error)
        self._send(READY, {"problem": problem, "library": agreement})

    def _send(self, kind: str, data: dict[str, Any]) -> None:
        runner = self._environment.runner
        assert isinstance(runner, LocalRunner | WorkerRunner)
        runner.send_message(kind, data)

    def _fire(self, record: Record, num_bytes: int) -> None:
        self._environment.events.request.fire(
            request_type=self.session.settings.way,
            name=record.kind,
            response_time=1000 * record.seconds,
            response_length=num_bytes,
            exception=None if record.outcome == OK else RuntimeError(record.outcome),
            context={},
        )
