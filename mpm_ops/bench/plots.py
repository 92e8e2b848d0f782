"""A page of bars from the figures of `bench model`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INK = "#333333"
_STEPS = {"network": "#1b7f79", "merge": "#d1742f", "labels": "#6a5acd"}


def plot_models(report: Mapping[str, Any], path: Path) -> None:
    """Draw where each way's time goes, one panel for each size and precision, the fastest at the bottom.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["results"]:
        panels.setdefault((row["size"], row["precision"]), []).append(row)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.5 + 5.5 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axis, ((size, precision), rows) in zip(axes[0], panels.items(), strict=True):
        rows = sorted(rows, key=lambda row: -row["median_ms"]["total"])
        names = [f"{row['way']}, {row['runtime']}" for row in rows]
        left = [0.0] * len(rows)
        for step, color in _STEPS.items():
            widths = [row["median_ms"][step] for row in rows]
            axis.barh(names, widths, left=left, color=color, label=step)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, total in enumerate(left):
            axis.text(total, i, f" {total:.0f}", va="center", color=_INK, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"Seg-{size}/16, {precision}", loc="left", fontsize=10)
        axis.set_xlabel(f"ms for a window of 512 x 512, {report['classes']} classes")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0, 1.08 * max(left))
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    environment = report["environment"]
    figure.suptitle(
        f"{environment['processor']}, {environment['cpu_capability']}, {environment['threads']} threads",
        fontsize=8,
        color=_INK,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
