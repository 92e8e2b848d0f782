"""What is drawn of a run: charts as data, which uPlot draws in the page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Chart = dict[str, Any]
Line = dict[str, Any]
_BLUE, _GREEN, _ORANGE, _RED, _VIOLET, _GREY = range(6)
_FAILURES = (_RED, _ORANGE, _VIOLET, _GREY, _BLUE)
_LANES = (_BLUE, _GREEN, _ORANGE, _VIOLET, _GREY)


def run_charts(summary: Mapping[str, Any]) -> list[Chart]:
    """Charts of a run, all over the same time but the last; those that show nothing are left out."""
    return [chart for chart in _charts(summary["series"], summary["checks"]) if chart["lines"]]


def _chart(title: str, unit: str, lines: Sequence[Line], **more: Any) -> Chart:
    """A chart over time; `unit` is that of y, `bounds` are names and values of horizontal lines."""
    shown = [each for each in lines if any(y is not None for y in each["y"])]
    return {"title": title, "unit": unit, "lines": shown, "x": "time", "bounds": [], "note": ""} | more


def _line(name: str, x: Sequence[float], y: Sequence[float | None], color: int, style: str = "line") -> Line:
    """A series: no y is a gap; the style is line, area, stack (on the stacks before it) or dots."""
    return {"name": name, "x": list(x), "y": list(y), "color": color, "style": style}


def _charts(series: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    bounds = [
        [f"{check['name']} ≤ {1000 * check['limit']:g} ms", 1000 * check["limit"]]
        for check in checks
        if check["unit"] == "seconds"
    ]
    server, client, memory = series["server"], series["client"], series.get("memory")

    def seen(name: str, key: str, color: int, style: str = "line") -> Line:
        """Of the server's metrics; empty where it has none."""
        return _line(name, server.get("at", []), server.get(key, []), color, style)

    def by_stage(what: str, prefix: str) -> list[Line]:
        stages = sorted(key.removeprefix(prefix) for key in server if key.startswith(prefix))
        return [
            seen(f"{what} {stage}", prefix + stage, color) for stage, color in zip(stages, _LANES * 3, strict=False)
        ]

    at, failed = series["at"], series["failed"]
    throughput = [
        _line("answered", at, series["answered"], _GREEN, "area"),
        _line("offered", at, series["offered"], _BLUE),
    ]
    if failed:
        throughput.append(_line("failed", at, [sum(rates) for rates in zip(*failed.values(), strict=True)], _RED))
    yield _chart("Throughput", "requests/s", throughput)
    latency = []
    for good, name, color in ((True, "", _GREY), (False, "failed", _RED)):
        points = [(x, y) for x, y, ok in series["requests"] if ok == good]
        latency.append(_line(name, [x for x, _ in points], [y for _, y in points], color, "dots"))
    for name, color in (("p50", _GREEN), ("p90", _BLUE), ("p99", _ORANGE)):
        latency.append(_line(name, at, series["latency_ms"][name], color))
    note = "A dot is a request, at the time when it was due, whether or not it could be sent then."
    yield _chart("Latency", "ms from when a request was due", latency, bounds=bounds, log=True, note=note)
    failures = zip(failed.items(), _FAILURES * 9, strict=False)
    yield _chart(
        "Failures", "requests/s", [_line(name, at, rates, color, "stack") for (name, rates), color in failures]
    )
    sent = _line("sent, not answered (client)", client["at"], client["inflight"], _BLUE)
    yield _chart("In flight", "requests", [sent, seen("accepted, not answered (server)", "inflight", _GREEN)])
    yield _chart("Queue", "waiting tokens", [seen("", "waiting_tokens", _ORANGE, "area")])
    note = "The fewer reach the last stage, the more were merged."
    yield _chart("Tokens", "tokens/s", by_stage("into stage", "tokens_into_"), note=note)
    merged = [*by_stage("after stage", "merged_"), seen("padding", "padding", _RED)]
    yield _chart("Merged", "share of tokens", merged, percent=True, top=0.3)
    used = [seen("cores", "cpu", _BLUE), seen("computing", "busy", _GREEN)]
    yield _chart("Server", "cores used, and share of time computing", used, top=1.0)
    yield _chart("Memory of the process that computes", "MiB", [seen("", "memory_mib", _VIOLET, "area")])
    if memory:
        yield _chart("Memory of all processes", "MiB", [_line("", memory["at"], memory["mib"], _VIOLET, "area")])
    note = f"Must be small for the run to count. At most {100 * max(client['cpu'], default=0):.0f} % of a core."
    lag = _line("", client["at"], client["lag_ms"], _GREY, "area")
    yield _chart("Client", "ms late at most, by its own clock", [lag], note=note)
    nines = [-math.log10(1 - share) for share, _ in series["quantiles_ms"]]
    curve = _line("", nines, [ms for _, ms in series["quantiles_ms"]], _BLUE)
    yield _chart("Latency by share of requests", "ms", [curve], bounds=bounds, x="nines")
