"""What operators watch: counts and times of one engine, for Prometheus.

Every engine has a registry of its own and serves it on a port of its own, so several in one process, or one after
the other on the same port, never mix. Times are seconds, and everything else is counted in what its name says.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from handlers.engine.lane import Lane
from handlers.engine.request import Group

logger = logging.getLogger(__name__)

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_MERGE_SECONDS = (50e-6, 100e-6, 250e-6, 500e-6, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_GROUP_WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_AGREEMENT = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 1)

_CAPACITY_BUSY_SECONDS = 30.0  # of device time, over which the capacity is averaged
_KNOWN_GROUPS, _KNOWN_BUSY_SECONDS = 8, 5.0  # the first ones compile
_MAX_EXEMPLAR = 100  # characters of a request id; OpenMetrics allows 128 for the whole exemplar
_REBIND_SECONDS = 0.5


@dataclass(slots=True)
class _LaneMetrics:
    """The metrics of one stage of one merger, looked up once."""

    stage_seconds: Histogram
    tokens_in: Counter
    tokens_out: Counter
    tokens_per_window: Histogram
    group_windows: Histogram
    group_wait_seconds: Histogram
    waiting_windows: Gauge
    merge_seconds: Histogram | None = None  # only of stages that merged


class Metrics:
    """The metrics of one engine. Thread-safe.

    Args:
        model: under which name it is served; a label of every metric.
        grid: patches along one side of a window; lengths are counted in steps of its rows.
        info: what is served and on what: labels of `mpm_model_info`.
    """

    def __init__(self, model: str, *, grid: int, info: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._patches_of_window = grid * grid
        ProcessCollector(registry=self.registry)

        self._requests = self._make(Counter, "mpm_requests", "Requests answered, by HTTP status", "code")
        self._images = self._bound(Counter, "mpm_images", "Pictures answered with a mask or a view")
        self._windows = self._bound(Counter, "mpm_windows", "Windows of those pictures")
        self._request_seconds = self._bound(
            Histogram, "mpm_request_seconds", "From the arrival of a request to its answer", _REQUEST_SECONDS
        )
        steps = {
            "decode": "Decoding a picture and cutting it into windows, waiting for a thread included",
            "queue": "What a picture's windows waited between decoding and their last stage",
            "labels": "From logits to the label of every pixel",
            "encode": "From labels to the bytes of an answer",
        }
        self._steps = {
            step: self._bound(Histogram, f"mpm_{step}_seconds", help, _STEP_SECONDS) for step, help in steps.items()
        }
        lane = ("stage", "schedule")
        self._stage_seconds = self._make(
            Histogram,
            "mpm_stage_seconds",
            "One group in one stage, its merge included; on a stream its part of the device's time",
            *lane,
            buckets=_STEP_SECONDS,
        )
        self._merge_seconds = self._make(
            Histogram, "mpm_merge_seconds", "The merge that ends a stage, of one group", *lane, buckets=_MERGE_SECONDS
        )
        self._tokens = self._make(
            Counter, "mpm_tokens", "Image tokens into and out of a stage, padding left out", "point", *lane
        )
        rows = grid * -(-grid // 16)
        self._tokens_per_window = self._make(
            Histogram,
            "mpm_tokens_per_window",
            "Image tokens of a window into a stage",
            *lane,
            buckets=(*range(rows, grid * grid, rows), grid * grid),
        )
        self._padding = self._bound(Counter, "mpm_padding_tokens", "Tokens computed for padding alone")
        self._group_windows = self._make(
            Histogram, "mpm_group_windows", "Windows computed together", *lane, buckets=_GROUP_WINDOWS
        )
        self._group_wait = self._make(
            Histogram,
            "mpm_group_wait_seconds",
            "What the longest waiting window of a group waited for it",
            *lane,
            buckets=_STEP_SECONDS,
        )
        release = self._make(
            Counter, "mpm_group_release", "Groups by why they were released: full, delay or idle", "reason"
        )
        self._released = {reason: release.labels(model, reason) for reason in ("full", "delay", "idle")}
        self._waiting_windows = self._make(Gauge, "mpm_waiting_windows", "Windows waiting for a stage", *lane)
        self._waiting_tokens = self._bound(Gauge, "mpm_waiting_tokens", "Tokens of all waiting windows")
        self._capacity = self._bound(
            Gauge,
            "mpm_capacity_tokens_per_second",
            "Tokens of pictures, before merging, per second of a device that is always busy, as measured lately",
        )
        self._inflight = self._bound(Gauge, "mpm_inflight_requests", "Requests accepted and not yet answered")
        self._inflight_bytes = self._bound(
            Gauge, "mpm_inflight_bytes", "What pictures hold, and what decoding and encoding them takes just now"
        )
        self._agreement = self._bound(
            Histogram,
            "mpm_agreement_ratio",
            "Share of a sampled picture's pixels that have the same label with and without merging",
            _AGREEMENT,
        )
        self._agreement_pixels = self._make(
            Counter,
            "mpm_agreement_pixels",
            "Pixels of sampled pictures by their class without merging, and whether merging kept it",
            "class",
            "outcome",
        )
        self._make(Gauge, "mpm_model_info", "What is served, and on what", *info).labels(model, *info.values()).set(1)
        self._lanes: dict[Lane, _LaneMetrics] = {}
        self._requests_by_code: dict[int, Counter] = {}
        self.capacity = 0.0  # tokens per second; 0 until enough was measured to refuse anything by it
        self._num_finished = 0  # groups
        self._busy_seconds = self._finished_tokens = 0.0  # both fade, so that their ratio follows the load

    def serve(self, host: str, port: int, description: bytes = b"{}") -> Callable[[], None]:
        """Answer `GET /metrics`, and `GET /info` with a description of the model in JSON; returns what stops it.

        While the port is taken it is tried again: a new version of a model starts before the old one ends, and
        nobody should go without masks for want of metrics.
        """
        stopped = threading.Event()

        def serve() -> None:
            warned = False
            while not stopped.is_set():
                try:
                    server, thread = start_http_server(port, host, self.registry)
                    break
                except OSError as error:
                    if not warned:
                        logger.warning("metrics_port: cannot listen on %s:%d yet: %s", host, port, error.strerror)
                    warned = True
                    stopped.wait(_REBIND_SECONDS)
            else:
                return
            server.set_app(_describing(description, server.get_app()))
            stopped.wait()
            server.shutdown()
            server.server_close()
            thread.join()

        keeper = threading.Thread(target=serve, name="metrics", daemon=True)
        keeper.start()

        def stop() -> None:
            stopped.set()
            keeper.join()

        return stop

    def watch_inflight(self, count: Callable[[], int], size: Callable[[], int]) -> None:
        self._inflight.set_function(count)
        self._inflight_bytes.set_function(size)

    def expect(self, lanes: Iterable[Lane]) -> None:
        """Show these lanes at zero, so that `rate` sees the first windows in them."""
        for lane in lanes:
            self._lane(lane)

    def answered(self, code: int, seconds: float, request_id: str, trace_id: str = "") -> None:
        """A request has ended; 499 if it was cancelled. Without a trace_id, none is recorded."""
        counter = self._requests_by_code.get(code)
        if counter is None:
            counter = self._requests_by_code[code] = self._requests.labels(self._model, str(code))
        counter.inc()
        exemplar = {"trace_id": trace_id} if trace_id else {"request_id": request_id}
        fits = trace_id or len(request_id) <= _MAX_EXEMPLAR
        self._request_seconds.observe(seconds, exemplar if fits else None)

    def replied(self, num_windows: int, seconds: Mapping[str, float]) -> None:
        """A picture got its answer: its windows, and the seconds of each step."""
        self._images.inc()
        self._windows.inc(num_windows)
        for step, histogram in self._steps.items():
            histogram.observe(seconds[step])

    def waiting(self, lane: Lane, windows: int, tokens: int) -> None:
        """So many windows of a lane, with so many tokens, began to wait; fewer than 0 ceased to."""
        self._lane(lane).waiting_windows.inc(windows)
        self._waiting_tokens.inc(tokens)

    def released(self, group: Group, now: float) -> None:
        """A group is about to run."""
        windows = group.windows
        self.waiting(group.lane, -len(windows), -sum(window.length for window in windows))
        lane = self._lane(group.lane)
        lane.group_windows.observe(len(windows))
        lane.group_wait_seconds.observe(now - min(window.entered for window in windows))
        self._released[group.reason].inc()

    def computed(
        self,
        lane: Lane,
        tokens_in: Sequence[int],
        tokens_out: int,
        seconds: float,
        merge_seconds: float | None,
        *,
        padding_tokens: int = 0,
    ) -> None:
        """A stage is through.

        Args:
            lane: the stage.
            tokens_in: image tokens of each window into it.
            tokens_out: image tokens of all windows out of it.
            seconds: of the whole device that it took, its merge included: half of those on one of two streams.
            merge_seconds: the same of its merge; None where none was timed.
            padding_tokens: that the runtime added to fill its buckets or buffers.
        """
        metrics = self._lane(lane)
        metrics.stage_seconds.observe(seconds)
        metrics.tokens_in.inc(sum(tokens_in))
        metrics.tokens_out.inc(tokens_out)
        self._padding.inc(padding_tokens)
        for tokens in tokens_in:
            metrics.tokens_per_window.observe(tokens)
        self._busy_seconds += seconds
        if merge_seconds is not None:
            if metrics.merge_seconds is None:
                labels = (self._model, str(lane.stage), lane.merger)
                metrics.merge_seconds = self._merge_seconds.labels(*labels)
            metrics.merge_seconds.observe(merge_seconds)
        if lane.merges:  # pictures are done after the last stage
            return
        self._finished_tokens += len(tokens_in) * self._patches_of_window
        capacity = self._finished_tokens / self._busy_seconds
        self._capacity.set(capacity)
        self._num_finished += 1
        if self._num_finished >= _KNOWN_GROUPS and self._busy_seconds >= _KNOWN_BUSY_SECONDS:
            self.capacity = capacity
        if self._busy_seconds > _CAPACITY_BUSY_SECONDS:
            self._busy_seconds /= 2
            self._finished_tokens /= 2

    def agreed(self, ratio: float, pixels: Iterable[tuple[str, int, int]]) -> None:
        """A sampled picture was computed both ways: per class its name, and its pixels kept and changed."""
        self._agreement.observe(ratio)
        for name, kept, changed in pixels:
            self._agreement_pixels.labels(self._model, name, "kept").inc(kept)
            self._agreement_pixels.labels(self._model, name, "changed").inc(changed)

    def _lane(self, lane: Lane) -> _LaneMetrics:
        found = self._lanes.get(lane)
        if found is None:
            labels = (str(lane.stage), lane.merger)
            found = self._lanes[lane] = _LaneMetrics(
                self._stage_seconds.labels(self._model, *labels),
                self._tokens.labels(self._model, "in", *labels),
                self._tokens.labels(self._model, "out", *labels),
                self._tokens_per_window.labels(self._model, *labels),
                self._group_windows.labels(self._model, *labels),
                self._group_wait.labels(self._model, *labels),
                self._waiting_windows.labels(self._model, *labels),
            )
        return found

    def _make(self, kind: Any, name: str, help: str, *labels: str, **options: Any) -> Any:
        return kind(name, help, ("model", *labels), registry=self.registry, **options)

    def _bound(self, kind: Any, name: str, help: str, buckets: Sequence[float] = ()) -> Any:
        """A metric without labels but the model's."""
        return self._make(kind, name, help, **({"buckets": buckets} if buckets else {})).labels(self._model)


def _describing(description: bytes, metrics: Any) -> Any:
    """A WSGI application that describes the model at /info, and is that of the metrics elsewhere."""

    def answer(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/info":
            return metrics(environ, start_response)
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(description)))])
        return [description]

    return answer
