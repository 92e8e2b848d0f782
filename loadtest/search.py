"""The highest rate at which a server keeps its promises; several configurations side by side.

    mpm loadtest search --slo p99=800ms,errors=0.1% [--configuration "schedule=off"] [--configuration "..."]

Every repeat is a bisection of its own, with arrivals of its own. The result is the median of the repeats, and the
range from the least to the greatest of them holds the true median with the probability that the JSON calls `coverage`:
1 - 2^(1 - repeats), whatever the distribution. All servers run from the beginning to the end, take turns trial by
trial, and in each repeat get the same arrivals: what disturbs the machine disturbs all of them.
"""

import json
import os
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

from .checks import check_integer, check_number, parse_pairs, parse_seconds, parse_share
from .cli import LOCUSTFILE
from .masks import Library, environment, run_module
from .page import alike, library_of, render_search
from .pictures import PAINTED, draw_sample, ensure_pictures, load_mix
from .protocols import PROTOCOLS
from .server import sample_metrics
from .slo import Slo
from .summary import describe_machine, installed_versions
from .trials import Trial, bisect_interleaved, summarize_search

MODEL = "segmenter"
PRESETS = {
    "merging": ("schedule=off", "schedule=2,5"),
    "align": ("align=1", "align=8", "align=16"),
    "runtime": ("runtime=torch", "runtime=openvino"),
    "server": ("protocol=torchserve", "protocol=triton", "protocol=triton-grpc"),
    "replicas": ("replicas=1", "replicas=2"),
}
_GUESS = (0.2, 1.1)  # of what waiting clients reach: between there most promises break
_READY_SECONDS, _DRAIN_SECONDS = 180.0, 120.0
_MAX_INFLIGHT = 512
_OWN = ("protocol", "schedule", "align", "replicas")


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
        values: dict[str, Any] = {}
        serving: dict[str, Any] = {}
        for entry in text.split():
            name, equals, value = entry.partition("=")
            if not equals:
                raise ValueError(f"configuration: expected NAME=VALUE, got {entry!r}")
            if name not in _OWN:
                serving[name] = yaml.safe_load(value)
            else:
                values[name] = int(value) if name in ("align", "replicas") and value.isdecimal() else value
        return cls(**values, serving=serving)

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
        """Return once every server has answered a picture.

        Raises:
            RunError: one ended, or did not in time.
        """
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
        if protocol == "torchserve":
            torchserve = TorchServe(out, log=log)
            self.hosts.append(torchserve.url)
            return torchserve
        triton = Triton(out, log=log)
        self.hosts.append(triton.grpc_url if protocol == "triton-grpc" else triton.url)
        return triton


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as a command line has them."""
    return [text for name, value in options.items() for text in (f"--{name}", os.fspath(str(value)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How to search.

    Attributes:
        slo: promises.
        pictures: folder of what is sent.
        weights: of pictures, as `--weights` has them.
        repeats: bisections of every configuration.
        trials: of a bisection; each halves what is left.
        requests: of a trial, at least: p99 of a hundred is the second largest.
        min_seconds, max_seconds: of a trial; where `requests` would take longer there are fewer.
        probe_seconds, probe_users: of the closed loop that finds where to search.
        min_agreement: share of pixels that must have the class of the idle server's mask, and its of the library's.
        library_sample: pictures that the library segments too, to compare; 0 for none.
    """

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

    def __post_init__(self) -> None:
        check_integer("library_sample", self.library_sample, minimum=0)
        for name in ("repeats", "trials", "requests", "probe_users"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("min_seconds", "max_seconds", "probe_seconds"):
            check_number(name, getattr(self, name), minimum=1.0)

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
    weights = {pattern: float(weight) for pattern, weight in parse_pairs("weights", settings.weights).items()}
    mix = load_mix(settings.pictures, weights=weights)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="search-")))
        masks = _library_masks(configurations, checkpoint, settings, list(mix.weights), folder)
        servers = [
            stack.enter_context(Served(configuration, checkpoint, folder / str(i)))
            for i, configuration in enumerate(configurations)
        ]
        for server in servers:
            server.wait_ready()
        probes = [_probe(server, settings, own) for server, own in zip(servers, masks, strict=True)]
        for server, probe in zip(servers, probes, strict=True):
            rate, library = probe["answered_per_second"], library_of(probe)
            right = f"; masks are the library's in at least {alike(library['least'])}" if library else ""
            say(f"{server.configuration.name}: {rate:.2f}/s with {settings.probe_users} waiting users{right}")

        def try_rate(i: int, rate: float, repeat: int) -> Trial:
            trial = _try(servers[i], settings, rate, repeat, masks[i])
            p99 = "never" if trial.p99_ms is None else f"{trial.p99_ms:.0f} ms"
            for doubt in trial.doubts:
                say(f"  but perhaps because of the client: {doubt}")
            verdict = "held" if trial.held else "broke"
            say(f"repeat {repeat}, {servers[i].configuration.name}: {rate:.2f}/s {verdict}, p99 {p99}")
            return trial

        found = bisect_interleaved(
            [(_GUESS[0] * rate, _GUESS[1] * rate) for rate in (probe["answered_per_second"] for probe in probes)],
            try_rate,
            repeats=settings.repeats,
            trials=settings.trials,
        )
    devices = sorted({probe["device"] for probe in probes})
    return {
        "device": f"{', '.join(devices)} ({describe_machine()})",
        "versions": installed_versions(),
        "slo": str(settings.slo),
        "coverage": 1 - 2.0 ** (1 - settings.repeats),
        "pictures": [{"name": name, "weight": weight} for name, weight in mix.weights.items()],
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
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", "--give-up"]
        if "rate" not in options:
            command.remove("--give-up")
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
    configurations: Sequence[Configuration],
    checkpoint: Path,
    settings: SearchSettings,
    names: Sequence[str],
    folder: Path,
) -> list[Path | None]:
    """A folder of masks for each configuration; made before any server runs, which would make both slow."""
    if not settings.library_sample:
        return [None for _ in configurations]
    pictures = draw_sample(settings.pictures, names, settings.library_sample, seed=0)
    made: dict[str, Path] = {}
    found: list[Path | None] = []
    for configuration in configurations:
        inference = configuration.serving.get("inference", {})
        library = Library(
            checkpoint=checkpoint, schedule=configuration.schedule, align=configuration.align, inference=inference
        )
        key = repr((library.schedule, library.align, inference))
        if key not in made:
            made[key] = folder / f"masks-{len(made)}"
            made[key].mkdir()
            for name, png in library.masks(pictures).items():
                (made[key] / f"{name}.png").write_bytes(png)
        found.append(made[key])
    return found


def _probe(server: Served, settings: SearchSettings, masks: Path | None) -> dict[str, Any]:
    """What clients reach that wait for their answers, whose masks are compared with the library's."""
    users, seconds = settings.probe_users, round(settings.probe_seconds)
    metrics = ",".join(server.metrics)
    summary = run_locust(server, settings, masks, users=users, spawn_rate=users, run_time=seconds, metrics=metrics)
    if not summary["answered_per_second"]:
        raise RunError(f"{server.configuration.name}: answered nothing: {summary['outcomes']}")
    server.wait_idle()
    return summary


def _try(server: Served, settings: SearchSettings, rate: float, repeat: int, masks: Path | None) -> Trial:
    seconds = max(1, round(settings.trial_seconds(rate)))
    for _ in range(2):
        summary = run_locust(
            server, settings, masks, rate=rate, users=_MAX_INFLIGHT, run_time=seconds, seed=1 + repeat, metrics="none"
        )
        server.wait_idle()
        # A client that is late only adds to the latency, so what held did hold. What broke may not break again.
        if summary["valid"] or summary["held"]:
            break
    held = summary["held"]
    latency, doubts = summary["latency_ms" if held else "at_least_ms"], () if held else tuple(summary["doubts"])
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
@click.option("--repeats", default=3, show_default=True, help="Bisections of each configuration.")
@click.option("--trials", default=5, show_default=True, help="Trials of a bisection.")
@click.option("--requests", default=100, show_default=True, help="Requests of a trial at least.")
@click.option(
    "--probe-users", default=8, show_default=True, help="Users of the closed loop that finds where to search."
)
@click.option(
    "--library-sample", default=8, show_default=True, help="Pictures that the library segments too; 0: none."
)
@click.option("--min-seconds", default="10s", show_default=True, help="Of a trial.")
@click.option("--max-seconds", default="60s", show_default=True, help="Of a trial.")
@click.option("--probe-seconds", default="8s", show_default=True, help="Of the closed loop.")
@click.option("--min-agreement", default="99%", show_default=True, help="Share of the pixels of every mask.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/loadtest/search.json"), show_default=True)
def command(
    slo: str, configurations: Sequence[str], compare: str | None, checkpoint: Path, out: Path, **options: Any
) -> None:
    """Find the highest rate at which a server keeps its promises, for several configurations side by side."""
    if configurations and compare:
        raise ValueError("compare: expected without --configuration")
    chosen = [Configuration.parse(text) for text in configurations or PRESETS[compare or "merging"]]
    for name in ("min_seconds", "max_seconds", "probe_seconds"):
        options[name] = parse_seconds(name.replace("_", "-"), options[name])
    options["min_agreement"] = parse_share("min-agreement", options["min_agreement"])
    settings = SearchSettings(slo=Slo.parse(slo), **options)
    if settings.pictures == PAINTED:
        ensure_pictures(PAINTED)
    report = search(chosen, checkpoint, settings, say=lambda line: print(line, flush=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    out.with_suffix(".html").write_text(render_search(report), encoding="utf-8")
    print_table(report)
    print(f"\n{out.with_suffix('.html')}")
