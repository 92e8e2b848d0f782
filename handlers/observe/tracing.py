"""Spans of requests for OpenTelemetry; off, and nothing of it imported, unless the environment says where they go.

A request is one span, a child of the client's own where a W3C `traceparent` came with it, and its steps are children
of that. A group serves several requests: each gets a span of its own for it, with the group's number and size, so
nobody's trace tells of anybody else's. Steps are reported when they are through, with their times.

The variables are the standard's: OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER (otlp, console) turn spans on,
OTEL_SDK_DISABLED off; sampling, headers, batching and resource are read by the SDK itself.
"""

import os
from collections.abc import Mapping, Sequence

from handlers.engine.lane import Lane

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


class RequestSpan:
    """What one request did and when. This one is not recorded; all its methods return at once.

    Times are those of `time.monotonic`. Thread-safe.

    Attributes:
        trace_id: 32 hexadecimal digits; empty where nothing is recorded.
    """

    trace_id = ""

    def step(self, name: str, stop: float, seconds: float) -> None:
        """A step is through."""

    def stage(
        self,
        lane: Lane,
        group: tuple[int, int, int],
        lengths: Sequence[Sequence[int]],
        stop: float,
        seconds: float,
        merge_seconds: float | None,
    ) -> None:
        """A group that held windows of the request is through a stage.

        Args:
            lane: the stage.
            group: its number, its windows and its requests.
            lengths: of each of this request's windows in it, image tokens at the start and after each merge so far.
            stop: when it ended.
            seconds: that it took, its merge included.
            merge_seconds: that its merge took, at its end; None for the last stage.
        """

    def end(self, code: int) -> None:
        """The request got its answer, with an HTTP status."""


NO_SPAN = RequestSpan()


class Tracing:
    """Starts the spans of requests. This one starts none."""

    def start(self, headers: Mapping[str, str], request_id: str, arrived: float) -> RequestSpan:
        """Start the span of a request; a `traceparent` that is not valid is as good as none.

        Args:
            headers: of the request, by lower-case name.
            request_id: names it.
            arrived: when it came, on the clock of `time.monotonic`.
        """
        return NO_SPAN

    def close(self) -> None:
        """Send what has ended and is not sent yet."""


def make_tracing(model: str) -> Tracing:
    """Tracing as the environment asks for it; none, and of no cost, where it asks for nothing.

    Args:
        model: under which name it is served; also the name of the service where the environment gives none.

    Raises:
        ValueError: a variable asks for what isn't there.
    """
    kind = _exporter_kind(os.environ)
    if kind is None:
        return Tracing()
    try:
        from .otel import start_exporting
    except ImportError:
        raise ValueError(
            "tracing: the environment asks for it, but opentelemetry is not installed; "
            "install this project with its extra `tracing`"
        ) from None
    return start_exporting(kind, model)


def _exporter_kind(environment: Mapping[str, str]) -> str | None:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    kind = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    if not kind:  # the standard's default is otlp; ours is to be asked
        kind = "otlp" if any(environment.get(name) for name in _ENDPOINTS) else "none"
    if kind not in ("otlp", "console", "none"):
        raise ValueError(f"OTEL_TRACES_EXPORTER: expected otlp, console or none, got {kind[:40]!r}")
    if kind == "otlp":
        name = next((name for name in _PROTOCOLS if environment.get(name)), None)
        if name is not None and environment[name] != _PROTOCOL:
            raise ValueError(f"{name}: expected {_PROTOCOL}, got {environment[name][:40]!r}")
    return None if kind == "none" else kind
