"""What a worker writes down."""

from typing import NamedTuple

UNSENT = "unsent: too many in flight"
GIVEN_UP = "given up: there was no hope for the run"
TIMEOUT = "timeout"


class Record(NamedTuple):
    """One request.

    Attributes:
        number: of the arrival.
        at: when it was due, in seconds of the run.
        late: seconds after that it was sent.
        seconds: from when it was due to its answer or failure.
        outcome: `masks.OK`, or what went wrong.
        kind, name: of the item.
        tokens_in, tokens_out: of the picture before and after merging, where the server tells.
        agreement: share of pixels as in the reference, where compared.
        replica: who answered, where a proxy tells.
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
    """A second of the worker's own life: a client that can't keep up would measure itself.

    Attributes:
        at: end of the second, in seconds of the run.
        worker: its index.
        lag: by how much its loop was late at most, in seconds.
        cpu: share of a core that it used.
        inflight: requests at the end.
    """

    at: float
    worker: int
    lag: float
    cpu: float
    inflight: int
