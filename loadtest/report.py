"""A run as one HTML file, for people.

python -m loadtest.report REPORT.json|- [--out REPORT.html]

`-` is an output of `python -m loadtest --print-json`, such as a log of Kubernetes.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import Chart, Line, draw, format_time, format_value

_PAGE = Path(__file__).with_name("page.html")
_BLUE, _GREEN, _ORANGE, _RED, _VIOLET, _GREY = range(6)
_NONE = "\N{EN DASH}"
_FAILURES = (_RED, _ORANGE, _VIOLET, _GREY)


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
    failed = {name: number for name, number in summary["outcomes"].items() if name != "ok"}
    lines += [f"  {number} x {name}" for name, number in failed.items()]
    lines += [f"NOT VALID: {doubt}" for doubt in summary["doubts"]]
    return "\n".join(lines)


def charts_of(summary: Mapping[str, Any]) -> list[Chart]:
    """What is drawn, all over the same time but the last."""
    series, end = summary["series"], summary["elapsed_seconds"]
    at = series["at"]
    client, server = series["client"], series["server"]
    bounds = [
        (f"{check['name']} ≤ {1000 * check['limit']:g} ms", 1000 * check["limit"])
        for check in summary["checks"]
        if check["unit"] == "seconds"
    ]

    def line(name: str, values: Sequence[float | None], color: int, style: str = "line", times: Any = at) -> Line:
        return Line(name=name, points=list(zip(times, values, strict=True)), color=color, style=style)

    def seen(name: str, key: str, color: int, style: str = "line") -> Line:
        return line(name, server.get(key, []), color, style, times=server.get("at", []))

    latency = series["latency_ms"]
    good = [(x, y) for x, y, ok in series["requests"] if ok]
    failed = [(x, y) for x, y, ok in series["requests"] if not ok]
    dots = [
        Line(name="", points=good, color=_GREY, style="dots"),
        Line(name="failed" if failed else "", points=failed, color=_RED, style="dots"),
    ]
    curves = [line(name, latency[name], color) for name, color in (("p50", _GREEN), ("p90", _BLUE), ("p99", _ORANGE))]
    failures = [
        line(outcome, rates, color, "stack")
        for (outcome, rates), color in zip(series["failed"].items(), _FAILURES * 9, strict=False)
    ]
    quantiles = [(-math.log10(1 - share), ms) for share, ms in series["quantiles_ms"]]
    nines = [(0.0, "0 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %")]
    reach = quantiles[-1][0] if quantiles else 1.0
    stages = sorted(key.removeprefix("tokens_into_") for key in server if key.startswith("tokens_into_"))
    merges = sorted(key.removeprefix("merged_") for key in server if key.startswith("merged_"))
    colors = (_BLUE, _GREEN, _ORANGE, _VIOLET, _GREY) * 3
    return [
        Chart(
            title="Throughput",
            unit="requests/s",
            x_max=end,
            lines=[
                line("answered", series["answered"], _GREEN, "area"),
                line("offered", series["offered"], _BLUE),
                *([] if not failures else [line("failed", _sums(series["failed"]), _RED)]),
            ],
        ),
        Chart(
            title="Latency",
            unit="ms from when a request was due",
            x_max=end,
            lines=[*dots, *curves],
            bounds=bounds,
            log=True,
            note="A dot is a request. By the time it was due, whether or not it could be sent then.",
        ),
        Chart(title="Failures", unit="requests/s", x_max=end, lines=failures),
        Chart(
            title="In flight",
            unit="requests",
            x_max=end,
            lines=[
                line("sent, not answered (client)", client["inflight"], _BLUE, times=client["at"]),
                seen("accepted, not answered (server)", "inflight", _GREEN),
            ],
        ),
        Chart(title="Queue", unit="waiting tokens", x_max=end, lines=[seen("", "waiting_tokens", _ORANGE, "area")]),
        Chart(
            title="Tokens",
            unit="tokens/s",
            x_max=end,
            lines=[seen(f"into stage {n}", f"tokens_into_{n}", c) for n, c in zip(stages, colors, strict=False)],
            note="The fewer reach the last stage, the more has merged.",
        ),
        Chart(
            title="Merged",
            unit="share of tokens",
            x_max=end,
            percent=True,
            top=0.3,
            lines=[
                *(seen(f"after stage {n}", f"merged_{n}", c) for n, c in zip(merges, colors, strict=False)),
                seen("padding", "padding", _RED),
            ],
        ),
        Chart(
            title="Server",
            unit="cores used, and share of time computing",
            x_max=end,
            top=1.0,
            lines=[seen("cores", "cpu", _BLUE), seen("computing", "busy", _GREEN)],
        ),
        Chart(title="Server's memory", unit="MiB", x_max=end, lines=[seen("", "memory_mib", _VIOLET, "area")]),
        Chart(
            title="Client",
            unit="ms late at most, by its own clock",
            x_max=end,
            lines=[line("", client["lag_ms"], _GREY, "area", times=client["at"])],
            note=f"Must be small for the run to count. At most {100 * max(client['cpu'], default=0):.0f} % of a core.",
        ),
        Chart(
            title="Latency by share of requests",
            unit="ms",
            x_max=max(reach, 1.0),
            x_ticks=[(x, name) for x, name in nines if x <= max(reach, 1.0)],
            lines=[Line(name="", points=quantiles, color=_BLUE)],
            bounds=bounds,
        ),
    ]


def _title(summary: Mapping[str, Any]) -> str:
    settings = summary["settings"]
    return f"Load test of {settings['model']}"


def _head(summary: Mapping[str, Any]) -> str:
    settings, served = summary["settings"], summary["served"]
    if not summary["valid"]:
        verdict, css = "not valid", "doubt"
    else:
        verdict, css = ("promises kept", "good") if summary["held"] else ("promises broken", "bad")
    if settings["closed"]:
        load = f"{settings['closed']} users who wait for their answers"
    elif settings["trace"]:
        load = f"a replay of {settings['trace']} arrivals"
    else:
        rates = dict.fromkeys(f"{phase['rate']:g}" for phase in settings["phases"])
        load = f"{' → '.join(rates)} requests/s, {settings['process']}"
    served_as = ", ".join(f"{name} {value}" for name, value in served.items())
    doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in summary["doubts"])
    warned = (
        f'<div class="warning"><b>The client may be what was measured.</b><ul>{doubts}</ul></div>' if doubts else ""
    )
    return (
        f'<h1>{escape(_title(summary))} <span class="verdict {css}">{verdict}</span></h1>'
        f"<p>{escape(settings['way'])} at {escape(', '.join(settings['urls']))} · {escape(load)} · "
        f"{format_time(summary['elapsed_seconds'])} from {escape(summary['began_at'])}</p>"
        f"<p>{escape(served_as or 'the server told no metrics')}</p>{warned}"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    latency, server = summary["latency_ms"], summary["server"]
    stages = server.get("stages", {})
    first, last = (stages[min(stages)], stages[max(stages)]) if stages else ({}, {})
    merged = 1 - last["tokens_in"] / first["tokens_in"] if first.get("tokens_in") else None
    tiles = [
        ("offered", f"{summary['offered_per_second']:.2f}", "requests/s"),
        ("answered", f"{summary['answered_per_second']:.2f}", "requests/s"),
        *((name, _latency(latency[name]), "ms") for name in ("p50", "p99", "max")),
    ]
    if merged is not None:
        tiles.append(("merged on the way", f"{100 * merged:.1f}", "% of tokens"))
    if server.get("padding_share") is not None:
        tiles.append(("padding", f"{100 * server['padding_share']:.1f}", "% of tokens"))
    agreement = summary["agreement"]
    if agreement["compared"]:
        tiles.append(("masks compared", str(agreement["compared"]), f"≥ {100 * agreement['least']:.4g} % alike"))
    shown = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><em>{escape(unit)}</em></div>"
        for name, value, unit in tiles
    )
    checks = "".join(
        f'<div class="{"good" if check["kept"] else "bad"}"><span>{escape(check["name"])}</span>'
        f"<b>{escape(_value(check['value'], check['unit']))}</b>"
        f"<em>at most {escape(_value(check['limit'], check['unit']))}</em></div>"
        for check in summary["checks"]
    )
    return f'<div class="tiles checks">{checks}</div><div class="tiles">{shown}</div>'


def _tables(summary: Mapping[str, Any]) -> str:
    def rows_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        return [
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

    heads = ["requests", "failed", "p50 ms", "p99 ms", "max ms", "tokens in", "tokens out"]
    parts = [
        table("By kind", ["kind", *heads], rows_of(summary["kinds"])),
        table("By picture", ["picture", *heads], rows_of(summary["pictures"])),
        table("Outcomes", ["outcome", "requests"], [[name, str(n)] for name, n in summary["outcomes"].items()]),
    ]
    stages = summary["server"].get("stages", {})
    shown = [
        [
            name,
            _number(stage["tokens_in"]),
            _number(stage["tokens_out"]),
            _NONE if stage["merged_share"] is None else f"{100 * stage['merged_share']:.1f} %",
            _number(stage["mean_group"]),
            _number(stage["seconds"]),
        ]
        for name, stage in stages.items()
    ]
    if shown:
        heads = ["stage", "tokens in", "tokens out", "merged", "windows of a group", "seconds"]
        parts.append(table("By stage, as the server counts", heads, shown))
    steps = summary["server"].get("mean_ms", {})
    if steps:
        rows = [[name, _number(ms)] for name, ms in steps.items()]
        parts.append(table("A request in the server, mean", ["step", "ms"], rows))
    return "".join(parts)


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


def _latency(value: float | None) -> str:
    """Milliseconds, to the last."""
    return f"{value:.0f}" if value is not None and value >= 100 else _number(value)


def _number(value: float | None) -> str:
    return _NONE if value is None else format_value(value)


def _sums(failed: Mapping[str, Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*failed.values(), strict=True)]


def _read(path: Path) -> dict[str, Any]:
    if path != Path("-"):
        text = path.read_text(encoding="utf-8")
    else:
        text = ([line for line in sys.stdin if line.startswith("{")] or [""])[-1]
    try:
        summary = json.loads(text)
    except json.JSONDecodeError:
        summary = None
    if not isinstance(summary, dict) or "series" not in summary:
        raise ValueError(f"{path}: expected the JSON of a run")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description="Draw a report again.")
    parser.add_argument("report", type=Path, help="JSON of a run, or - for an output that ends with it")
    parser.add_argument("--out", type=Path, help="HTML (beside the JSON)")
    arguments = parser.parse_args()
    try:
        summary = _read(arguments.report)
        piped = arguments.report == Path("-")
        out = arguments.out or (Path("report.html") if piped else arguments.report.with_suffix(".html"))
        out.write_text(render(summary), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
