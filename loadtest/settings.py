"""What a run does, as its workers get it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .checking import check_integer, check_number, check_share
from .client.arrivals import PROCESSES, Arrival, arrivals_of
from .client.shapes import Phase, total_seconds
from .client.ways import WAYS, check_url
from .slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Settings of a run.

    Attributes:
        way: how to ask, one of `loadtest.client.ways.WAYS`.
        urls: servers, asked in turn; nothing else is ever asked.
        model: under which name it is served.
        pictures: folder of pictures.
        weights: of pictures, by patterns of file names.
        shares: of the kinds json, raw and bad.
        phases: the offered rate over time.
        process: how arrivals are spaced, one of `loadtest.client.arrivals.PROCESSES`.
        trace: arrivals that are replayed instead.
        closed: so many users ask again as soon as they are answered, instead of arrivals; 0 for none.
        seed: of arrivals and of the mix.
        max_inflight: requests in flight at most, of all workers; what is due beyond them fails unsent.
        connection_seconds: after which a connection is not used again, 0 for one a request; None keeps them.
        timeout_seconds: from when a request is due to its answer; later it counts as failed.
        min_agreement: share of pixels that must have the class of the reference.
        library: masks that the library made of some of the pictures, PNG in base64, by names; what idle servers
            answer has to agree with them.
        num_workers: processes that share the load.
        give_up: a run that can no longer keep these promises ends; empty for never.
    """

    urls: tuple[str, ...]
    pictures: str
    phases: tuple[Phase, ...]
    way: str = "torchserve"
    model: str = "segmenter"
    weights: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    process: str = "poisson"
    trace: tuple[Arrival, ...] = ()
    closed: int = 0
    seed: int = 0
    max_inflight: int = 512
    connection_seconds: float | None = None
    timeout_seconds: float = 60.0
    min_agreement: float = 0.99
    library: Mapping[str, str] = field(default_factory=dict)
    num_workers: int = 1
    give_up: str = ""

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {self.way!r}")
        if not self.urls:
            raise ValueError("urls: expected at least one, got none")
        for url in self.urls:
            check_url(self.way, url)
        if self.process not in PROCESSES:
            raise ValueError(f"process: expected one of {', '.join(PROCESSES)}, got {self.process!r}")
        for name, minimum in (("closed", 0), ("seed", 0), ("max_inflight", 1), ("num_workers", 1)):
            check_integer(name, getattr(self, name), minimum=minimum)
        check_number("timeout_seconds", self.timeout_seconds, above=True)
        if self.connection_seconds is not None:
            check_number("connection_seconds", self.connection_seconds)
        check_share("min_agreement", self.min_agreement)
        if not self.phases:
            raise ValueError("phases: expected at least one, got none")
        if self.max_inflight < self.num_workers:
            raise ValueError(f"max_inflight: expected at least one a worker ({self.num_workers}), got less")
        if 0 < self.closed < self.num_workers:
            raise ValueError(f"closed: expected at least one user a worker ({self.num_workers}), got {self.closed}")
        if self.give_up:
            Slo.parse(self.give_up)

    @property
    def seconds(self) -> float:
        """How long requests become due; what is in flight then has its timeout left."""
        return total_seconds(self.phases)

    def arrivals(self) -> list[Arrival]:
        """Everything that becomes due; empty where users decide."""
        if self.closed:
            return []
        return list(self.trace) or arrivals_of(self.phases, self.process, self.seed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LoadSettings":
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is unknown or not what it should be.
        """
        values: dict[str, Any] = json.loads(text)
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields {', '.join(unknown)}")
        values["urls"] = tuple(values["urls"])
        values["phases"] = tuple(Phase(**phase) for phase in values["phases"])
        values["trace"] = tuple(Arrival(**arrival) for arrival in values.get("trace", ()))
        return cls(**values)
