"""One worker's part of a run. Runs under gevent: requests are greenlets.

Open loop: a dispatcher starts every request when it is due, answered or not, and latency counts from then. A client
that waits for answers before it asks again (a closed loop) asks a slow server less, and so never sees most of the
waiting it would have caused; that is called coordinated omission.
"""

import logging
import math
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group

from loadtest.settings import LoadSettings

from .arrivals import Arrival
from .hope import Hope
from .pictures import Item, Mix, load_mix
from .records import GIVEN_UP, TIMEOUT, UNSENT, Pulse, Record
from .references import References
from .ways import WAYS, Answer, Client, NoAnswerError

logger = logging.getLogger(__name__)

_PULSE_SECONDS = 0.02


class Session:
    """A worker's clock, client and records.

    Args:
        settings: of the whole run.
        index: of this worker, from 0.
        report: called after every request with its record, the number of bytes that came, for locust's own statistics.
    """

    def __init__(
        self, settings: LoadSettings, index: int = 0, report: Callable[[Record, int], None] = lambda *_: None
    ) -> None:
        self.settings = settings
        self._index = index
        self._report = report
        self._mix: Mix
        self._client: Client
        self.references: References
        self._arrivals: list[Arrival] = []
        self._inflight: dict[int, tuple[float, Item]] = {}
        self._hope: Hope
        self._start = 0.0
        self._numbers = count(index, settings.num_workers)
        self._given_up = Event()
        self.records: list[Record] = []
        self.pulses: list[Pulse] = []

    @property
    def gave_up(self) -> bool:
        return self._given_up.is_set()

    def prepare(self) -> None:
        """Read the pictures, and ask every idle server for the mask of each.

        Raises:
            ValueError, OSError: the pictures can't be used.
            MaskError: a server does not answer, or not with masks, or with other masks than the library.
        """
        settings = self.settings
        self._mix = load_mix(
            Path(settings.pictures),
            shares=settings.shares,
            weights=settings.weights,
            seed=settings.seed,
            raw=any(arrival.kind == "raw" for arrival in settings.trace),
        )
        self._arrivals = settings.arrivals()
        self._hope = Hope(settings.give_up, len(self._arrivals))
        for number, arrival in enumerate(settings.trace):
            try:
                self._mix.choose(number, arrival)
            except (KeyError, IndexError):
                named = f"picture {arrival.picture!r}, kind {arrival.kind!r}"
                raise ValueError(f"trace: expected what the mix holds, got {named} at {arrival.at:g} s") from None
        kept = math.inf if settings.connection_seconds is None else settings.connection_seconds
        self._client = WAYS[settings.way](settings.urls, settings.model, kept)
        self.references = References(settings, self._client)
        self.references.take(self._mix.pictures)

    def run(self) -> None:
        """Send what becomes due to this worker, and wait for the answers."""
        self._begin()
        settings = self.settings
        requests = Group()
        limit = settings.max_inflight // settings.num_workers
        with _Pulse(self):
            for number, arrival in islice(enumerate(self._arrivals), self._index, None, settings.num_workers):
                due = self._start + arrival.at
                gevent.sleep(0)  # a dispatcher that is behind must still let others run
                while (early := due - time.monotonic()) > 0 and not self.gave_up:
                    self._given_up.wait(early)
                if self.gave_up:
                    break
                item = self._mix.choose(number, arrival)
                if len(self._inflight) >= limit:
                    self._keep(Record(number, arrival.at, 0.0, 0.0, UNSENT, item.kind, item.name), 0)
                else:
                    requests.spawn(self._ask, number, item, due)
            while len(requests) and not self.gave_up:
                requests.join(timeout=_PULSE_SECONDS)
            left = dict(self._inflight)
            requests.kill()
            for number, (due, item) in left.items():
                age = time.monotonic() - due
                self._keep(Record(number, due - self._start, 0.0, age, GIVEN_UP, item.kind, item.name), 0)
        self._client.close()

    def run_user(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """A user who asks again once answered, until the time is over."""
        if not self._start:
            self._begin()
            gevent.spawn(self._pulse_until_over)
        while (now := time.monotonic()) < self._start + self.settings.seconds and not stopped():
            number = next(self._numbers)
            self._ask(number, self._mix.choose(number), now)

    def take(self) -> tuple[list[Record], list[Pulse]]:
        """What was recorded since it was last taken."""
        taken = self.records, self.pulses
        self.records, self.pulses = [], []
        return taken

    def watch(self, lag: float, cpu: float) -> None:
        self.pulses.append(Pulse(time.monotonic() - self._start, self._index, lag, cpu, len(self._inflight)))

    def check_hope(self) -> None:
        """Give up if the promises can't be kept any more, by what is recorded and what is already too old."""
        now = time.monotonic()
        if not self._hope.holds(now - due for due, _ in self._inflight.values()):
            self._given_up.set()

    def _begin(self) -> None:
        self._start = time.monotonic()

    def _pulse_until_over(self) -> None:
        with _Pulse(self):
            gevent.sleep(self.settings.seconds)

    def _ask(self, number: int, item: Item, due: float) -> None:
        sent = time.monotonic()
        left = self.settings.timeout_seconds - (sent - due)
        answer: Answer | None = None
        agreement = None
        self._inflight[number] = due, item
        try:
            with gevent.Timeout(left + 1, TimeoutError):  # reads one by one may each be in time and all together not
                answer = self._client.ask(item, number, max(left, 0.001))
            taken = time.monotonic() - due
            outcome, agreement = self.references.check(item, answer)
        except TimeoutError:
            taken, outcome = time.monotonic() - due, TIMEOUT
        except NoAnswerError as error:
            taken, outcome = time.monotonic() - due, f"connection: {str(error)[:60]}"
        except Exception as error:
            logger.exception("a request failed in the client")
            taken, outcome = time.monotonic() - due, f"client: {type(error).__name__}"
        finally:
            self._inflight.pop(number, None)
        before, after = (answer.tokens if answer else None) or (None, None)
        at, late, replica = due - self._start, sent - due, answer.replica if answer else None
        record = Record(number, at, late, taken, outcome, item.kind, item.name, before, after, agreement, replica)
        self._keep(record, len(answer.body) if answer else 0)

    def _keep(self, record: Record, num_bytes: int) -> None:
        self.records.append(record)
        self._hope.learn(record)
        self._report(record, num_bytes)


class _Pulse:
    """Watches a session while it runs: how late its loop is, what it takes of a core, and whether there is hope."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._greenlet: Any = None

    def __enter__(self) -> "_Pulse":
        self._greenlet = gevent.spawn(self._beat)
        return self

    def __exit__(self, *_: object) -> None:
        self._greenlet.kill()

    def _beat(self) -> None:
        while True:
            worst, since, used = 0.0, time.monotonic(), time.process_time()
            try:
                while (now := time.monotonic()) - since < 1:
                    gevent.sleep(_PULSE_SECONDS)
                    worst = max(worst, time.monotonic() - now - _PULSE_SECONDS)
                    self._session.check_hope()
            finally:  # what is left of a second at the end counts as well
                elapsed = max(time.monotonic() - since, _PULSE_SECONDS)
                self._session.watch(worst, (time.process_time() - used) / elapsed)
