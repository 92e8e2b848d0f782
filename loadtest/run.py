"""One process's share of a run. Under gevent: users are greenlets, and requests run in them.

Open loop (`--rate`): a dispatcher sends every request when it is due, whether or not earlier ones are answered, and
latency counts from when it was due. A client that waits for answers before it asks again
(closed loop) asks a slow server less, and so misses most of the waiting that it would have caused: coordinated
omission.
"""

import logging
import math
import time
from collections.abc import Callable
from itertools import count, islice
from typing import NamedTuple

import gevent
from gevent.event import Event

from handlers.client import Answer, NoAnswerError

from .masks import OK, References
from .options import LoadSettings
from .pictures import Item, Mix, load_mix
from .protocols import Servers
from .slo import ErrorBudget

logger = logging.getLogger(__name__)

UNSENT = "unsent: all users wait for answers"
GIVEN_UP = "given up: the promises were broken"
TIMEOUT = "timeout"
_PULSE_SECONDS = 0.02


class Record(NamedTuple):
    """One request.

    Attributes:
        number: of the request, over all processes.
        at: when it was due, in seconds of the run.
        late: seconds after that it was sent.
        seconds: from when it was due to its answer or failure.
        outcome: `masks.OK`, or what went wrong.
        kind, name: of the item.
        tokens_in, tokens_out: of the picture before and after merging, where the server says so.
        agreement: share of pixels as in the reference, where compared.
    """

    number: int
    at: float
    late: float
    seconds: float
    outcome: str
    kind: str
    name: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    agreement: float | None = None


class Pulse(NamedTuple):
    """A second of the client itself: one that can't keep up would measure itself.

    Attributes:
        at: end of the second, in seconds of the run.
        worker: index of the process.
        lag: by how much its loop was late at most, in seconds.
        cpu: share of a core that it used.
        inflight: requests in flight at the end.
    """

    at: float
    worker: int
    lag: float
    cpu: float
    inflight: int


class Request(NamedTuple):
    """What a user sends next, and when that is due on the monotonic clock."""

    number: int
    item: Item
    due: float


class Share:
    """One process's share: its clock, connections, requests and records.

    Args:
        settings: of the whole run.
        report: called after each request with its record and the bytes of its answer, for locust's statistics.

    Attributes:
        problem: why nothing can be sent; empty if something can.
        gave_up: whether it ended early because the promises were broken.
        finished: set once everything sent is answered and nothing is sent any more.
    """

    references: References
    _mix: Mix
    _servers: Servers

    def __init__(self, settings: LoadSettings, report: Callable[[Record, int], None] = lambda *_: None) -> None:
        self.settings, self._report = settings, report
        self.problem, self.gave_up, self.finished = "", False, Event()
        self._budget = ErrorBudget(settings.slo if settings.give_up else None, settings.num_due())
        self._begun, self._closed = Event(), Event()
        self._start, self._index, self._of = 0.0, 0, 1
        self._numbers = count()
        self._inflight: dict[int, Request] = {}
        self._records: list[Record] = []
        self._pulses: list[Pulse] = []

    def prepare(self, library: dict[str, bytes]) -> None:
        """Read the pictures, and ask every idle server for the mask of each.

        Args:
            library: the library's masks of some of the pictures, as PNG, by names.

        Raises:
            ValueError, OSError: pictures or masks can't be used, or a server gives wrong ones.
        """
        chosen = self.settings
        self._mix = load_mix(chosen.pictures, shares=chosen.shares, weights=chosen.weights, seed=chosen.seed)
        self._servers = Servers(chosen.protocol, chosen.hosts, chosen.model, chosen.connection_seconds)
        self.references = References(library, chosen.min_agreement)
        self.references.take(self._mix.pictures, self._servers, chosen.timeout_seconds)

    def begin(self, index: int = 0, of: int = 1, num_users: Callable[[], int] = lambda: 1) -> None:
        """Let requests be sent, as the process `index` of `of` that share the arrivals."""
        self._index, self._of = index, of
        self._start = time.monotonic()
        self._numbers = count(index, of)
        self._begun.set()
        gevent.spawn(self._watch)
        gevent.spawn(self._dispatch, num_users)

    def close(self) -> None:
        """Send nothing more; `finished` is set once what is in flight is answered."""
        if not self._closed.is_set():
            self._closed.set()
            self._begun.set()
            gevent.spawn(self._finish)

    def next_request(self) -> Request | None:
        """What a user that waits for its answer sends next; None, perhaps after a while, if there will be nothing."""
        self._begun.wait()
        if self.settings.is_open:
            self._closed.wait()  # the dispatcher sends; users only bound how many are in flight
        if self._closed.is_set() or self.problem:
            return None
        number = next(self._numbers)
        return Request(number, self._mix.choose(number), time.monotonic())

    def send(self, request: Request) -> None:
        """Send a request, check its answer, and write down what became of it."""
        number, item, due = request
        sent = time.monotonic()
        left = self.settings.timeout_seconds - (sent - due)
        answer: Answer | None = None
        agreement = None
        self._inflight[number] = request
        try:
            with gevent.Timeout(left + 1, TimeoutError):  # each read may be in time and all of them not
                answer = self._servers.ask(item, number, max(left, 0.001))
            seconds = time.monotonic() - due
            outcome, agreement = self.references.check(item, answer)
        except TimeoutError:
            seconds, outcome = time.monotonic() - due, TIMEOUT
        except NoAnswerError as error:
            seconds, outcome = time.monotonic() - due, f"connection: {str(error)[:60]}"
        except gevent.GreenletExit:
            self._keep(request, time.monotonic() - due, GIVEN_UP)
            raise
        except Exception as error:
            logger.exception("a request failed in the client")
            seconds, outcome = time.monotonic() - due, f"client: {type(error).__name__}"
        finally:
            self._inflight.pop(number, None)
        self._keep(request, seconds, outcome, sent - due, answer, agreement)

    def take(self) -> tuple[list[Record], list[Pulse]]:
        """Records since they were last taken."""
        taken = self._records, self._pulses
        self._records, self._pulses = [], []
        return taken

    def _dispatch(self, num_users: Callable[[], int]) -> None:
        """Send requests when they are due, while fewer are in flight than there are users; then wait for the end."""
        due_times = self.settings.due() if self.settings.is_open else ()
        for number, at in islice(enumerate(due_times), self._index, None, self._of):
            due = self._start + at
            gevent.sleep(0)  # a dispatcher that is behind must still let others run
            while (early := due - time.monotonic()) > 0 and not self._closed.is_set():
                self._closed.wait(early)
            if self._closed.is_set():
                return
            request = Request(number, self._mix.choose(number), due)
            if len(self._inflight) < num_users():
                self._inflight[number] = request
                gevent.spawn(self.send, request)
            else:
                self._keep(request, 0.0, UNSENT)
        left = self._start + self.settings.seconds - time.monotonic()
        self._closed.wait(None if left == math.inf else max(0.0, left))
        self.close()

    def _finish(self) -> None:
        deadline = time.monotonic() + self.settings.timeout_seconds + 2
        while self._inflight and not self.gave_up and time.monotonic() < deadline:
            gevent.sleep(_PULSE_SECONDS)
        for request in list(self._inflight.values()):
            self._keep(request, time.monotonic() - request.due, GIVEN_UP)
        self.finished.set()

    def _watch(self) -> None:
        """Write down how late this loop is and what it uses of a core, and end the run once promises are broken."""
        while not self.finished.is_set():
            worst, since, used = 0.0, time.monotonic(), time.process_time()
            while (now := time.monotonic()) - since < 1 and not self.finished.is_set():
                gevent.sleep(_PULSE_SECONDS)
                worst = max(worst, time.monotonic() - now - _PULSE_SECONDS)
                if self._budget.is_spent(now - request.due for request in self._inflight.values()):
                    self.gave_up = True
                    self.close()
            elapsed = max(time.monotonic() - since, _PULSE_SECONDS)
            cpu = (time.process_time() - used) / elapsed
            self._pulses.append(Pulse(time.monotonic() - self._start, self._index, worst, cpu, len(self._inflight)))

    def _keep(
        self,
        request: Request,
        seconds: float,
        outcome: str,
        late: float = 0.0,
        answer: Answer | None = None,
        agreement: float | None = None,
    ) -> None:
        """Write down what became of a request, once: what comes later was written down as given up."""
        if self.finished.is_set():
            return
        number, item, due = request
        before, after = (answer.tokens if answer else None) or (None, None)
        at, name = due - self._start, item.name
        record = Record(number, at, late, seconds, outcome, item.kind, name, before, after, agreement)
        self._records.append(record)
        if item.kind != "bad":
            self._budget.count(seconds if outcome == OK else math.inf)
        self._report(record, len(answer.body) if answer else 0)
