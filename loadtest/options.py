"""Options of the load test as arguments of locust, and what they ask for.

Options are text or numbers, because locust's page sends them as such; `LoadSettings.read` checks them.
"""

import math
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrivals import FACTORS, PROCESSES, Arrival, Phase, arrivals_of, phases_of, read_trace
from .checks import check_integer, check_number, parse_pairs, parse_seconds, parse_share
from .pictures import KINDS, PAINTED
from .protocols import PROTOCOLS, Servers
from .slo import Slo

if TYPE_CHECKING:  # importing locust patches sockets and threads
    from locust.argument_parser import LocustArgumentParser

SOAK_SECONDS, SOAK_GROWTH = 1800.0, 0.05
OPEN_LOOP_USERS = 100  # requests in flight, where -u doesn't say it
_METRICS_PORT = 8090


def add_arguments(parser: "LocustArgumentParser") -> None:
    """Add the options to locust's command line and page."""

    def add(*names: str, web: bool = True, **more: Any) -> None:
        group.add_argument(*names, **more).include_in_web_ui = web

    group = parser.add_argument_group("what is asked")
    add("--protocol", default="torchserve", choices=list(PROTOCOLS), help="of the server at --host (torchserve)")
    add("--model", default="segmenter", help="name of the served model (segmenter)")
    add("--pictures", default="", help=f"folder of pictures (road scenes, painted into {PAINTED})")
    add("--weights", default="", metavar="PATTERN=NUMBER,...", help="how often files are sent (1)")
    add("--accept", default="png=100%", metavar="KIND=SHARE,...", help="what is asked for: png, json (png=100%%)")
    add("--raw", default="0", metavar="SHARE", help="of requests that send uncompressed frames (0)")
    add("--bad", default="0", metavar="SHARE", help="of requests that send no picture and must be refused (0)")
    group = parser.add_argument_group("when")
    rate = "requests a second in all, which do not wait for answers; -u then bounds how many are in flight"
    rate += f" ({OPEN_LOOP_USERS}). 0: each user waits for its answer (0)"
    add("--rate", type=float, default=0.0, help=rate)
    add("--arrivals", default="poisson", choices=list(PROCESSES), help="spacing of requests with --rate (poisson)")
    add("--seed", type=int, default=0, help="of arrivals and of pictures (0)")
    add("--shape", default="", choices=["", *FACTORS], web=False, help="how the rate, or the users, change (steady)")
    add("--steps", default="0.25,0.5,0.75,1", help="factors of --shape steps (0.25,0.5,0.75,1)")
    add("--peak", type=float, default=3.0, help="factor of --shape spike (3)")
    add("--trace", default="", help="replay arrivals of a file, .jsonl or .csv; see loadtest/arrivals.py")
    add("--speed", type=float, default=1.0, help="of the replay (1)")
    add("--request-timeout", default="60s", help="from when a request is due to its answer (60s)")
    add("--connection-seconds", default="", help="age from which connections are closed; 0: one a request (never)")
    group = parser.add_argument_group("what is right")
    add("--min-agreement", default="99%", metavar="SHARE", help="of a mask's pixels (99%%)")
    add("--checkpoint", default="", help="that is served: its masks by the library are compared (none)")
    add("--library-sample", type=int, default=8, help="pictures for that (8)")
    add("--schedule", default="", help="of the checkpoint (as the server's metrics say)")
    add("--align", type=int, default=0, help="of the checkpoint (as they say; 1 with --schedule)")
    add("--library-masks", default="", metavar="FOLDER", help="written by `mpm loadtest masks`, instead")
    group = parser.add_argument_group("promises")
    add("--slo", default="errors=0", help="such as p99=800ms,errors=0.1%%; sets the exit status (errors=0)")
    add("--max-lateness", default="50ms", help="of the client; beyond it the run says nothing of the server (50ms)")
    add("--max-growth", default="", metavar="SHARE", help="of the server's memory (any; a soak 5%%)")
    add("--give-up", action="store_true", default=False, help="end as soon as a promise can't be kept any more")
    group = parser.add_argument_group("what is watched and written")
    add("--metrics", default="", metavar="URL,...", help="of the servers, or none (port 8090 of the same hosts)")
    add(
        "--server-pid",
        default="",
        metavar="PID",
        help="watch its memory, or auto: of the process that listens at --host",
    )
    add("--report", default="", metavar="FILE", help="page to write, JSON beside it; - prints the JSON instead")
    add("--save-trace", default="", metavar="FILE", help="write what was sent, to replay it")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Settings of a run, the same in all its processes.

    Attributes:
        hosts: servers, asked in turn; nothing else is ever asked.
        weights: of pictures, by patterns of file names.
        shares: of the kinds of requests.
        phases: the offered rate over time; empty where each user waits for its answer.
        trace: arrivals that are replayed instead.
        seconds: how long requests become due; infinity until somebody ends the run.
        connection_seconds: age from which a connection is not used again.
        timeout_seconds: from when a request is due to its answer; later it counts as failed.
        min_agreement: share of pixels that must have the class of the reference.
        slo: promises.
        max_lateness: seconds by which the client may send late, in 99 of 100 requests.
        max_growth: by what share the server's memory may grow between the second and the last quarter; None for any.
        give_up: end once a promise can't be kept any more.
        metrics: URLs of metrics pages.
    """

    protocol: str
    hosts: tuple[str, ...]
    model: str
    pictures: Path
    weights: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=lambda: {"png": 1.0})
    phases: tuple[Phase, ...] = ()
    arrivals: str = "poisson"
    trace: tuple[Arrival, ...] = ()
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
        return bool(self.phases or self.trace)

    def due(self) -> Iterable[Arrival]:
        """Everything that becomes due."""
        return self.trace or arrivals_of(self.phases, self.arrivals, self.seed)

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
            OSError: the trace can't be read.
        """
        shape = options.shape or "steady"
        trace = tuple(read_trace(Path(options.trace), speed=options.speed)) if options.trace else ()
        check_number("rate", options.rate)
        if trace and (options.rate or shape != "steady"):
            raise ValueError("trace: expected without --rate and --shape")
        seconds = float(
            getattr(options, "seconds", None) or options.run_time or (SOAK_SECONDS if shape == "soak" else math.inf)
        )
        factors = FACTORS[shape](options)
        growth = SOAK_GROWTH if shape == "soak" else None
        check_integer("seed", options.seed, minimum=0)
        hosts = tuple(filter(None, (host or PROTOCOLS[options.protocol].host).split(",")))
        Servers(options.protocol, hosts, options.model).close()
        return cls(
            protocol=options.protocol,
            hosts=hosts,
            model=options.model,
            pictures=Path(options.pictures or PAINTED),
            weights=dict(_weights(options.weights)),
            shares=_shares(options, kinds),
            phases=phases_of(factors, options.rate, seconds) if options.rate else (),
            arrivals=options.arrivals,
            trace=trace,
            seconds=min(seconds, max(trace[-1].at, 0.001)) if trace else seconds,
            seed=options.seed,
            connection_seconds=_seconds(options, "connection_seconds") if options.connection_seconds else math.inf,
            timeout_seconds=_seconds(options, "request_timeout", above=True),
            min_agreement=parse_share("min-agreement", options.min_agreement),
            slo=Slo.parse(options.slo),
            max_lateness=_seconds(options, "max_lateness"),
            max_growth=parse_share("max-growth", options.max_growth) if options.max_growth else growth,
            give_up=options.give_up,
            metrics=tuple(_metrics(options.metrics, hosts)),
        )


def _seconds(options: Any, name: str, *, above: bool = False) -> float:
    shown = name.replace("_", "-")
    seconds = parse_seconds(shown, getattr(options, name))
    check_number(shown, seconds, above=above)
    return seconds


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


def _weights(text: str) -> Iterator[tuple[str, float]]:
    for pattern, number in parse_pairs("weights", text).items():
        try:
            yield pattern, float(number)
        except ValueError:
            raise ValueError(f"weights: {pattern}: expected a number, got {number!r}") from None


def _metrics(text: str, hosts: Collection[str]) -> Iterator[str]:
    """Metrics pages: as given, or where our servers have them."""
    if text == "none":
        return
    for url in filter(None, text.split(",")):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"metrics: expected http://HOST:PORT/metrics, got {url!r}")
        yield url
    if not text:
        names = dict.fromkeys(urllib.parse.urlsplit(f"//{host.rpartition('//')[2]}").hostname for host in hosts)
        yield from (f"http://{name}:{_METRICS_PORT}/metrics" for name in names)
