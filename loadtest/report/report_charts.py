"""What is drawn of a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .charts import Chart, Line, Point

_BLUE, _GREEN, _ORANGE, _RED, _VIOLET, _GREY = range(6)
_FAILURES = (_RED, _ORANGE, _VIOLET, _GREY, _BLUE)
_LANES = (_BLUE, _GREEN, _ORANGE, _VIOLET, _GREY)
_NINES = ((0.0, "0 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %"))


def charts_of(summary: Mapping[str, Any]) -> list[Chart]:
    """All over the same time but the last."""
    series, end = summary["series"], summary["elapsed_seconds"]
    bounds = [
        (f"{check['name']} ≤ {1000 * check['limit']:g} ms", 1000 * check["limit"])
        for check in summary["checks"]
        if check["unit"] == "seconds"
    ]
    return [
        *_request_charts(series, end, bounds),
        _in_flight(series, end),
        *_token_charts(series["server"], end),
        *_machine_charts(series["server"], series.get("memory"), end),
        _client(series["client"], end),
        _by_share(series["quantiles_ms"], bounds),
    ]


def _line(name: str, at: Sequence[float], values: Sequence[float | None], color: int, style: str = "line") -> Line:
    return Line(name=name, points=list(zip(at, values, strict=True)), color=color, style=style)


def _seen(server: Mapping[str, Any], name: str, key: str, color: int, style: str = "line") -> Line:
    """Of the server's metrics; empty where it tells none."""
    return _line(name, server.get("at", []), server.get(key, []), color, style)


def _request_charts(series: Mapping[str, Any], end: float, bounds: Sequence[tuple[str, float]]) -> Iterator[Chart]:
    at, failed = series["at"], series["failed"]
    throughput = [
        _line("answered", at, series["answered"], _GREEN, "area"),
        _line("offered", at, series["offered"], _BLUE),
    ]
    if failed:
        throughput.append(_line("failed", at, [sum(rates) for rates in zip(*failed.values(), strict=True)], _RED))
    yield Chart(title="Throughput", unit="requests/s", x_max=end, lines=throughput)
    yield Chart(
        title="Latency",
        unit="ms from when a request was due",
        x_max=end,
        lines=[*_dots(series["requests"]), *_quantiles(at, series["latency_ms"])],
        bounds=bounds,
        log=True,
        note="A dot is a request. By the time it was due, whether or not it could be sent then.",
    )
    failures = [
        _line(outcome, at, rates, color, "stack")
        for (outcome, rates), color in zip(failed.items(), _FAILURES * 9, strict=False)
    ]
    yield Chart(title="Failures", unit="requests/s", x_max=end, lines=failures)


def _dots(requests: Sequence[tuple[float, float, bool]]) -> list[Line]:
    good: list[Point] = [(x, y) for x, y, ok in requests if ok]
    failed: list[Point] = [(x, y) for x, y, ok in requests if not ok]
    return [
        Line(name="", points=good, color=_GREY, style="dots"),
        Line(name="failed" if failed else "", points=failed, color=_RED, style="dots"),
    ]


def _quantiles(at: Sequence[float], latency_ms: Mapping[str, Sequence[float | None]]) -> list[Line]:
    colors = {"p50": _GREEN, "p90": _BLUE, "p99": _ORANGE}
    return [_line(name, at, latency_ms[name], color) for name, color in colors.items()]


def _in_flight(series: Mapping[str, Any], end: float) -> Chart:
    client = series["client"]
    return Chart(
        title="In flight",
        unit="requests",
        x_max=end,
        lines=[
            _line("sent, not answered (client)", client["at"], client["inflight"], _BLUE),
            _seen(series["server"], "accepted, not answered (server)", "inflight", _GREEN),
        ],
    )


def _token_charts(server: Mapping[str, Any], end: float) -> Iterator[Chart]:
    yield Chart(
        title="Queue", unit="waiting tokens", x_max=end, lines=[_seen(server, "", "waiting_tokens", _ORANGE, "area")]
    )
    yield Chart(
        title="Tokens",
        unit="tokens/s",
        x_max=end,
        lines=list(_by_stage(server, "into stage", "tokens_into_")),
        note="The fewer reach the last stage, the more has merged.",
    )
    yield Chart(
        title="Merged",
        unit="share of tokens",
        x_max=end,
        percent=True,
        top=0.3,
        lines=[*_by_stage(server, "after stage", "merged_"), _seen(server, "padding", "padding", _RED)],
    )


def _by_stage(server: Mapping[str, Any], what: str, prefix: str) -> Iterator[Line]:
    stages = sorted(key.removeprefix(prefix) for key in server if key.startswith(prefix))
    for stage, color in zip(stages, _LANES * 3, strict=False):
        yield _seen(server, f"{what} {stage}", f"{prefix}{stage}", color)


def _machine_charts(server: Mapping[str, Any], memory: Mapping[str, Any] | None, end: float) -> Iterator[Chart]:
    yield Chart(
        title="Server",
        unit="cores used, and share of time computing",
        x_max=end,
        top=1.0,
        lines=[_seen(server, "cores", "cpu", _BLUE), _seen(server, "computing", "busy", _GREEN)],
    )
    engine = _seen(server, "", "memory_mib", _VIOLET, "area")
    yield Chart(title="Memory of the process that computes", unit="MiB", x_max=end, lines=[engine])
    if memory:
        processes = [
            _line(name, memory["at"], mib, color, "stack")
            for (name, mib), color in zip(memory["mib"].items(), _LANES * 3, strict=False)
        ]
        yield Chart(title="Memory of all processes", unit="MiB, one on the other", x_max=end, lines=processes)


def _client(client: Mapping[str, Any], end: float) -> Chart:
    return Chart(
        title="Client",
        unit="ms late at most, by its own clock",
        x_max=end,
        lines=[_line("", client["at"], client["lag_ms"], _GREY, "area")],
        note=f"Must be small for the run to count. At most {100 * max(client['cpu'], default=0):.0f} % of a core.",
    )


def _by_share(quantiles_ms: Sequence[tuple[float, float]], bounds: Sequence[tuple[str, float]]) -> Chart:
    points: list[Point] = [(-math.log10(1 - share), ms) for share, ms in quantiles_ms]
    reach = max(points[-1][0] if points else 1.0, 1.0)
    return Chart(
        title="Latency by share of requests",
        unit="ms",
        x_max=reach,
        x_ticks=[(x, name) for x, name in _NINES if x <= reach],
        lines=[Line(name="", points=points, color=_BLUE)],
        bounds=bounds,
    )
