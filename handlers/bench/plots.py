"""A page of figures from a grouping report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INK, _FAINT = "#333333", "#d9d9d9"
_STREAMS = ("#1b7f79", "#d1742f", "#6a5acd", "#999999")
_RULES = ("#1b4f72", "#2e86c1", "#a04000", "#e59866", "#6c3483", "#bb8fce", "#196f3d", "#82e0aa")
_PADDING, _HELD_BACK = "#c0504d", "#f2b880"
_TARGET = 1.5  # percent


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw lengths and overhead of every policy above, the simulation of the last profile below.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _INK,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(15, 10), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        top, bottom = halves
        axes = top.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
        _draw_lengths(axes[0], report)
        profile = report["profiles"][-1]["name"]
        stream = list(report["num_windows"])[-1]
        rows = [row for row in report["padding"] if row["stream"] == stream]
        rows = [row for row in rows if "planned" not in row["policy"] or f"{profile}," in row["policy"]]
        rows = [row for row in rows if row["align"] <= 32]
        widest = max(100 * (row["padding"] + row["held_back"]) for row in rows)
        for stage, axis in zip((1, 2), axes[1:], strict=True):
            stage_rows = [row for row in rows if row["stage"] == stage]
            _draw_overhead(axis, stage_rows, f"Stage {stage} of the {stream} stream", named=stage == 1)
            axis.set_xlim(0, 1.45 * widest)
        simulated = [row for row in report["simulation"] if row["profile"] == profile and "load" in row]
        panels = bottom.subplots(1, 3)
        _draw_load(panels[0], simulated, "windows_per_second", "Answered windows per second")
        _draw_load(panels[1], simulated, "latency_ms_p99", "p99 latency in ms", log=True)
        _draw_load(panels[2], simulated, "mean_group", "Mean group, all stages")
        bottom.suptitle(f"Simulated: {report['profiles'][-1]['source']}", x=0.01, ha="left", fontsize=9, color=_INK)
        panels[2].legend(fontsize=8, loc="upper left")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _draw_lengths(axis: Any, report: Mapping[str, Any]) -> None:
    """Both merges on one axis; colours are streams."""
    for color, (name, by_align) in zip(_STREAMS, report["measured"]["lengths"].items(), strict=False):
        windows = by_align["1"]
        for stage in range(1, len(windows[0])):
            lengths = [window[stage] for window in windows]
            label = name if stage == 1 else None
            bins = range(min(lengths) - min(lengths) % 8, max(lengths) + 9, 8)
            axis.hist(lengths, bins=bins, histtype="stepfilled", color=color, alpha=0.25)
            axis.hist(lengths, bins=bins, histtype="step", color=color, label=label)
    axis.set(title="Tokens of a window after each merge, align 1", xlabel="tokens", ylabel="windows")
    axis.legend(fontsize=8)


def _draw_overhead(axis: Any, rows: list[dict[str, Any]], title: str, *, named: bool) -> None:
    names = [_short(row) for row in rows]
    padding = [100 * row["padding"] for row in rows]
    held_back = [100 * row["held_back"] for row in rows]
    axis.barh(names, padding, color=_PADDING, label="padding")
    axis.barh(names, held_back, left=padding, color=_HELD_BACK, label="held back by aligning")
    for i, row in enumerate(rows):
        total = padding[i] + held_back[i]
        axis.text(
            total + 0.08,
            i,
            f"{total:.1f}   groups of {row['mean_group']:.0f}",
            va="center",
            color=_INK,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.axvline(_TARGET, color=_INK, linewidth=0.8, linestyle=":", zorder=0)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=f"% of computed tokens (dotted: {_TARGET})")
    if named:
        axis.legend(fontsize=8, loc="lower right")
    else:
        axis.set_yticklabels([])
    axis.tick_params(axis="y", length=0)


def _draw_load(axis: Any, rows: list[dict[str, Any]], key: str, title: str, *, log: bool = False) -> None:
    ways = dict.fromkeys((row["padded"], row["group"], row["pool"], row["align"]) for row in rows)
    for color, way in zip(_RULES, ways, strict=False):
        line = [r for r in rows if (r["padded"], r["group"], r["pool"], r["align"]) == way]
        values = [sum(r[key]) / len(r[key]) if isinstance(r[key], list) else r[key] for r in line]
        padded, group, pool, align = way
        label = f"padded, {group} of {pool}, align {align}" if padded else f"packed, {group}"
        axis.plot(
            [r["load"] for r in line],
            values,
            marker="s" if padded else "o",
            linestyle="--" if padded else "-",
            markersize=3.5,
            linewidth=1.3,
            color=color,
            label=label,
        )
    axis.set(title=title, xlabel="load (1: capacity with full groups)")
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=_FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


def _short(row: Mapping[str, Any]) -> str:
    policy = row["policy"]
    if "planned" not in policy:
        return str(policy)
    return f"planned, {policy.partition(', ')[2]}, align {row['align']}"
