"""The result of a search as one HTML file, for people."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from loadtest.slo import Slo

from .charts import Chart, Line, draw, format_value, nice_ticks
from .page import NONE, alike, fill_page, library_of, table

_COLORS = 6


def write_search_page(report: Mapping[str, Any], out: Path) -> None:
    """Write the page."""
    out.write_text(render_search(report), encoding="utf-8")


def render_search(report: Mapping[str, Any]) -> str:
    """The page: ranges side by side, every trial, and the figures."""
    coverage = f"{100 * report['coverage']:.0f}"
    head = (
        f"<h1>Highest rate that holds {escape(report['slo'])}</h1>"
        f"<p>{escape(report['device'])} · a range over repeats holds the true median in {coverage} % of all cases</p>"
    )
    rows = [
        [
            result["name"],
            f"{result['rate_per_second']:.2f}",
            f"{result['low']:.2f} to {result['high']:.2f}",
            _ratio(result["ratio_to_first"]),
            *("never" if result[name] is None else f"{result[name]:.0f}" for name in ("p50_ms", "p99_ms")),
            f"{result['closed_loop_per_second']:.2f}",
            str(result["doubtful_trials"]),
            alike(library["least"]) if (library := library_of(result)) else NONE,
        ]
        for result in report["results"]
    ]
    heads = ["configuration", "requests/s", "range", "against the first", "p50 ms", "p99 ms", "waiting users reach/s"]
    return fill_page(
        TITLE="Highest rate",
        HEAD=head,
        TILES="",
        CHARTS=f"{_ranges(report)}{draw(_trials(report))}",
        TABLES=table("In figures", [*heads, "doubtful trials", "as the library"], rows, wide=True),
        DETAILS=table("Versions", ["", ""], [list(pair) for pair in report["versions"].items()]),
    )


def _ranges(report: Mapping[str, Any]) -> str:
    top = nice_ticks(max(result["high"] for result in report["results"]))[-1]
    bars = []
    for i, result in enumerate(report["results"]):
        low, rate, high = (100 * result[name] / top for name in ("low", "rate_per_second", "high"))
        color = f"var(--c{i % _COLORS})"
        bars.append(
            f'<div class="bar"><span>{escape(result["name"])}</span><b>{result["rate_per_second"]:.2f}/s</b>'
            f'<div><i style="width:{rate:.2f}%;background:{color}"></i>'
            f'<u style="left:{low:.2f}%;width:{max(high - low, 0.4):.2f}%;border-color:{color}"></u></div></div>'
        )
    scale = f"0 to {format_value(top)} requests/s; the outline is the range"
    return (
        f"<figure><figcaption><b>Side by side</b><em>{escape(scale)}</em></figcaption>{''.join(bars)}"
        "<p>Configurations took turns, trial by trial, with the same arrivals.</p></figure>"
    )


def _trials(report: Mapping[str, Any]) -> Chart:
    right = max(trial["rate"] for result in report["results"] for trial in result["trials"])
    lines = [
        Line(
            name=result["name"] if held else "",
            points=[(trial["rate"], trial["p99_ms"]) for trial in result["trials"] if trial["held"] == held],
            color=i % _COLORS,
            style="discs" if held else "crosses",
        )
        for i, result in enumerate(report["results"])
        for held in (True, False)
    ]
    bounds = [
        (bound.told(), 1000 * bound.limit) for bound in Slo.parse(report["slo"]).bounds if bound.quantile is not None
    ]
    return Chart(
        title="Every trial",
        unit="p99 in ms over the offered rate in requests/s",
        lines=lines,
        x_max=nice_ticks(right)[-1],
        x_ticks=[(tick, format_value(tick)) for tick in nice_ticks(right)],
        bounds=bounds,
        log=True,
        note="A disc held, a cross broke; what could not be won any more ended early, at this latency or more.",
    )


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "none" if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
