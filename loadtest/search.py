"""The highest rate at which a server keeps its promises; several configurations side by side.

    python -m loadtest.search --slo p99=800ms,errors=0.1% [--configuration "schedule=off"] [--configuration "..."]

Every repeat is a bisection of its own, with arrivals of its own. The result is the median of the repeats, and the
range from the least to the greatest of them holds the true median with the probability that the JSON calls
`coverage`: 1 - 2^(1 - repeats), whatever the distribution. All servers run from the beginning to the end, take turns
trial by trial, and in each repeat get the same arrivals: what disturbs the machine disturbs all of them.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checking import check_integer, check_number, check_share, parse_seconds, parse_share
from .client.pictures import load_mix
from .client.shapes import steady
from .machine import describe_machine, installed_versions
from .options import parse_weights, typed
from .preparing import PAINTED, Library, draw_sample, ensure_painted, library_masks
from .report.page import alike, library_of
from .report.search_page import write_search_page
from .report.summary import Limits, summarize
from .running import RunError, run_load
from .settings import LoadSettings
from .sizing.bisection import Trial, bisect_interleaved, summarize_search
from .sizing.servers import MODEL, Configuration, Served
from .slo import Slo

PRESETS = {
    "merging": ("schedule=off", "schedule=2,5"),
    "align": ("align=1", "align=8", "align=16"),
    "runtime": ("runtime=torch", "runtime=openvino"),
    "server": ("way=torchserve", "way=triton", "way=triton-grpc"),
    "replicas": ("replicas=1", "replicas=2"),
}

_GUESS = (0.2, 1.1)  # of what waiting clients reach: between there most promises break


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How to search.

    Attributes:
        slo: promises.
        pictures: folder of what is sent.
        weights: of pictures, by patterns of file names.
        repeats: bisections of every configuration.
        trials: of a bisection; each halves what is left.
        requests: of a trial, at least: p99 of a hundred is the second largest.
        min_seconds: of a trial.
        max_seconds: of a trial; at rates so low that `requests` would take longer there are fewer.
        probe_seconds: of the closed loop that finds where to search.
        probe_users: of that loop.
        max_inflight: requests.
        timeout_seconds: of a request.
        min_agreement: share of pixels that must have the class of the idle server's mask, and its of the library's.
        library_sample: pictures that the library segments too, to compare; 0 for none.
    """

    slo: Slo
    pictures: Path
    weights: dict[str, float] = field(default_factory=dict)
    repeats: int = 3
    trials: int = 5
    requests: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 60.0
    probe_seconds: float = 8.0
    probe_users: int = 8
    max_inflight: int = 512
    timeout_seconds: float = 60.0
    min_agreement: float = 0.99
    library_sample: int = 8

    def __post_init__(self) -> None:
        check_share("min_agreement", self.min_agreement)
        check_integer("library_sample", self.library_sample, minimum=0)
        for name in ("repeats", "trials", "requests", "probe_users", "max_inflight"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("min_seconds", "max_seconds", "probe_seconds", "timeout_seconds"):
            check_number(name, getattr(self, name), above=True)

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
    mix = load_mix(settings.pictures, shares={}, weights=settings.weights, seed=0)
    masks = _library_masks(configurations, checkpoint, settings, list(mix.weights))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="search-")))
        servers = [
            stack.enter_context(Served(configuration, checkpoint, folder / str(i)))
            for i, configuration in enumerate(configurations)
        ]
        for server in servers:
            server.wait_ready(mix.pictures[0])
        probes = [_probe(server, settings, own) for server, own in zip(servers, masks, strict=True)]
        for server, probe in zip(servers, probes, strict=True):
            rate, library = probe["answered_per_second"], library_of(probe)
            right = f"; masks are the library's in at least {alike(library['least'])}" if library else ""
            say(f"{server.configuration.name}: {rate:.2f}/s with {settings.probe_users} waiting users{right}")

        def try_rate(i: int, rate: float, repeat: int) -> Trial:
            trial = _try(servers[i], settings, rate, repeat, masks[i])
            p99 = "never" if trial.p99_ms is None else f"{trial.p99_ms:.0f} ms"
            verdict = "held" if trial.held else "broke"
            for doubt in trial.doubts:
                say(f"  but perhaps because of the client: {doubt}")
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
                "configuration": configuration.as_dict(),
                "name": configuration.name,
                **summarize_search(bisections, found[0]),
                "closed_loop_per_second": round(probe["answered_per_second"], 4),
                "library": probe["library"],
            }
            for configuration, bisections, probe in zip(configurations, found, probes, strict=True)
        ],
    }


def _load(server: Served, settings: SearchSettings, rate: float, seconds: float, **more: Any) -> LoadSettings:
    return LoadSettings(
        way=server.configuration.way,
        urls=tuple(server.urls),
        model=MODEL,
        pictures=str(settings.pictures.resolve()),
        weights=settings.weights,
        phases=steady(rate, seconds),
        max_inflight=settings.max_inflight,
        timeout_seconds=settings.timeout_seconds,
        min_agreement=settings.min_agreement,
        **more,
    )


def _library_masks(
    configurations: Sequence[Configuration], checkpoint: Path, settings: SearchSettings, names: Sequence[str]
) -> list[Mapping[str, str]]:
    """For each configuration; before any server runs, which would make both slow."""
    if not settings.library_sample:
        return [{} for _ in configurations]
    pictures = draw_sample(settings.pictures, names, settings.library_sample, seed=0)
    made: dict[str, Mapping[str, str]] = {}
    found = []
    for configuration in configurations:
        inference = configuration.serving.get("inference", {})
        library = Library(
            checkpoint=checkpoint, schedule=configuration.schedule, align=configuration.align, inference=inference
        )
        if str(library) not in made:
            made[str(library)] = library_masks(library, pictures)
        found.append(made[str(library)])
    return found


def _probe(server: Served, settings: SearchSettings, masks: Mapping[str, str]) -> dict[str, Any]:
    """What clients reach that wait for their answers, whose masks the library's are held against."""
    load = _load(server, settings, 1.0, settings.probe_seconds, closed=settings.probe_users, library=masks)
    try:
        summary = summarize(load, run_load(load, metrics=server.metrics), Limits(slo=settings.slo))
    except RunError as error:
        raise RunError(f"{server.configuration.name}: {error}") from None
    if not summary["answered_per_second"]:
        raise RunError(f"{server.configuration.name}: answered nothing: {summary['outcomes']}")
    server.wait_idle()
    return summary


def _try(server: Served, settings: SearchSettings, rate: float, repeat: int, masks: Mapping[str, str]) -> Trial:
    seconds = settings.trial_seconds(rate)
    load = _load(server, settings, rate, seconds, seed=1 + repeat, give_up=str(settings.slo), library=masks)
    for _ in range(2):
        summary = summarize(load, run_load(load), Limits(slo=settings.slo))
        server.wait_idle()
        # A client that is late only adds to the latency, so what held did hold. What broke may not break again.
        if summary["valid"] or summary["held"]:
            break
    held = summary["held"]
    latency, doubts = summary["latency_ms" if held else "at_least_ms"], () if held else tuple(summary["doubts"])
    return Trial(rate, held, latency["p50"], latency["p99"], summary["requests"], doubts)


def print_table(report: dict[str, Any]) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.configuration and arguments.compare:
            raise ValueError("compare: expected without --configuration")
        texts = arguments.configuration or PRESETS[arguments.compare or "merging"]
        configurations = [Configuration.parse(text) for text in texts]
        settings = _settings(arguments)
        if arguments.pictures is None:
            ensure_painted(PAINTED)
        report = search(configurations, arguments.checkpoint, settings, say=lambda line: print(line, flush=True))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_search_page(report, arguments.out.with_suffix(".html"))
    except (OSError, ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    print_table(report)
    print(f"\n{arguments.out.with_suffix('.html')}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.search", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slo", required=True, help="such as p99=800ms,errors=0.1%%")
    parser.add_argument(
        "--configuration",
        action="append",
        metavar="'NAME=VALUE ...'",
        help="way, schedule, align, replicas, or a field of the served model; repeat to compare",
    )
    parser.add_argument("--compare", choices=list(PRESETS), help="configurations that are often compared (merging)")
    parser.add_argument("--checkpoint", type=Path, default=Path("model_store/demo/checkpoint.pth"))
    parser.add_argument("--pictures", type=Path, help=f"a folder of pictures (painted ones in {PAINTED})")
    parser.add_argument("--weights", default="", metavar="PATTERN=NUMBER,...", help="how often files are sent (1)")
    for name, default, help in (
        ("repeats", 3, "bisections of each"),
        ("trials", 5, "of a bisection"),
        ("requests", 100, "of a trial at least"),
        ("probe-users", 8, "of the closed loop that finds where to search"),
        ("library-sample", 8, "pictures whose masks have to be the library's; 0 for none"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} ({default})")
    for name, seconds, help in (
        ("min-seconds", "10", "of a trial"),
        ("max-seconds", "60", "of a trial"),
        ("probe-seconds", "8", "of that loop"),
    ):
        parser.add_argument(f"--{name}", type=typed(parse_seconds), default=seconds, help=f"{help} ({seconds})")
    parser.add_argument(
        "--min-agreement",
        type=typed(parse_share),
        default=0.99,
        metavar="SHARE",
        help="of pixels, of every mask (99%%)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/loadtest/search.json"))
    return parser


def _settings(arguments: argparse.Namespace) -> SearchSettings:
    return SearchSettings(
        slo=Slo.parse(arguments.slo),
        pictures=arguments.pictures or PAINTED,
        weights=parse_weights(arguments.weights),
        repeats=arguments.repeats,
        trials=arguments.trials,
        requests=arguments.requests,
        probe_users=arguments.probe_users,
        min_seconds=arguments.min_seconds,
        max_seconds=arguments.max_seconds,
        probe_seconds=arguments.probe_seconds,
        min_agreement=arguments.min_agreement,
        library_sample=arguments.library_sample,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started has to be stopped
    sys.exit(main())
