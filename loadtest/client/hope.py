"""Can a run still keep its promises?"""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

from loadtest.slo import Bound, Slo

from .masks import OK
from .records import Record


class Hope:
    """What is already broken of promises, by what is recorded.

    Args:
        promises: as `Slo.parse` reads them; empty for none, which can't be broken.
        num_requests: of the whole run, of which each promise allows some to break it.
    """

    def __init__(self, promises: str, num_requests: int) -> None:
        self._bounds: Sequence[Bound] = Slo.parse(promises).bounds if promises else ()
        self._allowed = [bound.allowed(num_requests) for bound in self._bounds]
        self._broken = [0 for _ in self._bounds]

    def learn(self, record: Record) -> None:
        if record.kind == "bad":
            return
        seconds = record.seconds if record.outcome == OK else math.inf
        for i, bound in enumerate(self._bounds):
            self._broken[i] += bound.broken_by(seconds)

    def holds(self, ages: Iterable[float]) -> bool:
        """Whether they can be kept, given for how many seconds what is in flight has been due, oldest first."""
        waiting = list(ages)
        for bound, allowed, broken in zip(self._bounds, self._allowed, self._broken, strict=True):
            if broken + sum(1 for _ in takewhile(bound.broken_by, waiting)) > allowed:
                return False
        return True
