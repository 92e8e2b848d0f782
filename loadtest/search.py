"""The highest rate at which a server keeps its promises; several configurations side by side.

    mpm loadtest search --slo p99=800ms,errors=0.1% [--configuration "schedule=off"] [--configuration "..."]

Every repeat is a bisection of its own, with arrivals of its own. The result is the median of the repeats, and the
range from the least to the greatest of them holds the true median with the probability that the JSON calls `coverage`:
1 - 2^(1 - repeats), whatever the distribution. All servers run from the beginning to the end, take turns trial by
trial, and in each repeat get the same arrivals: what disturbs the machine disturbs all of them.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import click
import yaml

from handlers.launch.processes import Server, ServerError, free_port
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton

from .checks import check_integer, parse_seconds, parse_share, parse_weights
from .cli import LOCUSTFILE
from .masks import Library, environment, flags, run_module
from .page import alike, library_of
from .pictures import PAINTED, draw_sample, ensure_pictures, weigh_pictures
from .protocols import PROTOCOLS
from .server import sample_metrics
from .slo import Slo
from .summary import describe_machine, installed_versions

MODEL = "segmenter"
PRESETS = {
    "merging": ("schedule=off", "schedule=2,5"),
    "align": ("align=1", "align=8", "align=16"),
    "runtime": ("runtime=torch", "runtime=openvino"),
    "server": ("protocol=torchserve", "protocol=triton", "protocol=triton-grpc"),
    "replicas": ("replicas=1", "replicas=2"),
}
_GUESS = (0.2, 1.1)  # of what waiting clients reach: between there most promises break
_CLOSE = 0.15  # of the upper end: what is left when an end that no trial confirmed moves on
_READY_SECONDS, _DRAIN_SECONDS = 180.0, 120.0
_MAX_INFLIGHT = 512


class RunError(RuntimeError):
    """There is no result; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A server to search with.

    Attributes:
        protocol: one of `loadtest.protocols.PROTOCOLS`, which also says the server.
        schedule: blocks before which tokens merge (2,5), or off.
        align: token counts after a merge are multiples of this.
        replicas: servers that share the device, and are asked in turn.
        serving: further fields of the served model's configuration, such as runtime or max_group_windows.
    """

    protocol: str = "torchserve"
    schedule: str = "2,5"
    align: int = 1
    replicas: int = 1
    serving: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        for name in ("align", "replicas"):
            check_integer(name, getattr(self, name), minimum=1)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `schedule=off protocol=triton runtime=torch`; fields that are not ours are the served model's.

        Raises:
            ValueError: an entry is no NAME=VALUE, or a value is not what its field expects.
        """
        own: dict[str, Any] = {}
        serving: dict[str, Any] = {}
        for entry in text.split():
            name, equals, value = entry.partition("=")
            if not equals:
                raise ValueError(f"configuration: expected NAME=VALUE, got {entry!r}")
            if name in ("protocol", "schedule"):
                own[name] = value
            else:
                (own if name in ("align", "replicas") else serving)[name] = yaml.safe_load(value)
        return cls(**own, serving=serving)

    @property
    def name(self) -> str:
        """Protocol, schedule, and everything that is not the default."""
        parts = [self.protocol, "no merging" if self.schedule == "off" else f"merging {self.schedule}"]
        parts += [f"align {self.align}"] if self.align > 1 else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.serving.items())])


class Served:
    """The servers of one configuration on free loopback ports; a context manager that stops them.

    Args:
        checkpoint: checkpoint.pth with its variant.yml beside it.
        folder: for archives and logs; made if missing.

    Raises:
        ValueError: the checkpoint can't be built for the server.
    """

    def __init__(self, configuration: Configuration, checkpoint: Path, folder: Path) -> None:
        self.configuration = configuration
        self.hosts: list[str] = []
        self.metrics: list[str] = []
        self._servers: list[Server] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "serving.yml").write_text(yaml.safe_dump(dict(configuration.serving)), encoding="utf-8")
        with ExitStack() as stack:
            for i in range(configuration.replicas):
                self._servers.append(stack.enter_context(self._start(checkpoint, folder, i)))
            self._running = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def wait_ready(self) -> None:
        """Return once every server has answered a picture; a RunError if one ended, or did not in time."""
        try:
            for server in self._servers:
                server.wait_ready(_READY_SECONDS)
        except ServerError as error:
            raise RunError(f"{self.configuration.name} did not become ready: {error}") from None

    def wait_idle(self) -> None:
        """Return once nothing is in flight: what a run left behind must not slow the next.

        Raises:
            RunError: it took too long.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError):
                if sample_metrics(self.metrics).metrics.total("mpm_inflight_requests") == 0:
                    return
            time.sleep(0.1)
        raise RunError(f"{self.configuration.name}: still busy {_DRAIN_SECONDS:g} s after the load ended")

    def _start(self, checkpoint: Path, folder: Path, number: int) -> Server:
        """Build the model and start its server."""
        protocol, port = self.configuration.protocol, free_port()
        out, log = folder / f"models-{number}", folder / f"server-{number}.log"
        options = {
            "target": "torchserve" if protocol == "torchserve" else "triton",
            "checkpoint": checkpoint,
            "name": MODEL,
            "out": out,
            "schedule": self.configuration.schedule,
            "align": self.configuration.align,
            "metrics-port": port,
            "config": folder / "serving.yml",
        }
        run_module("handlers", "build", *flags(options))
        self.metrics.append(f"http://127.0.0.1:{port}/metrics")
        server = (TorchServe if protocol == "torchserve" else Triton)(out, log=log)
        self.hosts.append(getattr(server, "grpc_url" if protocol == "triton-grpc" else "url"))
        return server


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one rate."""

    rate: float
    held: bool
    p50_ms: float | None
    p99_ms: float | None
    doubts: Sequence[str] = ()


@dataclass(slots=True)
class Bisection:
    """Narrows down the highest rate that holds, from a guess: an end that no trial confirms moves on.

    Attributes:
        low: a rate that held, or the guess of one.
        high: a rate that did not, or the guess of one.
        trials: all so far.
    """

    low: float
    high: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def next_rate(self) -> float:
        return (self.low + self.high) / 2

    def learn(self, trial: Trial) -> None:
        """Take the outcome of `next_rate` over."""
        self.trials.append(trial)
        close = _CLOSE * self.high
        if trial.held:
            self.low = trial.rate
            if self.high - self.low < close and all(other.held for other in self.trials):
                self.high *= 1.25
        else:
            self.high = trial.rate
            if self.high - self.low < close and not any(other.held for other in self.trials):
                self.low /= 4

    @property
    def best(self) -> Trial | None:
        """The trial at the highest rate that held."""
        return max((trial for trial in self.trials if trial.held), key=lambda trial: trial.rate, default=None)

    @property
    def rate(self) -> float:
        """The highest that held; 0 if none did."""
        return self.best.rate if self.best else 0.0


def bisect_interleaved(
    guesses: Sequence[tuple[float, float]], try_rate: Callable[[int, float, int], Trial], *, repeats: int, trials: int
) -> list[list[Bisection]]:
    """Search for several at once, in turns.

    Args:
        guesses: for each a rate that should hold and one that should not.
        try_rate: of the index of a configuration, a rate and the repeat.

    Returns:
        For each its bisections, one a repeat.
    """
    found: list[list[Bisection]] = [[] for _ in guesses]
    for repeat in range(repeats):
        for bisections, (low, high) in zip(found, guesses, strict=True):
            bisections.append(Bisection(low, high))
        for step in range(trials):
            for turn in range(len(found)):
                i = (turn + step + repeat) % len(found)  # none is always the first
                found[i][-1].learn(try_rate(i, found[i][-1].next_rate, repeat))
    return found


def summarize_search(bisections: Sequence[Bisection], first: Sequence[Bisection]) -> dict[str, Any]:
    """A configuration's result, and its ratio to the first one, repeat by repeat."""
    rates = [bisection.rate for bisection in bisections]
    best = sorted(bisections, key=lambda bisection: bisection.rate)[(len(bisections) - 1) // 2].best
    ratios = [mine.rate / other.rate for mine, other in zip(bisections, first, strict=True) if other.rate]
    ends = {"median": statistics.median, "low": min, "high": max}
    return {
        "rate_per_second": round(statistics.median(rates), 4),
        "low": round(min(rates), 4),
        "high": round(max(bisection.high for bisection in bisections), 4),
        "p50_ms": best.p50_ms if best else None,
        "p99_ms": best.p99_ms if best else None,
        "repeats": [round(rate, 4) for rate in rates],
        "doubtful_trials": sum(bool(trial.doubts) for bisection in bisections for trial in bisection.trials),
        "ratio_to_first": {name: round(end(ratios), 4) for name, end in ends.items()} if ratios else None,  # type: ignore[operator]
        "trials": [
            {"repeat": i, "rate": round(trial.rate, 4), "held": trial.held, "p99_ms": trial.p99_ms}
            for i, bisection in enumerate(bisections)
            for trial in bisection.trials
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How to search: the options of `mpm loadtest search`."""

    slo: Slo
    pictures: Path
    weights: str = ""
    repeats: int = 3
    trials: int = 5
    requests: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 60.0
    probe_seconds: float = 8.0
    probe_users: int = 8
    min_agreement: float = 0.99
    library_sample: int = 8

    def trial_seconds(self, rate: float) -> float:
        return min(self.max_seconds, max(self.min_seconds, self.requests / rate))


def search(
    configurations: Sequence[Configuration],
    checkpoint: Path,
    settings: SearchSettings,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Start a server for each, search in turns, and stop them.

    Raises:
        RunError: a server does not start, does not answer, or gives other masks than the library.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="search-")))
        masks = _library_masks(configurations, checkpoint, settings, folder)
        servers = [
            stack.enter_context(Served(configuration, checkpoint, folder / str(i)))
            for i, configuration in enumerate(configurations)
        ]
        for server in servers:
            server.wait_ready()
        probes = [_probe(server, settings, own, say) for server, own in zip(servers, masks, strict=True)]
        found = bisect_interleaved(
            [(_GUESS[0] * rate, _GUESS[1] * rate) for rate in (probe["answered_per_second"] for probe in probes)],
            lambda i, rate, repeat: _try(servers[i], settings, rate, repeat, masks[i], say),
            repeats=settings.repeats,
            trials=settings.trials,
        )
    devices = sorted({probe["device"] for probe in probes})
    return {
        "device": f"{', '.join(devices)} ({describe_machine()})",
        "versions": installed_versions(),
        "slo": str(settings.slo),
        "coverage": 1 - 2.0 ** (1 - settings.repeats),
        "results": [
            {
                "configuration": asdict(configuration),
                "name": configuration.name,
                **summarize_search(bisections, found[0]),
                "closed_loop_per_second": round(probe["answered_per_second"], 4),
                "library": probe["library"],
            }
            for configuration, bisections, probe in zip(configurations, found, probes, strict=True)
        ],
    }


def run_locust(server: Served, settings: SearchSettings, masks: Path | None, **options: object) -> dict[str, Any]:
    """Run locust in a process of its own, and read its report.

    Args:
        options: of locust and of `loadtest.options`.

    Raises:
        RunError: there was no run.
    """
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        out = Path(folder) / "report.json"
        asked: dict[str, object] = {
            "host": ",".join(server.hosts),
            "protocol": server.configuration.protocol,
            "model": MODEL,
            "pictures": settings.pictures.resolve(),
            "weights": settings.weights,
            "min-agreement": settings.min_agreement,
            "slo": settings.slo,
            "report": out.with_suffix(".html"),
            **({"library-masks": masks} if masks else {}),
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        early = ["--give-up"] if "rate" in options else []
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *early]
        process = subprocess.Popen(
            [*command, "--loglevel", "WARNING", *flags(asked)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the other
        )
        try:
            output, _ = process.communicate()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if not out.exists():
            raise RunError(f"{server.configuration.name}: {output.strip()[-1000:]}")
        summary: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return summary


def _library_masks(
    configurations: Sequence[Configuration], checkpoint: Path, settings: SearchSettings, folder: Path
) -> list[Path | None]:
    """A folder of masks for each configuration; made before any server runs, which would make both slow."""
    pictures = list(weigh_pictures(settings.pictures, parse_weights(settings.weights)))
    pictures = draw_sample(pictures, settings.library_sample, seed=0)
    made: dict[str, Path] = {}
    found: list[Path | None] = []
    for configuration in configurations if pictures else ():
        inference = configuration.serving.get("inference", {})
        library = Library(
            checkpoint=checkpoint, schedule=configuration.schedule, align=configuration.align, inference=inference
        )
        if repr(library) not in made:
            out = made[repr(library)] = folder / f"masks-{len(made)}"
            out.mkdir()
            for name, png in library.masks(pictures).items():
                (out / f"{name}.png").write_bytes(png)
        found.append(made[repr(library)])
    return found or [None for _ in configurations]


def _probe(server: Served, settings: SearchSettings, masks: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """What clients reach that wait for their answers, whose masks are compared with the library's."""
    users, seconds, name = settings.probe_users, round(settings.probe_seconds), server.configuration.name
    metrics = ",".join(server.metrics)
    summary = run_locust(server, settings, masks, users=users, spawn_rate=users, run_time=seconds, metrics=metrics)
    if not summary["answered_per_second"]:
        raise RunError(f"{name}: answered nothing: {summary['outcomes']}")
    server.wait_idle()
    library = library_of(summary)
    right = f"; masks are the library's in at least {alike(library['least'])}" if library else ""
    say(f"{name}: {summary['answered_per_second']:.2f}/s with {users} waiting users{right}")
    return summary


def _try(
    server: Served, settings: SearchSettings, rate: float, repeat: int, masks: Path | None, say: Callable[[str], None]
) -> Trial:
    options = {"rate": rate, "run_time": max(1, round(settings.trial_seconds(rate))), "users": _MAX_INFLIGHT}
    for _ in range(2):
        summary = run_locust(server, settings, masks, **options, seed=1 + repeat, metrics="none")
        server.wait_idle()
        # A client that is late only adds to the latency, so what held did hold. What broke may not break again.
        if summary["valid"] or summary["held"]:
            break
    held = summary["held"]
    latency, doubts = summary["latency_ms" if held else "at_least_ms"], () if held else tuple(summary["doubts"])
    for doubt in doubts:
        say(f"  but perhaps because of the client: {doubt}")
    p99 = "never" if latency["p99"] is None else f"{latency['p99']:.0f} ms"
    say(f"repeat {repeat}, {server.configuration.name}: {rate:.2f}/s {'held' if held else 'broke'}, p99 {p99}")
    return Trial(rate, held, latency["p50"], latency["p99"], doubts)


def print_table(report: Mapping[str, Any]) -> None:
    """Everything side by side."""
    print(f"\n{report['device']}; highest rate that holds {report['slo']}, and its range")
    print(f"({100 * report['coverage']:.0f} % of such ranges hold the true median):\n")
    for result in report["results"]:
        ratio = result["ratio_to_first"]
        against = f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
        p50, p99 = (f"{result[name]:.0f}" if result[name] is not None else "-" for name in ("p50_ms", "p99_ms"))
        print(
            f"  {result['name']:<44} {result['rate_per_second']:7.2f}/s ({result['low']:.2f} to {result['high']:.2f})"
            f"  p50 {p50} ms  p99 {p99} ms  {against}"
        )


def _seconds(_: object, parameter: click.Parameter, text: str) -> float:
    seconds = parse_seconds(str(parameter.name).replace("_", "-"), text)
    if seconds < 1:
        raise click.BadParameter(f"expected at least 1s, got {text}")
    return seconds


def _number(name: str, default: int, help: str, least: int = 1) -> Callable[..., Any]:
    return click.option(name, default=default, type=click.IntRange(least), show_default=True, help=help)


def _time(name: str, default: str, help: str) -> Callable[..., Any]:
    return click.option(name, default=default, show_default=True, callback=_seconds, help=help)


@click.command()
@click.option("--slo", required=True, help="Promises, such as p99=800ms,errors=0.1%.")
@click.option(
    "--configuration",
    "configurations",
    multiple=True,
    metavar="'NAME=VALUE ...'",
    help="protocol, schedule, align, replicas, or a field of the served model; repeat to compare.",
)
@click.option("--compare", type=click.Choice(list(PRESETS)), help="Configurations that are often compared (merging).")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=Path("model_store/demo/checkpoint.pth"))
@click.option("--pictures", type=click.Path(path_type=Path), default=PAINTED, show_default=True, help="Folder.")
@click.option("--weights", default="", metavar="PATTERN=NUMBER,...", help="How often files are sent (1).")
@_number("--repeats", 3, "Bisections of each configuration.")
@_number("--trials", 5, "Trials of a bisection; each halves what is left.")
@_number("--requests", 100, "Requests of a trial at least: p99 of a hundred is the second largest.")
@_number("--probe-users", 8, "Users of the closed loop that finds where to search.")
@_number("--library-sample", 8, "Pictures that the library segments too; 0: none.", least=0)
@_time("--min-seconds", "10s", "Of a trial.")
@_time("--max-seconds", "60s", "Of a trial; where --requests would take longer there are fewer.")
@_time("--probe-seconds", "8s", "Of the closed loop.")
@click.option("--min-agreement", default="99%", show_default=True, help="Share of the pixels of every mask.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/loadtest/search.json"), show_default=True)
def command(
    slo: str, configurations: Sequence[str], compare: str | None, checkpoint: Path, out: Path, **options: Any
) -> None:
    """Find the highest rate at which a server keeps its promises, for several configurations side by side."""
    if configurations and compare:
        raise ValueError("compare: expected without --configuration")
    chosen = [Configuration.parse(text) for text in configurations or PRESETS[compare or "merging"]]
    options["min_agreement"] = parse_share("min-agreement", options["min_agreement"])
    settings = SearchSettings(slo=Slo.parse(slo), **options)
    if settings.pictures == PAINTED:
        ensure_pictures()
    report = search(chosen, checkpoint, settings, say=lambda line: print(line, flush=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print_table(report)
    print(f"\n{out}")
