"""Charts as SVG, drawn by hand: a report is one file that needs no library and no network."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]

_WIDTH, _HEIGHT = 600, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 26
_MARKS = {"dots": "h.01", "discs": "h.01", "crosses": "m-4-4l8 8m-8 0l8-8"}
_WIDE_LOG = 12.0  # from which ratio of values on a logarithmic axis tells more


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series.

    Attributes:
        name: for the legend; empty for none.
        points: x and y; no y is a gap.
        color: index of a colour of the page.
        style: "line", "area", "stack" (on the stacks before it), "dots", "discs" or "crosses".
    """

    name: str
    points: Sequence[Point]
    color: int
    style: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Series over one x axis.

    Attributes:
        unit: of y.
        x_max: right end of the axis.
        bounds: horizontal lines with a name: promises.
        log: a logarithmic axis where values are far apart.
        top: the least upper end of y.
        x_ticks: where and what; round seconds if empty.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    x_max: float
    note: str = ""
    bounds: Sequence[tuple[str, float]] = ()
    log: bool = False
    top: float = 0.0
    percent: bool = False
    x_ticks: Sequence[tuple[float, str]] = ()


def draw(chart: Chart) -> str:
    """A figure with its title, legend and plot."""
    lines = [line for line in chart.lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    stacked = _stack(lines)
    values = [y for line in stacked for _, y in line.points if y is not None]
    values += [y for _, y in chart.bounds]
    scale = _Scale(values, chart)
    parts = [_grid(chart, scale)]
    floor = scale.y(scale.low)
    for i, line in enumerate(stacked):
        below = [(x, floor) for x, _ in line.points] if line.style == "area" else None
        if line.style == "stack":
            earlier = [other for other in stacked[:i] if other.style == "stack"]
            below = [(x, scale.y(y or 0)) for x, y in earlier[-1].points] if earlier else None
            below = below or [(x, floor) for x, _ in line.points]
        parts.append(_draw_line(line, scale, below))
    for name, y in chart.bounds:
        at, right = scale.y(y), _WIDTH - _RIGHT
        parts.append(
            f'<line class="bound" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="bound" x="{right}" y="{at - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    hover = {
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "max": chart.x_max,
        "time": not chart.x_ticks,
        "percent": chart.percent,
        "unit": chart.unit,
        "lines": [
            [line.name or chart.title, [[_round(x), None if y is None else _round(y)] for x, y in line.points]]
            for line in lines
            if line.style not in _MARKS
        ],
    }
    legend = "".join(
        f'<span><i style="background:var(--c{line.color})"></i>{escape(line.name)}</span>'
        for line in lines
        if line.name
    )
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption><b>{escape(chart.title)}</b><em>{escape(chart.unit)}</em>"
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" data-hover="{escape(json.dumps(hover), quote=True)}">'
        f'{"".join(parts)}<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></svg>{note}</figure>'
    )


class _Scale:
    """From data to pixels."""

    def __init__(self, values: Sequence[float], chart: Chart) -> None:
        positive = [value for value in values if value > 0]
        high = max([*values, chart.top]) or 1.0
        self.log = chart.log and bool(positive) and high / min(positive) > _WIDE_LOG
        self._x_max = max(chart.x_max, 1e-9)
        if self.log:
            self.ticks = _log_ticks(min(positive), high)
            self.low, self.high = min(min(positive), self.ticks[0]), max(high * 1.1, self.ticks[-1])
        else:
            self.ticks = nice_ticks(high)
            self.low, self.high = 0.0, max(self.ticks[-1], high)

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(value, 0.0), self._x_max) / self._x_max

    def y(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def nice_ticks(high: float, number: int = 4) -> list[float]:
    """From 0 to at least `high` in steps of 1, 2 or 5 times a power of ten."""
    raw = high / number
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [tick for tick in found if low * 0.99 <= tick <= high * 1.01]
    return inside or [low, high]


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """About six round times."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    step = next((step for step in steps if seconds / step <= 7), 7200)
    return [(float(t), format_time(t)) for t in range(0, int(seconds) + 1, step)]


def format_time(seconds: float) -> str:
    return f"{round(seconds, 1):g} s" if seconds < 120 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def format_value(value: float, *, percent: bool = False) -> str:
    """Three digits that matter."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _grid(chart: Chart, scale: _Scale) -> str:
    parts = []
    for tick in scale.ticks:
        y = scale.y(tick)
        told = escape(format_value(tick, percent=chart.percent))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{told}</text>'
        )
    for x, told in chart.x_ticks or time_ticks(chart.x_max):
        at = scale.x(x)
        anchor = "end" if at > _WIDTH - 30 else "middle"
        parts.append(
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM + 4}"/>'
            f'<text x="{at:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{escape(told)}</text>'
        )
    return "".join(parts)


def _stack(lines: Sequence[Line]) -> list[Line]:
    """Stacked series as the sums that are drawn."""
    found: list[Line] = []
    sums: list[float] = []
    for line in lines:
        if line.style == "stack":
            values = [y or 0.0 for _, y in line.points]
            sums = [a + b for a, b in zip(sums, values, strict=True)] if sums else values
            points = [(x, total) for (x, _), total in zip(line.points, sums, strict=True)]
            line = Line(name=line.name, points=points, color=line.color, style="stack")
        found.append(line)
    return found


def _draw_line(line: Line, scale: _Scale, below: Sequence[tuple[float, float]] | None) -> str:
    color = f"var(--c{line.color})"
    if line.style in _MARKS:  # one path: thousands of elements would make the page slow
        marks = "".join(
            f"M{scale.x(x):.1f} {scale.y(y):.1f}{_MARKS[line.style]}" for x, y in line.points if y is not None
        )
        return f'<path class="{line.style}" d="{marks}" stroke="{color}"/>'
    path = _path(line.points, scale.x, scale.y)
    filled = ""
    if below is not None:
        top = [(scale.x(x), scale.y(y or 0)) for x, y in line.points]
        bottom = [(scale.x(x), y) for x, y in below]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*top, *reversed(bottom)])
        filled = f'<polygon class="{line.style}" points="{corners}" fill="{color}"/>'
    return f'{filled}<path class="line" d="{path}" stroke="{color}"/>'


def _path(points: Sequence[Point], to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{to_x(x):.1f} {to_y(y):.1f}")
        pen = "L"
    return "".join(parts)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
