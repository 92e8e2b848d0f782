"""An evaluation as a table and as curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = {  # title: field, format
    "mean IoU": ("mean_iou", "{:.4f}"),
    "change": ("mean_iou_change", "{:+.4f}"),
    "pixels": ("pixel_accuracy", "{:.4f}"),
    "classes": ("mean_accuracy", "{:.4f}"),
    "fw IoU": ("frequency_weighted_iou", "{:.4f}"),
    "boundary IoU": ("boundary_iou", "{:.4f}"),
    "agreement": ("agreement", "{:.4f}"),
    "tokens": ("tokens", "{:.0f}"),
    "a block": ("tokens_per_block", "{:.0f}"),
    "GFLOPs": ("gflops", "{:.2f}"),
    "share": ("gflops_share", "{:.3f}"),
    "decoding all": ("gflops_decoding_all", "{:.2f}"),
    "distance": ("distance_mean", "{:.2f}"),
    "images/s": ("images_per_second", "{:.2f}"),
    "ms a window": ("median_ms", "{:.1f}"),
}
_WITH_INTERVAL = ("mean_iou", "mean_iou_change", "agreement")


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """A line for each merger, as Markdown has tables."""
    columns = {title: how for title, how in _COLUMNS.items() if any(how[0] in result for result in results)}
    lines = [["merger", *columns]]
    for result in results:
        lines.append([result["merger"], *(_cell(result, *how) for how in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def _cell(result: Mapping[str, Any], field: str, form: str) -> str:
    value = result.get(field)
    if value is None:
        return "-"
    told = form.format(value)
    if field in _WITH_INTERVAL:
        told += " ({}, {})".format(*map(form.format, result["intervals"][field]))
    return told


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Agreement and mean IoU against arithmetic, tokens and, where they are known, milliseconds; a curve a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = {"gflops_share": "share of the arithmetic", "tokens_per_block": "tokens in a block, on average"}
    if any(result.get("median_ms") for result in results):
        across["median_ms"] = "milliseconds a window, median"
    figure, panels = pyplot.subplots(
        2, len(across), figsize=(5 * len(across), 8), sharex="col", sharey="row", squeeze=False
    )
    families: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        families.setdefault(family(result["merger"]), []).append(result)
    for i, (field, title) in enumerate({"agreement": "agreement", "mean_iou": "mean IoU"}.items()):
        for panel, (x, x_title) in zip(panels[i], across.items(), strict=True):
            for name, members in families.items():
                known = sorted((m[x], m[field], *m["intervals"][field]) for m in members if m.get(x) is not None)
                if known:
                    at, value, low, high = zip(*known, strict=True)
                    panel.plot(at, value, ".-" if len(known) > 1 else "*", label=name)
                    panel.fill_between(at, low, high, alpha=0.1)
            panel.grid(alpha=0.3)
            panel.set(xlabel=x_title if i else "")
        panels[i, 0].set(ylabel=title)
    panels[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def family(merger: str) -> str:
    """Which curve a merger belongs to: its name, for MPM how often it merges, and how it keeps."""
    text, _, light = merger.partition(" ")
    name, _, parameters = text.partition(":")
    items = parameters.split(",")
    name += f" {light}" if light else ""
    cuts = [item for item in items if item.isdigit()]
    if any(item.startswith("keep") for item in items):
        return f"{name} {','.join(cuts)}, keep"
    return f"{name}, {len(cuts)} merge{'s' if len(cuts) > 1 else ''}" if cuts else name
