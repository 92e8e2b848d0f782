"""What the command line asks for, as settings of a run."""

import argparse
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .checking import check_integer, parse_seconds, parse_share
from .client import shapes
from .client.arrivals import Arrival, read_trace
from .client.pictures import load_mix
from .client.ways import WAYS
from .preparing import PAINTED, Library, draw_sample, library_masks, read_masks, served_library
from .report.summary import Limits
from .settings import LoadSettings
from .slo import Slo
from .watching.memory import check_pid, find_server
from .watching.scraping import check_metrics_url

_URLS = {"torchserve": "http://127.0.0.1:8080", "triton": "http://127.0.0.1:8000", "triton-grpc": "127.0.0.1:8001"}
_METRICS_PORT = 8090
_MASTER_PORT = 5557
_SOAK_SECONDS = 1800.0
_SOAK_GROWTH = 0.05


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=(__doc__ or "").split("\n")[0])
    where = parser.add_argument_group("where")
    where.add_argument("--way", choices=list(WAYS), default="torchserve")
    where.add_argument("--url", action="append", help="of a server; several are asked in turn (loopback)")
    where.add_argument("--metrics", action="append", help="its metrics (port 8090 of the same hosts), or none")
    where.add_argument("--model", default="segmenter")
    where.add_argument("--server-pid", metavar="PID", help="watch its memory, or auto: of who listens at --url")
    what = parser.add_argument_group("what")
    what.add_argument("--pictures", type=Path, help="a folder of pictures (painted ones)")
    what.add_argument("--paint", type=Path, default=PAINTED, help="where those are painted, if nothing is there")
    what.add_argument("--weights", default="", metavar="PATTERN=NUMBER,...", help="how often files are sent (1)")
    for kind, help in (("bad", "what is no picture"), ("json", "asked for as JSON"), ("raw", "raw frames")):
        what.add_argument(f"--{kind}", type=typed(parse_share), default=0.0, metavar="SHARE", help=f"{help} (0)")
    right = parser.add_argument_group("what is right")
    right.add_argument("--checkpoint", type=Path, help="that is served: its masks by the library are compared (none)")
    right.add_argument("--library-sample", type=int, metavar="NUMBER", help="of pictures for that (8)")
    right.add_argument("--schedule", help="of the checkpoint (as the server's metrics tell)")
    right.add_argument("--align", type=int, help="of the checkpoint (as they tell; 1 with --schedule)")
    right.add_argument("--library-masks", type=Path, metavar="FOLDER", help="of python -m loadtest.library, instead")
    right.add_argument("--min-agreement", type=typed(parse_share), default=0.99, metavar="SHARE", help="(99%%)")
    when = parser.add_argument_group("when")
    when.add_argument("--shape", choices=shapes.SHAPES, default="steady")
    when.add_argument("--rate", type=float, default=2.0, help="requests per second (2)")
    when.add_argument("--peak", type=float, help="of a spike (three times the rate)")
    when.add_argument("--rates", help="of steps, as 1,2,4")
    when.add_argument("--seconds", type=typed(parse_seconds), help="of arrivals (30; a soak 30m)")
    when.add_argument("--process", choices=["poisson", "even"], default="poisson")
    when.add_argument("--trace", type=Path, help="arrivals to replay, .jsonl or .csv; see loadtest/client/arrivals.py")
    when.add_argument("--speed", type=float, default=1.0, help="of the replay (1)")
    when.add_argument("--closed", type=int, default=0, metavar="USERS", help="who wait for answers, instead")
    when.add_argument("--seed", type=int, default=0)
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--max-inflight", type=int, default=512, help="requests (512)")
    bounds.add_argument(
        "--connection-seconds",
        type=typed(parse_seconds),
        help="how long one is used; 0 opens one a request, for balancers of connections (for ever)",
    )
    bounds.add_argument("--timeout", type=typed(parse_seconds), default=60.0, help="of a request (60s)")
    promised = parser.add_argument_group("promises")
    promised.add_argument("--slo", default="errors=0", help="such as p99=800ms,errors=0.1%% (errors=0)")
    promised.add_argument("--max-lateness", type=typed(parse_seconds), default=0.05, help="of the client (50ms)")
    promised.add_argument("--max-growth", type=typed(parse_share), help="of the server's memory (any; a soak 5%%)")
    who = parser.add_argument_group("who")
    who.add_argument("--workers", type=int, default=1, help="processes that send (1)")
    who.add_argument("--bind", help="HOST:PORT where as many workers from elsewhere are expected instead")
    out = parser.add_argument_group("out")
    out.add_argument("--out", type=Path, default=Path("build/loadtest/report.html"), help="the JSON lies beside it")
    out.add_argument("--save-trace", type=Path, help="write what was sent, to replay it")
    out.add_argument("--print-json", action="store_true", help="end the output with the JSON, in one line")
    out.add_argument("--log", type=Path, help="locust's output")
    return parser


def load_settings(arguments: argparse.Namespace) -> LoadSettings:
    """What the run does.

    Raises:
        ValueError: options contradict each other, or one is out of range.
        OSError: the trace can't be read.
    """
    trace: tuple[Arrival, ...] = ()
    if (arguments.shape == "replay") != (arguments.trace is not None):
        raise ValueError("trace: expected with --shape replay, and nowhere else")
    if arguments.trace is not None:
        trace = tuple(read_trace(arguments.trace, speed=arguments.speed))
    return LoadSettings(
        way=arguments.way,
        urls=tuple(arguments.url or [_URLS[arguments.way]]),
        model=arguments.model,
        pictures=str((arguments.pictures or arguments.paint).resolve()),
        weights=parse_weights(arguments.weights),
        shares={kind: getattr(arguments, kind) for kind in ("json", "raw", "bad")},
        phases=_phases(arguments, trace),
        process=arguments.process,
        trace=trace,
        closed=arguments.closed,
        seed=arguments.seed,
        max_inflight=arguments.max_inflight,
        connection_seconds=arguments.connection_seconds,
        timeout_seconds=arguments.timeout,
        min_agreement=arguments.min_agreement,
        num_workers=arguments.workers,
    )


def _phases(arguments: argparse.Namespace, trace: Sequence[Arrival]) -> tuple[shapes.Phase, ...]:
    if arguments.shape == "replay":
        seconds = max(trace[-1].at, 0.001)
        return shapes.steady(len(trace) / seconds, seconds)
    default = _SOAK_SECONDS if arguments.shape == "soak" else 30.0
    seconds = default if arguments.seconds is None else arguments.seconds
    if (arguments.shape == "steps") != (arguments.rates is not None):
        raise ValueError("rates: expected with --shape steps, and nowhere else")
    if arguments.shape == "steps":
        try:
            rates = [float(rate) for rate in arguments.rates.split(",")]
        except ValueError:
            raise ValueError(f"rates: expected numbers such as 1,2,4, got {arguments.rates!r}") from None
        return shapes.steps(rates, seconds)
    if arguments.shape == "spike":
        return shapes.spike(arguments.rate, arguments.peak or 3 * arguments.rate, seconds)
    return shapes.steady(arguments.rate, seconds)


def masks_of(arguments: argparse.Namespace, metrics: Sequence[str]) -> dict[str, str]:
    """The library's masks of a sample of the pictures; none if nobody asked for them.

    Raises:
        ValueError: options contradict each other, or nothing tells how the checkpoint is served.
        OSError: pictures or masks can't be read.
        RunError: the library can't make them.
    """
    if arguments.checkpoint is None:
        for name in ("schedule", "align", "library_sample"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name.replace('_', '-')}: expected with --checkpoint only")
        return read_masks(arguments.library_masks) if arguments.library_masks else {}
    if arguments.library_masks:
        raise ValueError("library-masks: expected without --checkpoint")
    number = 8 if arguments.library_sample is None else arguments.library_sample
    check_integer("library-sample", number, minimum=1)
    folder = arguments.pictures or arguments.paint
    names = list(load_mix(folder, shares={}, weights=parse_weights(arguments.weights), seed=0).weights)
    if arguments.schedule is None:
        library = served_library(arguments.checkpoint, metrics)
    else:
        library = Library(checkpoint=arguments.checkpoint, schedule=arguments.schedule)
    if arguments.align is not None:
        library = replace(library, align=arguments.align)
    return library_masks(library, draw_sample(folder, names, number, arguments.seed))


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What it is held against."""
    growth = _SOAK_GROWTH if arguments.shape == "soak" else None
    return Limits(
        slo=Slo.parse(arguments.slo),
        max_lateness=arguments.max_lateness,
        max_growth=growth if arguments.max_growth is None else arguments.max_growth,
    )


def metrics_of(arguments: argparse.Namespace, settings: LoadSettings) -> list[str]:
    """Metrics pages: as given, or where our servers have them.

    Raises:
        ValueError: a URL is not one of metrics, or no worker is expected.
    """
    if arguments.bind:
        check_integer("workers", arguments.workers, minimum=1)
    if arguments.metrics:
        given = [] if arguments.metrics == ["none"] else list(arguments.metrics)
        for url in given:
            check_metrics_url(url)
        return given
    hosts = dict.fromkeys(urllib.parse.urlsplit(f"//{url.rpartition('//')[2]}").hostname for url in settings.urls)
    return [f"http://{host}:{_METRICS_PORT}/metrics" for host in hosts]


def server_pid_of(arguments: argparse.Namespace, settings: LoadSettings) -> int | None:
    """The process whose memory is watched; None for none.

    Raises:
        ValueError: it is not there.
    """
    if arguments.server_pid is None:
        return None
    if arguments.server_pid == "auto":
        return find_server(urllib.parse.urlsplit(f"//{settings.urls[0].rpartition('//')[2]}").port or 80)
    if not arguments.server_pid.isdecimal():
        raise ValueError(f"server-pid: expected the id of a process, or auto, got {arguments.server_pid!r}")
    check_pid(int(arguments.server_pid))
    return int(arguments.server_pid)


def parse_weights(text: str) -> dict[str, float]:
    """`clutter000*=1,clutter100*=3` -> weights by patterns of file names.

    Raises:
        ValueError: a part is something else.
    """
    weights = {}
    for part in filter(None, text.split(",")):
        pattern, equals, number = part.rpartition("=")
        try:
            weights[pattern] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"weights: expected PATTERN=NUMBER, got {part!r}")
    return weights


def parse_address(name: str, text: str) -> tuple[str, int]:
    """`HOST:PORT` or `HOST`, whose port is locust's own."""
    host, _colon, port = text.rpartition(":") if ":" in text else (text, "", str(_MASTER_PORT))
    if not host or not port.isdecimal():
        raise ValueError(f"{name}: expected HOST:PORT, got {text!r}")
    return host, int(port)


def typed(parse: Callable[[str], float]) -> Callable[[str], float]:
    """A type for argparse, which shows the message of no ValueError."""

    def parsed(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
