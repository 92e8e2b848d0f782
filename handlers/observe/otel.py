"""Spans recorded with OpenTelemetry's SDK; imported only where tracing is on, see `tracing`."""

from collections.abc import Mapping, Sequence
from time import monotonic, time_ns

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from handlers.api.headers import CONTEXT_HEADERS
from handlers.engine.lane import Lane

from .tracing import NO_SPAN, RequestSpan, Tracing

_PROPAGATOR = TraceContextTextMapPropagator()
_SERVER_ERROR = 500


class OpenTelemetry(Tracing):
    """Spans that go to a provider's exporter.

    Args:
        provider: samples, batches and exports them.
        model: under which name it is served.
    """

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._model = model
        self._tracer = provider.get_tracer("mpm-segmenter")

    def start(self, headers: Mapping[str, str], request_id: str, arrived: float) -> RequestSpan:
        parent = _PROPAGATOR.extract({name: headers[name] for name in CONTEXT_HEADERS if name in headers}, Context())
        epoch = time_ns() - _nanoseconds(monotonic())  # so that a clock that is set moves no step
        span = self._tracer.start_span(
            "segment",
            parent,
            kind=SpanKind.SERVER,
            attributes={"mpm.model": self._model, "mpm.request_id": request_id},
            start_time=epoch + _nanoseconds(arrived),
        )
        return _RecordedSpan(self._tracer, span, epoch) if span.is_recording() else NO_SPAN

    def close(self) -> None:
        self._provider.shutdown()


class _RecordedSpan(RequestSpan):
    def __init__(self, tracer: Tracer, span: Span, epoch: int) -> None:
        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        self._tracer = tracer
        self._span = span
        self._epoch = epoch  # nanoseconds, of the monotonic clock
        self._inside = set_span_in_context(span, Context())

    def step(self, name: str, stop: float, seconds: float) -> None:
        self._child(name, stop, seconds, self._inside)

    def stage(
        self,
        lane: Lane,
        group: tuple[int, int, int],
        lengths: Sequence[Sequence[int]],
        stop: float,
        seconds: float,
        merge_seconds: float | None,
    ) -> None:
        attributes: Attributes = {
            "mpm.schedule": lane.merger,
            "mpm.windows": len(lengths),
            "mpm.tokens.in": sum(steps[lane.stage] for steps in lengths),
            "mpm.tokens.out": sum(steps[-1] for steps in lengths),
            **dict(zip(("mpm.group.number", "mpm.group.windows", "mpm.group.requests"), group, strict=True)),
        }
        span = self._child(f"stage {lane.stage}", stop, seconds, self._inside, attributes)
        if merge_seconds is not None:
            self._child("merge", stop, merge_seconds, set_span_in_context(span, self._inside))

    def end(self, code: int) -> None:
        self._span.set_attribute("http.response.status_code", code)
        if code >= _SERVER_ERROR:
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._epoch + _nanoseconds(monotonic()))

    def _child(self, name: str, stop: float, seconds: float, parent: Context, attributes: Attributes = None) -> Span:
        start = self._epoch + _nanoseconds(stop - seconds)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start)
        span.end(self._epoch + _nanoseconds(stop))
        return span


def start_exporting(kind: str, model: str) -> OpenTelemetry:
    """Tracing with an exporter, "otlp" or "console", and all else as the environment says."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: model}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_make_exporter(kind)))
    return OpenTelemetry(provider, model)


def _make_exporter(kind: str) -> SpanExporter:
    if kind == "otlp":
        return OTLPSpanExporter()
    return ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")


def _nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)
