"""Load a running server, and write what it did as a page and as JSON.

    python -m loadtest [--url http://127.0.0.1:8080] [--rate 2] [--seconds 30] [--slo p99=800ms,errors=0.1%]
    python -m loadtest worker --master HOST:PORT

Status: 0 if every promise was kept, 1 if one was broken, 2 if there was no run, 3 if the client could not keep up, so
that the run says nothing about the server.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from . import shapes
from .arrivals import Arrival, read_trace, write_trace
from .checking import check_integer, parse_seconds, parse_share
from .report import told, write_report
from .running import RunError, RunResult, run_load, worker_command, worker_environment
from .settings import LoadSettings
from .slo import Slo
from .summary import Limits, summarize
from .ways import WAYS

KEPT, BROKEN, NO_RUN, NOT_VALID = 0, 1, 2, 3

PAINTED = Path("build/loadtest/pictures")
_URLS = {"torchserve": "http://127.0.0.1:8080", "triton": "http://127.0.0.1:8000", "triton-grpc": "127.0.0.1:8001"}
_METRICS_PORT = 8090
_MASTER_PORT = 5557
_SOAK_SECONDS = 1800.0
_SOAK_GROWTH = 0.05


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


def ensure_painted(folder: Path) -> None:
    """Paint pictures into a folder that has none; in a process of its own, which loads what this one never needs.

    Raises:
        RunError: they can't be painted.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    command = [sys.executable, "-m", "loadtest.pictures", "--out", str(folder)]
    painted = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    if painted.returncode:
        raise RunError(f"no pictures could be painted into {folder}: {painted.stderr.strip()[-500:]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=(__doc__ or "").split("\n")[0])
    where = parser.add_argument_group("where")
    where.add_argument("--way", choices=list(WAYS), default="torchserve")
    where.add_argument("--url", action="append", help="of a server; several are asked in turn (loopback)")
    where.add_argument("--metrics", action="append", help="its metrics (port 8090 of the same hosts), or none")
    where.add_argument("--model", default="segmenter")
    what = parser.add_argument_group("what")
    what.add_argument("--pictures", type=Path, help="a folder of pictures (painted ones)")
    what.add_argument("--paint", type=Path, default=PAINTED, help="where those are painted, if nothing is there")
    what.add_argument("--weights", default="", metavar="PATTERN=NUMBER,...", help="how often files are sent (1)")
    for kind, help in (("bad", "what is no picture"), ("json", "asked for as JSON"), ("raw", "raw frames")):
        what.add_argument(f"--{kind}", type=_typed(parse_share), default=0.0, metavar="SHARE", help=f"{help} (0)")
    when = parser.add_argument_group("when")
    when.add_argument("--shape", choices=shapes.SHAPES, default="steady")
    when.add_argument("--rate", type=float, default=2.0, help="requests per second (2)")
    when.add_argument("--peak", type=float, help="of a spike (three times the rate)")
    when.add_argument("--rates", help="of steps, as 1,2,4")
    when.add_argument("--seconds", type=_typed(parse_seconds), help="of arrivals (30; a soak 30m)")
    when.add_argument("--process", choices=["poisson", "even"], default="poisson")
    when.add_argument("--trace", type=Path, help="arrivals to replay, .jsonl or .csv; see loadtest/arrivals.py")
    when.add_argument("--speed", type=float, default=1.0, help="of the replay (1)")
    when.add_argument("--closed", type=int, default=0, metavar="USERS", help="who wait for answers, instead")
    when.add_argument("--seed", type=int, default=0)
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--max-inflight", type=int, default=512, help="requests (512)")
    bounds.add_argument("--timeout", type=_typed(parse_seconds), default=60.0, help="of a request (60s)")
    promised = parser.add_argument_group("promises")
    promised.add_argument("--slo", default="errors=0", help="such as p99=800ms,errors=0.1%% (errors=0)")
    promised.add_argument("--min-agreement", type=_typed(parse_share), default=0.99, metavar="SHARE", help="(99%%)")
    promised.add_argument("--max-lateness", type=_typed(parse_seconds), default=0.05, help="of the client (50ms)")
    promised.add_argument("--max-growth", type=_typed(parse_share), help="of the server's memory (any; a soak 5%%)")
    who = parser.add_argument_group("who")
    who.add_argument("--workers", type=int, default=1, help="processes that send (1)")
    who.add_argument("--bind", help="HOST:PORT where as many workers from elsewhere are expected instead")
    out = parser.add_argument_group("out")
    out.add_argument("--out", type=Path, default=Path("build/loadtest/report.html"), help="the JSON lies beside it")
    out.add_argument("--save-trace", type=Path, help="write what was sent, to replay it")
    out.add_argument("--print-json", action="store_true", help="end the output with the JSON, in one line")
    out.add_argument("--log", type=Path, help="locust's output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["worker"]:
        return _work(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        settings, limits = _settings(arguments), _limits(arguments)
        metrics = _metrics(arguments, settings)
        bind = parse_address("bind", arguments.bind) if arguments.bind else None
        if arguments.pictures is None:
            ensure_painted(arguments.paint)
        result = run_load(settings, metrics=metrics, bind=bind, log=arguments.log)
        summary = summarize(settings, result, limits)
        write_report(summary, arguments.out)
        if arguments.save_trace:
            write_trace(arguments.save_trace, _sent(result))
    except (OSError, ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return NO_RUN
    except KeyboardInterrupt:
        return NO_RUN
    print(told(summary))
    print(f"\n{arguments.out}")
    if arguments.print_json:
        print(json.dumps(summary, allow_nan=False))
    if not summary["valid"]:
        return NOT_VALID
    return KEPT if summary["held"] else BROKEN


def _work(argv: Sequence[str]) -> int:  # noqa: RET503  (this process becomes another)
    parser = argparse.ArgumentParser(prog="python -m loadtest worker", description="Send for a master elsewhere.")
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    parser.add_argument("--paint", type=Path, default=PAINTED, help="folder of pictures, painted if it has none")
    arguments = parser.parse_args(argv)
    try:
        host, port = parse_address("master", arguments.master)
        ensure_painted(arguments.paint)
    except (ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return NO_RUN
    command = worker_command(host, port)
    os.execve(command[0], command, worker_environment())


def _settings(arguments: argparse.Namespace) -> LoadSettings:
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


def _limits(arguments: argparse.Namespace) -> Limits:
    growth = _SOAK_GROWTH if arguments.shape == "soak" else None
    return Limits(
        slo=Slo.parse(arguments.slo),
        max_lateness=arguments.max_lateness,
        max_growth=growth if arguments.max_growth is None else arguments.max_growth,
    )


def _metrics(arguments: argparse.Namespace, settings: LoadSettings) -> list[str]:
    if arguments.bind:
        check_integer("workers", arguments.workers, minimum=1)
    if arguments.metrics:
        return [] if arguments.metrics == ["none"] else list(arguments.metrics)
    hosts = dict.fromkeys(urllib.parse.urlsplit(f"//{url.rpartition('//')[2]}").hostname for url in settings.urls)
    return [f"http://{host}:{_METRICS_PORT}/metrics" for host in hosts]


def _sent(result: RunResult) -> list[Arrival]:
    """By the file's own names, but for what is bad: that is made anew."""
    return [Arrival(record.at, "" if record.kind == "bad" else record.name, record.kind) for record in result.records]


def _typed(parse: Callable[[str], float]) -> Callable[[str], float]:
    """For argparse, which shows the message of no ValueError."""

    def parsed(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started has to be stopped
    sys.exit(main())
