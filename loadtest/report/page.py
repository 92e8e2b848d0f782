"""A run as one HTML file, for people."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import draw, format_time, format_value
from .report_charts import charts_of

_PAGE = Path(__file__).with_name("page.html")
NONE = "\N{EN DASH}"


def write_report(summary: Mapping[str, Any], out: Path) -> None:
    """Write the page, and the figures beside it as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    out.write_text(render(summary), encoding="utf-8")


def render(summary: Mapping[str, Any]) -> str:
    """The page."""
    return fill_page(
        TITLE=escape(_title(summary)),
        HEAD=_head(summary),
        TILES=_tiles(summary),
        CHARTS="".join(draw(chart) for chart in charts_of(summary)),
        TABLES=_tables(summary),
        DETAILS=_details(summary),
    )


def fill_page(**parts: str) -> str:
    """The empty page with HTML in its places."""
    page = _PAGE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def told(summary: Mapping[str, Any]) -> str:
    """The run in a few lines of text."""
    latency = summary["latency_ms"]
    lines = [
        f"{summary['requests']} requests, {summary['offered_per_second']:.2f}/s offered, "
        f"{summary['answered_per_second']:.2f}/s answered; "
        + ", ".join(f"{name} {_ms(latency[name])}" for name in ("p50", "p90", "p99", "max")),
        *(_told_check(check) for check in summary["checks"]),
    ]
    library = library_of(summary)
    lines.append(
        f"       {library['compared']} pictures from the idle server have the library's masks, "
        f"in at least {alike(library['least'])} of the pixels"
        if library
        else "       not held against the library's masks: no checkpoint was named"
    )
    if not summary.get("memory"):
        lines.append("       memory of all of the server's processes: not watched")
    if replicas := summary.get("replicas"):
        shares = ", ".join(f"{row['name']} {100 * row['share']:.0f} %" for row in replicas)
        lines.append(f"       who answered: {shares}")
    failed = {name: number for name, number in summary["outcomes"].items() if name != "ok"}
    lines += [f"  {number} x {name}" for name, number in failed.items()]
    lines += [f"NOT VALID: {doubt}" for doubt in summary["doubts"]]
    return "\n".join(lines)


def _title(summary: Mapping[str, Any]) -> str:
    settings = summary["settings"]
    return f"Load test of {settings['model']}"


def _head(summary: Mapping[str, Any]) -> str:
    settings, served = summary["settings"], summary["served"]
    if not summary["valid"]:
        verdict, css = "not valid", "doubt"
    else:
        verdict, css = ("promises kept", "good") if summary["held"] else ("promises broken", "bad")
    served_as = ", ".join(f"{name} {value}" for name, value in served.items())
    doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in summary["doubts"])
    warned = (
        f'<div class="warning"><b>The client may be what was measured.</b><ul>{doubts}</ul></div>' if doubts else ""
    )
    return (
        f'<h1>{escape(_title(summary))} <span class="verdict {css}">{verdict}</span></h1>'
        f"<p>{escape(settings['way'])} at {escape(', '.join(settings['urls']))} · {escape(_load(settings))} · "
        f"{format_time(summary['elapsed_seconds'])} from {escape(summary['began_at'])}</p>"
        f"<p>{escape(served_as or 'the server told no metrics')}</p>{warned}"
    )


def _load(settings: Mapping[str, Any]) -> str:
    if settings["closed"]:
        return f"{settings['closed']} users who wait for their answers"
    if settings["trace"]:
        return f"a replay of {settings['trace']} arrivals"
    rates = dict.fromkeys(f"{phase['rate']:g}" for phase in settings["phases"])
    return f"{' → '.join(rates)} requests/s, {settings['process']}"


def _tiles(summary: Mapping[str, Any]) -> str:
    checks = "".join(
        f'<div class="{"good" if check["kept"] else "bad"}"><span>{escape(check["name"])}</span>'
        f"<b>{escape(_value(check['value'], check['unit']))}</b>"
        f"<em>at most {escape(_value(check['limit'], check['unit']))}</em></div>"
        for check in summary["checks"]
    )
    shown = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><em>{escape(unit)}</em></div>"
        for name, value, unit in _tile_texts(summary)
    )
    return f'<div class="tiles checks">{checks}</div><div class="tiles">{shown}</div>'


def _tile_texts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What stands on each: a name, a value, its unit."""
    latency, server = summary["latency_ms"], summary["server"]
    yield "offered", f"{summary['offered_per_second']:.2f}", "requests/s"
    yield "answered", f"{summary['answered_per_second']:.2f}", "requests/s"
    for name in ("p50", "p99", "max"):
        yield name, _latency(latency[name]), "ms"
    stages = server.get("stages", {})
    if stages and (first := stages[min(stages)]["tokens_in"]):
        merged = 1 - stages[max(stages)]["tokens_in"] / first
        yield "merged", f"{100 * merged:.1f}", "% of tokens"
    if server.get("padding_share") is not None:
        yield "padding", f"{100 * server['padding_share']:.1f}", "% of tokens"
    agreement = summary["agreement"]
    if agreement["compared"]:
        yield "as when idle", str(agreement["compared"]), f"≥ {alike(agreement['least'])} alike"
    if library := library_of(summary):
        yield "as the library", str(library["compared"]), f"≥ {alike(library['least'])} alike"


def _tables(summary: Mapping[str, Any]) -> str:
    stages, steps = (summary["server"].get(name, {}) for name in ("stages", "mean_ms"))
    parts = [
        _request_table("By kind", "kind", summary["kinds"]),
        _request_table("By picture", "picture", summary["pictures"]),
        table("Outcomes", ["outcome", "requests"], [[name, str(n)] for name, n in summary["outcomes"].items()]),
    ]
    if replicas := summary.get("replicas"):
        rows = [[row["name"], f"{row['requests']:.0f}", f"{100 * row['share']:.1f} %"] for row in replicas]
        parts.append(table("By replica", ["replica", "requests", "share"], rows))
    if stages:
        parts.append(_stage_table(stages))
    if steps:
        rows = [[name, _number(ms)] for name, ms in steps.items()]
        parts.append(table("A request in the server, mean", ["step", "ms"], rows))
    return "".join(parts)


def _request_table(title: str, what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [what, "requests", "failed", "p50 ms", "p99 ms", "max ms", "tokens in", "tokens out"]
    cells = [
        [
            row["name"],
            str(row["requests"]),
            str(row["failed"]),
            *(_latency(row["latency_ms"][name]) for name in ("p50", "p99", "max")),
            _number(row["tokens_in"]),
            _number(row["tokens_out"]),
        ]
        for row in rows
    ]
    return table(title, heads, cells)


def _stage_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["stage", "tokens in", "tokens out", "merged", "windows of a group", "seconds"]
    cells = [
        [
            name,
            _number(stage["tokens_in"]),
            _number(stage["tokens_out"]),
            NONE if stage["merged_share"] is None else f"{100 * stage['merged_share']:.1f} %",
            _number(stage["mean_group"]),
            _number(stage["seconds"]),
        ]
        for name, stage in stages.items()
    ]
    return table("By stage, as the server counts", heads, cells)


def _details(summary: Mapping[str, Any]) -> str:
    told = {
        "promises": summary["slo"],
        "client": summary["client"],
        **{f"version of {name}": version for name, version in summary["versions"].items()},
        **{
            name: value if isinstance(value, str) else json.dumps(value) for name, value in summary["settings"].items()
        },
    }
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in told.items())
    return f"<table>{rows}</table>"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = False) -> str:
    """Text in rows under their heads."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    css = ' class="wide"' if wide else ""
    return f"<section{css}><h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table></section>"


def _told_check(check: Mapping[str, Any]) -> str:
    value, limit = (_value(check[name], check["unit"]) for name in ("value", "limit"))
    return f"{'kept  ' if check['kept'] else 'BROKEN'} {check['name']}: {value}, promised at most {limit}"


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "none" if unit != "seconds" else "never"
    if unit == "seconds":
        return _ms(1000 * value)
    return f"{100 * value:.3g} %" if unit == "share" else f"{value:g}"


def _ms(value: float | None) -> str:
    if value is None:
        return "never"
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{_latency(value)} ms"


def alike(share: float) -> str:
    """Rounded down: what is not quite the same must not look so."""
    return f"{math.floor(10_000 * share + 1e-6) / 100:g} %"


def library_of(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """None where nothing was compared, or the JSON is older than that."""
    library: Mapping[str, Any] = summary.get("library", {})
    return library if library.get("compared") else None


def _latency(value: float | None) -> str:
    """Milliseconds, to the last."""
    return f"{value:.0f}" if value is not None and value >= 100 else _number(value)


def _number(value: float | None) -> str:
    return NONE if value is None else format_value(value)
