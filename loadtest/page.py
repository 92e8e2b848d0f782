"""A run as one HTML file that opens offline."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jinja2

from .charts import run_charts

_NONE = "\N{EN DASH}"
_FOLDER = Path(__file__).parent


def write_report(summary: Mapping[str, Any], out: Path) -> None:
    """Write the page, and the figures beside it as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    out.write_text(render(summary), encoding="utf-8")


def render(summary: Mapping[str, Any]) -> str:
    """The page of a run."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True)
    environment.filters["value"] = _value
    settings = summary["settings"]
    verdict = ("promises kept", "good") if summary["held"] else ("promises broken", "bad")
    return environment.get_template("page.html").render(
        title=f"Load test of {settings['model']}",
        verdict=verdict if summary["valid"] else ("not valid", "doubt"),
        head=f"{settings['protocol']} at {', '.join(settings['hosts'])} · {_load(settings)} · "
        f"{_duration(summary['elapsed_seconds'])} from {summary['began_at']}",
        served=", ".join(f"{name} {value}" for name, value in summary["served"].items()),
        doubts=summary["doubts"],
        checks=summary["checks"],
        tiles=list(_tiles(summary)),
        charts=run_charts(summary),
        tables=[table for table in _tables(summary) if table[2]],
        details={
            "promises": summary["slo"],
            "client": summary["client"],
            **{f"version of {name}": version for name, version in summary["versions"].items()},
            **{name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()},
        },
        uplot_js=(_FOLDER / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        uplot_css=(_FOLDER / "uplot" / "uPlot.min.css").read_text(encoding="utf-8"),
    )


def told(summary: Mapping[str, Any]) -> str:
    """The run in a few lines of text."""
    latency = summary["latency_ms"]
    lines = [
        f"{summary['requests']} requests, {summary['offered_per_second']:.2f}/s offered, "
        f"{summary['answered_per_second']:.2f}/s answered; "
        + ", ".join(f"{name} {_value(latency[name], 'ms')}" for name in ("p50", "p90", "p99", "max"))
    ]
    for check in summary["checks"]:
        value, limit = (_value(check[name], check["unit"]) for name in ("value", "limit"))
        lines.append(f"{'kept  ' if check['kept'] else 'BROKEN'} {check['name']}: {value}, promised at most {limit}")
    if library := library_of(summary):
        share = f"in at least {alike(library['least'])} of the pixels"
        lines.append(f"       {library['compared']} pictures from the idle server have the library's masks, {share}")
    else:
        lines.append("       not compared with the library's masks: --library-masks named none")
    if not summary.get("memory"):
        lines.append("       memory of all of the server's processes: not watched")
    if replicas := summary.get("replicas"):
        lines.append(
            "       answered by: " + ", ".join(f"{row['name']} {100 * row['share']:.0f} %" for row in replicas)
        )
    lines += [f"  {number} x {name}" for name, number in summary["outcomes"].items() if name != "ok"]
    lines += [f"NOT VALID: {doubt}" for doubt in summary["doubts"]]
    return "\n".join(lines)


def _load(settings: Mapping[str, Any]) -> str:
    rates = dict.fromkeys(f"{phase['rate']:g}" for phase in settings["phases"])
    arrivals = f"{' → '.join(rates)} requests/s, {settings['arrivals']}"
    return arrivals if rates else "users that wait for their answers"


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Names, values and units."""
    latency, server = summary["latency_ms"], summary["server"]
    for name in ("offered", "answered"):
        yield name, f"{summary[f'{name}_per_second']:.2f}", "requests/s"
    for name in ("p50", "p99", "max"):
        yield name, _number(latency[name]), "ms"
    stages = server.get("stages", {})
    if stages and (first := stages[min(stages)]["tokens_in"]):
        yield "merged", f"{100 * (1 - stages[max(stages)]['tokens_in'] / first):.1f}", "% of tokens"
    if server.get("padding_share") is not None:
        yield "padding", f"{100 * server['padding_share']:.1f}", "% of tokens"
    for name, compared in (("as when idle", summary["agreement"]), ("as the library", library_of(summary))):
        if compared and compared["compared"]:
            yield name, str(compared["compared"]), f"≥ {alike(compared['least'])} alike"


def _tables(summary: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """Titles, headings and rows."""
    for what in ("kind", "picture"):
        rows = [
            [
                *(str(row[key]) for key in ("name", "requests", "failed")),
                *(_number(row["latency_ms"][name]) for name in ("p50", "p99", "max")),
                *(_number(row[name]) for name in ("tokens_in", "tokens_out")),
            ]
            for row in summary[f"{what}s"]
        ]
        yield f"By {what}", [what, "requests", "failed", "p50 ms", "p99 ms", "max ms", "tokens in", "tokens out"], rows
    yield "Outcomes", ["outcome", "requests"], [[name, str(number)] for name, number in summary["outcomes"].items()]
    replicas = summary.get("replicas") or ()
    rows = [[row["name"], f"{row['requests']:.0f}", f"{100 * row['share']:.1f} %"] for row in replicas]
    yield "By replica", ["replica", "requests", "share"], rows
    stages, steps = (summary["server"].get(name, {}) for name in ("stages", "mean_ms"))
    keys = ("tokens_in", "tokens_out", "merged_share", "mean_group", "seconds")
    rows = [[name, *(_number(stage[key]) for key in keys)] for name, stage in stages.items()]
    heads = ["stage", "tokens in", "tokens out", "merged", "windows of a group", "seconds"]
    yield "By stage, as the server counts", heads, rows
    yield "A request in the server, mean", ["step", "ms"], [[name, _number(ms)] for name, ms in steps.items()]


def alike(share: float) -> str:
    """A share of equal pixels, rounded down: what is not quite the same must not look so."""
    return f"{math.floor(10_000 * share + 1e-6) / 100:g} %"


def library_of(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The comparison with the library; None where nothing was compared."""
    library: Mapping[str, Any] = summary.get("library", {})
    return library if library.get("compared") else None


def _value(value: float | None, unit: str) -> str:
    """A figure with its unit: seconds, ms, share or count."""
    if unit == "seconds":
        return _value(value and 1000 * value, "ms")
    if value is None:
        return "never" if unit == "ms" else "none"
    if unit == "ms":
        return f"{value / 1000:.1f} s" if value >= 10_000 else f"{_number(value)} ms"
    return f"{100 * value:.3g} %" if unit == "share" else f"{value:g}"


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return _NONE
    if abs(value) >= 1e4:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{round(seconds, 1):g} s" if seconds < 120 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


@click.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML file (beside the JSON).")
def command(report: Path, out: Path | None) -> None:
    """Draw a run's page again, from its JSON; - reads a log that ends with it, as `--report -` prints it."""
    lines = (
        [line for line in sys.stdin if line.startswith("{")] if report == Path("-") else [report.read_text("utf-8")]
    )
    try:
        summary = json.loads((lines or [""])[-1])
    except json.JSONDecodeError:
        summary = None
    if not isinstance(summary, dict) or "series" not in summary:
        raise ValueError(f"{report}: expected the JSON of a run")
    out = out or (Path("report.html") if report == Path("-") else report.with_suffix(".html"))
    out.write_text(render(summary), encoding="utf-8")
    click.echo(out)
