"""A run, or a search, as one HTML file that opens offline."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jinja2

from .charts import run_charts, search_charts

NONE = "\N{EN DASH}"
_FOLDER = Path(__file__).parent
_UPLOT = ("uPlot.iife.min.js", "uPlot.min.css")


def write_report(summary: Mapping[str, Any], out: Path) -> None:
    """Write the page, and the figures beside it as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    out.write_text(render(summary), encoding="utf-8")


def render(summary: Mapping[str, Any]) -> str:
    """The page of a run."""
    settings = summary["settings"]
    verdict = ("promises kept", "good") if summary["held"] else ("promises broken", "bad")
    head = (
        f"{settings['protocol']} at {', '.join(settings['hosts'])} · {_load(settings)} · "
        f"{_duration(summary['elapsed_seconds'])} from {summary['began_at']}"
    )
    served = ", ".join(f"{name} {value}" for name, value in summary["served"].items())
    return _page(
        title=f"Load test of {settings['model']}",
        verdict=verdict if summary["valid"] else ("not valid", "doubt"),
        lines=[head, served or "the server has no metrics"],
        doubts=summary["doubts"],
        checks=[
            {
                "name": check["name"],
                "value": _value(check["value"], check["unit"]),
                "limit": _value(check["limit"], check["unit"]),
                "css": "good" if check["kept"] else "bad",
            }
            for check in summary["checks"]
        ],
        tiles=list(_tiles(summary)),
        charts=run_charts(summary),
        tables=list(_tables(summary)),
        details={
            "promises": summary["slo"],
            "client": summary["client"],
            **{f"version of {name}": version for name, version in summary["versions"].items()},
            **{name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
        },
    )


def render_search(report: Mapping[str, Any]) -> str:
    """The page of a search: ranges side by side, every trial, and the figures."""
    results = report["results"]
    top = max(result["high"] for result in results) or 1.0
    coverage = f"a range over repeats holds the true median in {100 * report['coverage']:.0f} % of all cases"
    heads = ["configuration", "requests/s", "range", "against the first", "p50 ms", "p99 ms", "waiting users reach/s"]
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
        for result in results
    ]
    return _page(
        title=f"Highest rate that holds {report['slo']}",
        lines=[f"{report['device']} · {coverage}"],
        bars=[
            {
                "name": result["name"],
                "rate": result["rate_per_second"],
                "color": i % 6,
                "width": 100 * result["rate_per_second"] / top,
                "low": 100 * result["low"] / top,
                "range": max(100 * (result["high"] - result["low"]) / top, 0.4),
            }
            for i, result in enumerate(results)
        ],
        charts=search_charts(report),
        tables=[_table("In figures", [*heads, "doubtful trials", "as the library"], rows) | {"wide": True}],
        details=report["versions"],
    )


def _page(**content: Any) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True)
    script, css = ((_FOLDER / "uplot" / name).read_text(encoding="utf-8") for name in _UPLOT)
    return environment.get_template("page.html").render(**content, uplot_js=script, uplot_css=css)


def told(summary: Mapping[str, Any]) -> str:
    """The run in a few lines of text."""
    latency = summary["latency_ms"]
    lines = [
        f"{summary['requests']} requests, {summary['offered_per_second']:.2f}/s offered, "
        f"{summary['answered_per_second']:.2f}/s answered; "
        + ", ".join(f"{name} {_ms(latency[name])}" for name in ("p50", "p90", "p99", "max"))
    ]
    for check in summary["checks"]:
        value, limit = (_value(check[name], check["unit"]) for name in ("value", "limit"))
        lines.append(f"{'kept  ' if check['kept'] else 'BROKEN'} {check['name']}: {value}, promised at most {limit}")
    if library := library_of(summary):
        share = f"in at least {alike(library['least'])} of the pixels"
        lines.append(f"       {library['compared']} pictures from the idle server have the library's masks, {share}")
    else:
        lines.append("       not compared with the library's masks: no checkpoint was named")
    if not summary.get("memory"):
        lines.append("       memory of all of the server's processes: not watched")
    if replicas := summary.get("replicas"):
        shares = ", ".join(f"{row['name']} {100 * row['share']:.0f} %" for row in replicas)
        lines.append(f"       answered by: {shares}")
    lines += [f"  {number} x {name}" for name, number in summary["outcomes"].items() if name != "ok"]
    lines += [f"NOT VALID: {doubt}" for doubt in summary["doubts"]]
    return "\n".join(lines)


def _load(settings: Mapping[str, Any]) -> str:
    if settings["trace"]:
        return f"a replay of {settings['trace']} arrivals"
    if not settings["phases"]:
        return "users that wait for their answers"
    rates = dict.fromkeys(f"{phase['rate']:g}" for phase in settings["phases"])
    return f"{' → '.join(rates)} requests/s, {settings['arrivals']}"


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Names, values and units."""
    latency, server = summary["latency_ms"], summary["server"]
    yield "offered", f"{summary['offered_per_second']:.2f}", "requests/s"
    yield "answered", f"{summary['answered_per_second']:.2f}", "requests/s"
    for name in ("p50", "p99", "max"):
        yield name, _latency(latency[name]), "ms"
    stages = server.get("stages", {})
    if stages and (first := stages[min(stages)]["tokens_in"]):
        yield "merged", f"{100 * (1 - stages[max(stages)]['tokens_in'] / first):.1f}", "% of tokens"
    if server.get("padding_share") is not None:
        yield "padding", f"{100 * server['padding_share']:.1f}", "% of tokens"
    if (agreement := summary["agreement"])["compared"]:
        yield "as when idle", str(agreement["compared"]), f"≥ {alike(agreement['least'])} alike"
    if library := library_of(summary):
        yield "as the library", str(library["compared"]), f"≥ {alike(library['least'])} alike"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"title": title, "heads": heads, "rows": rows}


def _tables(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    stages, steps = (summary["server"].get(name, {}) for name in ("stages", "mean_ms"))
    yield _request_table("By kind", "kind", summary["kinds"])
    yield _request_table("By picture", "picture", summary["pictures"])
    yield _table("Outcomes", ["outcome", "requests"], [[name, str(n)] for name, n in summary["outcomes"].items()])
    if replicas := summary.get("replicas"):
        rows = [[row["name"], f"{row['requests']:.0f}", f"{100 * row['share']:.1f} %"] for row in replicas]
        yield _table("By replica", ["replica", "requests", "share"], rows)
    if stages:
        heads = ["stage", "tokens in", "tokens out", "merged", "windows of a group", "seconds"]
        rows = [
            [
                name,
                *(_number(stage[key]) for key in ("tokens_in", "tokens_out")),
                NONE if stage["merged_share"] is None else f"{100 * stage['merged_share']:.1f} %",
                *(_number(stage[key]) for key in ("mean_group", "seconds")),
            ]
            for name, stage in stages.items()
        ]
        yield _table("By stage, as the server counts", heads, rows)
    if steps:
        yield _table(
            "A request in the server, mean", ["step", "ms"], [[name, _number(ms)] for name, ms in steps.items()]
        )


def _request_table(title: str, what: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            row["name"],
            str(row["requests"]),
            str(row["failed"]),
            *(_latency(row["latency_ms"][name]) for name in ("p50", "p99", "max")),
            *(_number(row[name]) for name in ("tokens_in", "tokens_out")),
        ]
        for row in found
    ]
    return _table(title, [what, "requests", "failed", "p50 ms", "p99 ms", "max ms", "tokens in", "tokens out"], rows)


def alike(share: float) -> str:
    """A share of equal pixels, rounded down: what is not quite the same must not look so."""
    return f"{math.floor(10_000 * share + 1e-6) / 100:g} %"


def library_of(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The comparison with the library; None where nothing was compared."""
    library: Mapping[str, Any] = summary.get("library", {})
    return library if library.get("compared") else None


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "none" if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


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
    """Three significant digits."""
    if value is None:
        return NONE
    if abs(value) >= 1e4:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{round(seconds, 1):g} s" if seconds < 120 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _read(path: Path) -> dict[str, Any]:
    lines = [path.read_text(encoding="utf-8")] if path != Path("-") else [x for x in sys.stdin if x.startswith("{")]
    try:
        summary = json.loads((lines or [""])[-1])
    except json.JSONDecodeError:
        summary = None
    if not isinstance(summary, dict) or "series" not in summary:
        raise ValueError(f"{path}: expected the JSON of a run")
    return summary


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML file (beside the JSON).")
def command(report: Path, out: Path | None) -> None:
    """Draw a run's page again, from its JSON; - reads a log that ends with it, as `--report -` prints it."""
    summary = _read(report)
    out = out or (Path("report.html") if report == Path("-") else report.with_suffix(".html"))
    out.write_text(render(summary), encoding="utf-8")
    click.echo(out)
