"""Options of the load test as arguments of locust, and what they ask for.

Options are text or numbers, because locust's page sends them as such; `LoadSettings.read` checks them.
"""

import math
import urllib.parse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrivals import FACTORS, PROCESSES, Phase, arrivals_of, phases_of
from .checks import check_integer, check_number, parse_pairs, parse_seconds, parse_share, parse_weights
from .pictures import KINDS, PAINTED
from .protocols import PROTOCOLS, model_urls
from .slo import Slo

if TYPE_CHECKING:  # importing locust patches sockets and threads
    from locust.argument_parser import LocustArgumentParser

SOAK_SECONDS, SOAK_GROWTH = 1800.0, 0.05
OPEN_LOOP_USERS = 100  # requests in flight, where -u doesn't say it
_METRICS_PORT = 8090


def add_arguments(parser: "LocustArgumentParser") -> None:
    """Add the options to locust's command line and page."""

    def add(name: str, default: Any, help: str, web: bool = True, **more: Any) -> None:
        if isinstance(default, int | float) and not isinstance(default, bool):
            more["type"] = type(default)
        group.add_argument(name, default=default, help=help, **more).include_in_web_ui = web

    group = parser.add_argument_group("what is asked")
    add("--protocol", "torchserve", "of the server at --host (torchserve)", choices=list(PROTOCOLS))
    add("--model", "segmenter", "name of the served model (segmenter)")
    add("--pictures", "", f"folder of pictures (road scenes, painted into {PAINTED})")
    add("--weights", "", "how often files are sent (1)", metavar="PATTERN=NUMBER,...")
    add("--accept", "png=100%", "what is asked for: png, json (png=100%%)", metavar="KIND=SHARE,...")
    add("--raw", "0", "of requests that send uncompressed frames (0)", metavar="SHARE")
    add("--bad", "0", "of requests that send no picture and must be refused (0)", metavar="SHARE")
    group = parser.add_argument_group("when")
    rate = "requests a second in all, which do not wait for answers; -u then bounds how many are in flight"
    add("--rate", 0.0, f"{rate} ({OPEN_LOOP_USERS}). 0: each user waits for its answer (0)")
    add("--arrivals", "poisson", "spacing of requests with --rate (poisson)", choices=list(PROCESSES))
    add("--seed", 0, "of arrivals and of pictures (0)")
    add("--shape", "", "how the rate, or the users, change (steady)", choices=["", *FACTORS], web=False)
    add("--steps", "0.25,0.5,0.75,1", "factors of --shape steps (0.25,0.5,0.75,1)")
    add("--peak", 3.0, "factor of --shape spike (3)")
    add("--request-timeout", "60s", "from when a request is due to its answer (60s)")
    add("--connection-seconds", "", "age from which connections are closed; 0: one a request (never)")
    group = parser.add_argument_group("what is right")
    add("--min-agreement", "99%", "of a mask's pixels (99%%)", metavar="SHARE")
    add("--library-masks", "", "written by `mpm loadtest masks`, to compare with (none)", metavar="FOLDER")
    group = parser.add_argument_group("promises")
    add("--slo", "errors=0", "such as p99=800ms,errors=0.1%%; sets the exit status (errors=0)")
    add("--max-lateness", "50ms", "of the client; beyond it the run says nothing of the server (50ms)")
    add("--max-growth", "", "of the server's memory (any; a soak 5%%)", metavar="SHARE")
    add("--give-up", False, "end as soon as a promise can't be kept any more", action="store_true")
    group = parser.add_argument_group("what is watched and written")
    add("--metrics", "", "of the servers, or none (port 8090 of the same hosts)", metavar="URL,...")
    add("--server-pid", "", "watch its memory, or auto: of the process that listens at --host", metavar="PID")
    add("--report", "", "page to write, JSON beside it; - prints the JSON instead", metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Settings of a run, the same in all its processes; what the options say, with these differences.

    Attributes:
        hosts: servers, asked in turn; nothing else is ever asked.
        shares: of the kinds of requests.
        phases: the offered rate over time; empty where each user waits for its answer.
        seconds: how long requests become due; infinity until somebody ends the run.
    """

    protocol: str
    hosts: tuple[str, ...]
    model: str
    pictures: Path
    weights: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=lambda: {"png": 1.0})
    phases: tuple[Phase, ...] = ()
    arrivals: str = "poisson"
    seconds: float = math.inf
    seed: int = 0
    connection_seconds: float = math.inf
    timeout_seconds: float = 60.0
    min_agreement: float = 0.99
    slo: Slo
    max_lateness: float = 0.05
    max_growth: float | None = None
    give_up: bool = False
    metrics: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether requests are sent when they are due, answered or not."""
        return bool(self.phases)

    def due(self) -> Iterator[float]:
        """When requests become due."""
        return arrivals_of(self.phases, self.arrivals, self.seed)

    def num_due(self) -> int:
        """How many requests become due; 0 where that is not decided before."""
        return sum(1 for _ in self.due()) if self.is_open and self.seconds < math.inf else 0

    @classmethod
    def read(cls, options: Any, host: str | None, kinds: Collection[str] = KINDS) -> "LoadSettings":
        """Read locust's options.

        Args:
            host: of locust; several are separated by commas.
            kinds: those that the tags leave.

        Raises:
            ValueError: an option is out of range, or options contradict each other.
        """
        shape = options.shape or "steady"
        check_number("rate", options.rate)
        asked = getattr(options, "seconds", None) or options.run_time
        seconds = float(asked or (SOAK_SECONDS if shape == "soak" else math.inf))
        factors = FACTORS[shape](options)
        growth = SOAK_GROWTH if shape == "soak" else None
        check_integer("seed", options.seed, minimum=0)
        timeout = parse_seconds("request-timeout", options.request_timeout)
        check_number("request-timeout", timeout, above=True)
        connection = options.connection_seconds
        hosts = tuple(filter(None, (host or PROTOCOLS[options.protocol].host).split(",")))
        model_urls(options.protocol, hosts, options.model)  # refuses what is no host
        return cls(
            protocol=options.protocol,
            hosts=hosts,
            model=options.model,
            pictures=Path(options.pictures or PAINTED),
            weights=parse_weights(options.weights),
            shares=_shares(options, kinds),
            phases=phases_of(factors, options.rate, seconds) if options.rate else (),
            arrivals=options.arrivals,
            seconds=seconds,
            seed=options.seed,
            connection_seconds=parse_seconds("connection-seconds", connection) if connection else math.inf,
            timeout_seconds=timeout,
            min_agreement=parse_share("min-agreement", options.min_agreement),
            slo=Slo.parse(options.slo),
            max_lateness=parse_seconds("max-lateness", options.max_lateness),
            max_growth=parse_share("max-growth", options.max_growth) if options.max_growth else growth,
            give_up=options.give_up,
            metrics=tuple(_metrics(options.metrics, hosts)),
        )


def _shares(options: Any, kinds: Collection[str]) -> dict[str, float]:
    """Shares of the kinds that the tags leave; all the same where those have none."""
    accepted = {
        kind: parse_share(f"accept: {kind}", text) for kind, text in parse_pairs("accept", options.accept).items()
    }
    if not accepted or not set(accepted) <= {"png", "json"} or not sum(accepted.values()):
        raise ValueError(f"accept: expected shares of png and json, such as png=90%,json=10%, got {options.accept!r}")
    raw, bad = parse_share("raw", options.raw), parse_share("bad", options.bad)
    if raw + bad > 1:
        raise ValueError(f"raw, bad: expected at most 1 in sum, got {raw + bad:g}")
    rest = (1 - raw - bad) / sum(accepted.values())
    shares = {kind: rest * share for kind, share in accepted.items()} | {"raw": raw, "bad": bad}
    left = {kind: shares.get(kind, 0.0) for kind in KINDS if kind in kinds}
    return left if sum(left.values()) else dict.fromkeys(left, 1.0)


def _metrics(text: str, hosts: Collection[str]) -> Iterator[str]:
    """Metrics pages: as given, or where our servers have them."""
    for url in filter(None, text.split(",") if text != "none" else ()):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"metrics: expected http://HOST:PORT/metrics, got {url!r}")
        yield url
    if not text:
        names = dict.fromkeys(urllib.parse.urlsplit(f"//{host.rpartition('//')[2]}").hostname for host in hosts)
        yield from (f"http://{name}:{_METRICS_PORT}/metrics" for name in names)
