"""What watching costs: the seconds spent counting and timing, and in samples, while an engine is busy.

Differences of 0.5 % drown in the noise of throughput, so the calls themselves are timed: nothing else of the engine
knows of metrics. Each timing adds its own cost, and `released` counts its `waiting` twice, so the share is an upper
bound. A scrape's time is until its answer is there, others' work included. Samples are forced, and what one costs is
scaled to the configured minimum under load.

`--difference` measures the throughput itself, which takes minutes to tell half a per cent: one engine answers the same
few pictures over and over, with everything counted and scraped each second, and with nothing, in turns; samples are
left out, because one in a thousand pictures falls into hardly any turn. `--traced` has the watched turns record spans
too, and export them to nowhere.
"""

import argparse
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

from handlers.api.options import RequestOptions
from handlers.api.replies import SegmentReply
from handlers.config import ServingConfig
from handlers.engine.engine import Engine
from handlers.engine.loading import load_engine
from handlers.launch.processes import free_port
from handlers.observe.metrics import Metrics
from handlers.observe.tracing import Tracing

_OBSERVED = ("answered", "replied", "waiting", "released", "computed", "agreed")
_INFLIGHT = 8
_TURN_PICTURES = 8
_DIFFERENT_PICTURES = 8


class _Stopwatch:
    """Adds up the processor time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def wrap(self, method: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            method(*args, **kwargs)
            self.seconds += time.thread_time() - start
            self.calls += 1

        return timed


def measure(checkpoint: Path, images: Path, seconds: float) -> dict[str, float]:
    """Shares of an engine's time under constant load."""
    pictures = [path.read_bytes() for path in sorted(images.glob("*.jpg"))]
    if not pictures:
        raise ValueError(f"images: expected a folder with .jpg files, got {images}")
    port = free_port()
    config = ServingConfig(metrics_port=port, agreement_fraction=0.05, agreement_min_fraction=0.05)
    engine = load_engine(checkpoint.parent, config)
    watch = _Stopwatch()
    for name in _OBSERVED:
        setattr(engine.metrics, name, watch.wrap(getattr(engine.metrics, name)))
    scrapes: list[float] = []
    try:
        _load(engine, pictures, 3, None)  # warm
        watch.seconds, watch.calls = 0.0, 0
        processor = time.process_time()
        start = time.monotonic()
        count = _load(engine, pictures, seconds, lambda: scrapes.append(_scrape(port)))
        wall, processor = time.monotonic() - start, time.process_time() - processor
    finally:
        engine.close()
    merged, reference = (_seconds_per_token(engine.metrics, schedule) for schedule in ("2,5", "off"))
    least = ServingConfig().agreement_min_fraction
    return {
        "pictures": count,
        "pictures_per_second": count / wall,
        "calls_per_picture": watch.calls / count,
        "counting_us_per_picture": 1e6 * watch.seconds / count,
        "counting_share_of_processor": watch.seconds / processor,
        "scrape_ms": 1e3 * sorted(scrapes)[len(scrapes) // 2],
        "device_seconds_without_over_with_merging": reference / merged,
        "sampling_share_under_load": least * reference / merged,
    }


class _Unwatched:
    """Takes what an engine reports, and forgets it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def measure_difference(checkpoint: Path, images: Path, seconds: float, *, traced: bool) -> dict[str, float]:
    """Throughput of one engine while it is watched, over that while it is not, in turns of the same pictures."""
    pictures = [path.read_bytes() for path in sorted(images.glob("*.jpg"))][:_DIFFERENT_PICTURES]
    if not pictures:
        raise ValueError(f"images: expected a folder with .jpg files, got {images}")
    port = free_port()
    engine = load_engine(checkpoint.parent, ServingConfig(metrics_port=port, agreement_fraction=0))
    metrics, unwatched = engine.metrics, _Unwatched()
    tracing = _record_for_nobody() if traced else Tracing()
    taken: dict[str, list[float]] = {"watched": [], "unwatched": []}
    watching, ended = threading.Event(), threading.Event()

    def scrape_each_second() -> None:
        while not ended.wait(1):
            if watching.is_set():
                _scrape(port)

    scraper = threading.Thread(target=scrape_each_second)
    scraper.start()
    try:
        _take_turn(engine, pictures, Tracing())  # warm
        start = time.monotonic()
        for turn in count():
            if time.monotonic() > start + seconds and turn % 2 == 0:
                break
            way = "watched" if turn % 4 in (0, 3) else "unwatched"  # a drift of the machine falls on both alike
            if way == "watched":
                engine.metrics = metrics
                watching.set()
            else:
                engine.metrics = unwatched  # type: ignore[assignment]
                watching.clear()
            taken[way].append(_take_turn(engine, pictures, tracing if way == "watched" else Tracing()))
    finally:
        ended.set()
        scraper.join()
        engine.metrics = metrics
        engine.close()
        tracing.close()
    # Neighbours in pairs: one cost of watching each.
    costs = [1 - b / a for a, b in zip(taken["watched"], taken["unwatched"], strict=True)]
    low, median, high = statistics.quantiles(costs, n=4)
    return {
        "turns": len(costs),
        "pictures_per_turn": _TURN_PICTURES,
        "unwatched_pictures_per_second": _TURN_PICTURES / statistics.median(taken["unwatched"]),
        "cost_median": median,
        "cost_quartile_low": low,
        "cost_quartile_high": high,
        "cost_standard_error": statistics.stdev(costs) / len(costs) ** 0.5,
        "cost_of_all_turns": 1 - sum(taken["unwatched"]) / sum(taken["watched"]),
    }


def _take_turn(engine: Engine, pictures: list[bytes], tracing: Tracing) -> float:
    """Seconds until as many pictures as a turn has are answered, some of them always in flight."""
    start = time.monotonic()
    waiting = list[Future[SegmentReply]]()
    for i in range(_TURN_PICTURES):
        if len(waiting) == _INFLIGHT:
            waiting.pop(0).result()
        span = tracing.start({}, f"bench-{i}", time.monotonic())
        answer = engine.submit(pictures[i % len(pictures)], RequestOptions(request_id=f"bench-{i}"), span)
        waiting.append(answer)
    for answer in waiting:
        answer.result()
    return time.monotonic() - start


def _record_for_nobody() -> Tracing:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    from handlers.observe.otel import OpenTelemetry

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return OpenTelemetry(provider, "bench")


def _load(engine: Engine, pictures: list[bytes], seconds: float, each_second: Callable[[], None] | None) -> int:
    """Keep some requests in flight; returns how many were answered."""
    start = ticked = time.monotonic()
    sent, waiting = 0, list[Future[SegmentReply]]()
    while time.monotonic() < start + seconds:
        while len(waiting) < _INFLIGHT:
            options = RequestOptions(request_id=f"bench-{sent}")
            waiting.append(engine.submit(pictures[sent % len(pictures)], options))
            sent += 1
        waiting.pop(0).result()
        if each_second is not None and time.monotonic() > ticked + 1:
            each_second()
            ticked = time.monotonic()
    for answer in waiting:
        answer.result()
    return sent


def _scrape(port: int) -> float:
    """Seconds until the answer is there, the work of others included."""
    start = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        response.read()
    return time.monotonic() - start


def _seconds_per_token(metrics: Metrics, schedule: str) -> float:
    """Device seconds of whole pictures over their tokens before merging."""
    seconds = tokens = 0.0
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.labels.get("schedule") != schedule:
                continue
            if sample.name == "mpm_stage_seconds_sum":
                seconds += sample.value
            if sample.name == "mpm_tokens_total" and sample.labels["point"] == "in" and sample.labels["stage"] == "0":
                tokens += sample.value
    return seconds / tokens


def add_command(commands: Any) -> None:
    """Add `observation` to the commands of `python -m handlers.bench`."""
    _add_arguments(commands.add_parser("observation", help="what metrics and samples of agreement cost"))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder with .jpg files")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--difference", action="store_true", help="measure throughput with and without, in turns")
    parser.add_argument("--traced", action="store_true", help="with --difference: record spans too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    measured = (arguments.checkpoint, arguments.images, arguments.seconds)
    found = measure_difference(*measured, traced=arguments.traced) if arguments.difference else measure(*measured)
    print(json.dumps(found, indent=2))
    return 0
