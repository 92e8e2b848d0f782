"""The dashboards' panels as pictures, from the same queries. Not Grafana, only what it would be asked to plot."""

from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .boards import Board, Panel, concrete
from .prometheus import Prometheus

_COLUMNS = 4
_POINTS = 150
_RATE = "20s"  # over ten scrapes: a person who has just started it doesn't wait a minute for a curve
_MAX_LEGEND = 10


def draw_board(board: Board, prometheus: Prometheus, out: Path, *, start: float, end: float) -> int:
    """Plot a board over a time (seconds since the epoch) into a PNG; returns how many panels had something to show."""
    rows = -(-len(board.panels) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(5 * _COLUMNS, 3 * rows), layout="constrained", squeeze=False)
    shown = 0
    for panel, axis in zip(board.panels, axes.flat, strict=False):
        shown += _draw_panel(panel, prometheus, axis, start, end)
    for axis in axes.flat[len(board.panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{board.title} (drawn from the dashboard's queries; not Grafana)")
    figure.savefig(out, dpi=90)
    plt.close(figure)
    return shown


def _draw_panel(panel: Panel, prometheus: Prometheus, axis: Axes, start: float, end: float) -> bool:
    step = max(1.0, (end - start) / _POINTS)
    found = [
        (query.legend, series)
        for query in panel.queries
        for series in prometheus.query_range(concrete(query.expr, rate=_RATE), start, end, step)
    ]
    axis.set_title(f"{panel.title} [{panel.unit}]", fontsize=10)
    if not found:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes)
        return False
    if panel.heatmap:
        _draw_heatmap(axis, [series for _, series in found])
    else:
        for legend, series in found:
            times, values = _points(series)
            axis.plot(times, values, label=_fill(legend, series["metric"]), lw=1.2)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
        if len(found) <= _MAX_LEGEND:
            axis.legend(fontsize=7, loc="best")
    ticks = np.linspace(start, end, 4)
    axis.set_xticks(ticks, [f"{datetime.fromtimestamp(tick):%H:%M:%S}" for tick in ticks])
    axis.tick_params(labelsize=7)
    return True


def _draw_heatmap(axis: Axes, found: list[dict[str, Any]]) -> None:
    """Cumulative buckets as counts of their own: a row per bucket, from the smallest bound up."""
    ordered = sorted(found, key=lambda series: float(series["metric"]["le"]))
    times = sorted({at for series in ordered for at, _ in series["values"]})
    cumulative = np.zeros((len(ordered) + 1, len(times)))
    for row, series in enumerate(ordered, start=1):
        values = {at: float(value) for at, value in series["values"]}
        cumulative[row] = [values.get(at, np.nan) for at in times]
    counts = np.diff(cumulative, axis=0)
    axis.pcolormesh(times, np.arange(len(ordered)), counts, shading="nearest", cmap="Blues")
    ticks = range(0, len(ordered), max(1, len(ordered) // 8))
    axis.set_yticks(list(ticks), [f"≤ {ordered[i]['metric']['le']}" for i in ticks])


def _points(series: dict[str, Any]) -> tuple[list[float], list[float]]:
    return [at for at, _ in series["values"]], [float(value) for _, value in series["values"]]


def _fill(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return legend
