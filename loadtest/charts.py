"""What is drawn of a run and of a search: charts as data, which uPlot draws in the page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .slo import Slo

Chart = dict[str, Any]
Line = dict[str, Any]
_BLUE, _GREEN, _ORANGE, _RED, _VIOLET, _GREY = range(6)
_FAILURES = (_RED, _ORANGE, _VIOLET, _GREY, _BLUE)
_LANES = (_BLUE, _GREEN, _ORANGE, _VIOLET, _GREY)


def chart(title: str, unit: str, lines: Sequence[Line], **more: Any) -> Chart:
    """A chart over time.

    Args:
        unit: of y. lines: see `line`. more: `note`; `bounds`, names and values of horizontal lines; `log`; `percent`;
        `top`, the least upper end of y;
            `x`: "time" in seconds (default), "nines", or "number".
    """
    shown = [each for each in lines if any(y is not None for y in each["y"])]
    return {"title": title, "unit": unit, "lines": shown, "x": "time", "bounds": [], "note": ""} | more


def line(name: str, x: Sequence[float], y: Sequence[float | None], color: int, style: str = "line") -> Line:
    """A series: no y is a gap; the style is line, area, stack (on the stacks before it), dots, discs or rings."""
    return {"name": name, "x": list(x), "y": list(y), "color": color, "style": style}


def run_charts(summary: Mapping[str, Any]) -> list[Chart]:
    """Charts of a run, all over the same time but the last; those that show nothing are left out."""
    series = summary["series"]
    bounds = [
        [f"{check['name']} ≤ {1000 * check['limit']:g} ms", 1000 * check["limit"]]
        for check in summary["checks"]
        if check["unit"] == "seconds"
    ]
    charts = [
        *_request_charts(series, bounds),
        *_server_charts(series["server"], series["client"]),
        *_machine_charts(series["server"], series.get("memory")),
        *_client_charts(series["client"]),
        _by_share(series["quantiles_ms"], bounds),
    ]
    return [each for each in charts if each["lines"]]


def search_charts(report: Mapping[str, Any]) -> list[Chart]:
    """Every trial of a search: latency over the offered rate."""
    lines = []
    for i, result in enumerate(report["results"]):
        for held, style in ((True, "discs"), (False, "rings")):
            trials = sorted((trial["rate"], trial["p99_ms"]) for trial in result["trials"]
                            if trial["held"] == held and trial["p99_ms"] is not None)  # fmt: skip
            lines.append(
                line(result["name"] if held else "", [x for x, _ in trials], [y for _, y in trials], i % 6, style)
            )
    bounds = [
        [str(bound), 1000 * bound.limit] for bound in Slo.parse(report["slo"]).bounds if bound.quantile is not None
    ]
    note = "A disc held, a ring broke; a trial that was lost ended early, at this latency or more."
    unit = "p99 in ms over the offered rate in requests/s"
    return [chart("Every trial", unit, lines, bounds=bounds, log=True, x="number", note=note)]


def _request_charts(series: Mapping[str, Any], bounds: Sequence[Sequence[Any]]) -> Iterator[Chart]:
    at, failed = series["at"], series["failed"]
    throughput = [
        line("answered", at, series["answered"], _GREEN, "area"),
        line("offered", at, series["offered"], _BLUE),
    ]
    if failed:
        throughput.append(line("failed", at, [sum(rates) for rates in zip(*failed.values(), strict=True)], _RED))
    yield chart("Throughput", "requests/s", throughput)
    dots = []
    for good, name, color in ((True, "", _GREY), (False, "failed", _RED)):
        points = [(x, y) for x, y, ok in series["requests"] if ok == good]
        dots.append(line(name, [x for x, _ in points], [y for _, y in points], color, "dots"))
    quantiles = {"p50": _GREEN, "p90": _BLUE, "p99": _ORANGE}
    yield chart(
        "Latency",
        "ms from when a request was due",
        [*dots, *(line(name, at, series["latency_ms"][name], color) for name, color in quantiles.items())],
        bounds=bounds,
        log=True,
        note="A dot is a request, at the time when it was due, whether or not it could be sent then.",
    )
    failures = zip(failed.items(), _FAILURES * 9, strict=False)
    yield chart("Failures", "requests/s", [line(name, at, rates, color, "stack") for (name, rates), color in failures])


def _seen(server: Mapping[str, Any], name: str, key: str, color: int, style: str = "line") -> Line:
    """Of the server's metrics; empty where it has none."""
    return line(name, server.get("at", []), server.get(key, []), color, style)


def _server_charts(server: Mapping[str, Any], client: Mapping[str, Any]) -> Iterator[Chart]:
    sent = line("sent, not answered (client)", client["at"], client["inflight"], _BLUE)
    accepted = _seen(server, "accepted, not answered (server)", "inflight", _GREEN)
    yield chart("In flight", "requests", [sent, accepted])
    yield chart("Queue", "waiting tokens", [_seen(server, "", "waiting_tokens", _ORANGE, "area")])
    tokens = list(_by_stage(server, "into stage", "tokens_into_"))
    yield chart("Tokens", "tokens/s", tokens, note="The fewer reach the last stage, the more were merged.")
    merged = [*_by_stage(server, "after stage", "merged_"), _seen(server, "padding", "padding", _RED)]
    yield chart("Merged", "share of tokens", merged, percent=True, top=0.3)


def _by_stage(server: Mapping[str, Any], what: str, prefix: str) -> Iterator[Line]:
    stages = sorted(key.removeprefix(prefix) for key in server if key.startswith(prefix))
    for stage, color in zip(stages, _LANES * 3, strict=False):
        yield _seen(server, f"{what} {stage}", f"{prefix}{stage}", color)


def _machine_charts(server: Mapping[str, Any], memory: Mapping[str, Any] | None) -> Iterator[Chart]:
    used = [_seen(server, "cores", "cpu", _BLUE), _seen(server, "computing", "busy", _GREEN)]
    yield chart("Server", "cores used, and share of time computing", used, top=1.0)
    yield chart("Memory of the process that computes", "MiB", [_seen(server, "", "memory_mib", _VIOLET, "area")])
    if memory:
        found = zip(memory["mib"].items(), _LANES * 3, strict=False)
        processes = [line(name, memory["at"], mib, color, "stack") for (name, mib), color in found]
        yield chart("Memory of all processes", "MiB, stacked", processes)


def _client_charts(client: Mapping[str, Any]) -> Iterator[Chart]:
    note = f"Must be small for the run to count. At most {100 * max(client['cpu'], default=0):.0f} % of a core."
    lag = line("", client["at"], client["lag_ms"], _GREY, "area")
    yield chart("Client", "ms late at most, by its own clock", [lag], note=note)


def _by_share(quantiles_ms: Sequence[tuple[float, float]], bounds: Sequence[Sequence[Any]]) -> Chart:
    nines = [-math.log10(1 - share) for share, _ in quantiles_ms]
    curve = line("", nines, [ms for _, ms in quantiles_ms], _BLUE)
    return chart("Latency by share of requests", "ms", [curve], bounds=bounds, x="nines")
