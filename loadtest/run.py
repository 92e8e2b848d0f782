"""One process's share of a run. Under gevent: users are greenlets, and requests run in them.

Open loop (`--rate`, `--trace`): a dispatcher hands every request to a free user when it is due, whether or not earlier
ones are answered, and latency counts from when it was due. A client that waits for answers before it asks again
(closed loop) asks a slow server less, and so misses most of the waiting that it would have caused: coordinated
omission.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from itertools import count, islice
from typing import NamedTuple

import gevent
from gevent.event import AsyncResult, Event

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
        replica: the server behind a proxy, where the proxy names it.
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
    replica: str | None = None


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

    def __init__(self, settings: LoadSettings, report: Callable[[Record, int], None] = lambda *_: None) -> None:
        self.settings = settings
        self.problem = ""
        self.gave_up = False
        self.finished = Event()
        self.references: References
        self._report = report
        self._mix: Mix
        self._servers: Servers
        self._budget = ErrorBudget(settings.slo if settings.give_up else None, settings.num_due())
        self._begun = Event()
        self._closed = Event()
        self._start = 0.0
        self._index, self._of = 0, 1
        self._numbers = count()
        self._free: deque[AsyncResult] = deque()  # users that wait for a request to become due
        self._inflight: dict[int, Request] = {}
        self._records: list[Record] = []
        self._pulses: list[Pulse] = []

    def prepare(self, library: dict[str, bytes]) -> None:
        """Read the pictures, and ask every idle server for the mask of each.

        Args:
            library: the library's masks of some of the pictures, as PNG, by names.

        Raises:
            ValueError, OSError: pictures, trace or masks can't be used, or a server gives wrong ones.
        """
        settings = self.settings
        raw = any(arrival.kind == "raw" for arrival in settings.trace)
        self._mix = load_mix(
            settings.pictures, shares=settings.shares, weights=settings.weights, seed=settings.seed, raw=raw
        )
        for number, arrival in enumerate(settings.trace):
            try:
                self._mix.choose(number, arrival)
            except (KeyError, IndexError):
                named = f"picture {arrival.picture!r}, kind {arrival.kind!r} at {arrival.at:g} s"
                raise ValueError(f"trace: expected pictures and kinds of this run, got {named}") from None
        self._servers = Servers(settings.protocol, settings.hosts, settings.model, settings.connection_seconds)
        self.references = References(library, settings.min_agreement)
        self.references.take(self._mix.pictures, self._servers, settings.timeout_seconds)

    def begin(self, index: int = 0, of: int = 1) -> None:
        """Let users send, as the process `index` of `of` that share the arrivals."""
        self._index, self._of = index, of
        self._start = time.monotonic()
        self._numbers = count(index, of)
        self._begun.set()
        gevent.spawn(self._watch)
        gevent.spawn(self._dispatch if self.settings.is_open else self._close_in_time)

    def close(self) -> None:
        """Send nothing more; `finished` is set once what is in flight is answered."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._begun.set()
        while self._free:
            self._free.popleft().set(None)
        gevent.spawn(self._finish)

    def next_request(self) -> Request | None:
        """Wait until a request is due, for a user; None if there will be none any more."""
        self._begun.wait()
        if self._closed.is_set() or self.problem:
            return None
        if not self.settings.is_open:
            number = next(self._numbers)
            return Request(number, self._mix.choose(number), time.monotonic())
        slot = AsyncResult()
        self._free.append(slot)
        try:
            request: Request | None = slot.get()
        except BaseException:  # the user is stopped, because there shall be fewer
            if slot in self._free:
                self._free.remove(slot)
            elif slot.value is not None:
                self._keep_unsent(slot.value)
            raise
        return request

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
            self._give_up(request)
            raise
        except Exception as error:
            logger.exception("a request failed in the client")
            seconds, outcome = time.monotonic() - due, f"client: {type(error).__name__}"
        finally:
            self._inflight.pop(number, None)
        tokens_in, tokens_out = (answer.tokens if answer else None) or (None, None)
        record = Record(
            number=number,
            at=due - self._start,
            late=sent - due,
            seconds=seconds,
            outcome=outcome,
            kind=item.kind,
            name=item.name,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            agreement=agreement,
            replica=answer.replica if answer else None,
        )
        self._keep(record, len(answer.body) if answer else 0)

    def take(self) -> tuple[list[Record], list[Pulse]]:
        """Records since they were last taken."""
        taken = self._records, self._pulses
        self._records, self._pulses = [], []
        return taken

    def _dispatch(self) -> None:
        """Hand requests to free users when they are due."""
        for number, arrival in islice(enumerate(self.settings.due()), self._index, None, self._of):
            due = self._start + arrival.at
            gevent.sleep(0)  # a dispatcher that is behind must still let others run
            while (early := due - time.monotonic()) > 0 and not self._closed.is_set():
                self._closed.wait(early)
            if self._closed.is_set():
                return
            request = Request(number, self._mix.choose(number, arrival), due)
            if self._free:
                self._free.popleft().set(request)
            else:
                self._keep_unsent(request)
        self._close_in_time()

    def _close_in_time(self) -> None:
        left = self._start + self.settings.seconds - time.monotonic()
        self._closed.wait(None if left == math.inf else max(0.0, left))
        self.close()

    def _finish(self) -> None:
        deadline = time.monotonic() + self.settings.timeout_seconds + 2
        while self._inflight and not self.gave_up and time.monotonic() < deadline:
            gevent.sleep(_PULSE_SECONDS)
        for request in list(self._inflight.values()):
            self._give_up(request)
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

    def _give_up(self, request: Request) -> None:
        number, item, due = request
        self._keep(Record(number, due - self._start, 0.0, time.monotonic() - due, GIVEN_UP, item.kind, item.name), 0)

    def _keep_unsent(self, request: Request) -> None:
        number, item, due = request
        self._keep(Record(number, due - self._start, 0.0, 0.0, UNSENT, item.kind, item.name), 0)

    def _keep(self, record: Record, num_bytes: int) -> None:
        if self.finished.is_set():
            return  # written down as given up
        self._records.append(record)
        if record.kind != "bad":
            self._budget.count(record.seconds if record.outcome == OK else math.inf)
        self._report(record, num_bytes)
