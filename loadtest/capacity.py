"""How many replicas a rate of pictures needs, from what was measured of one.

    mpm loadtest capacity --rate 500 [--headroom 0.3] RESULT.json… [--windows-per-picture 2] [--out X.json]

RESULT.json is what these wrote with --out, any number of each:

    mpm loadtest search   the highest rate that holds an SLO: the best ground for a size
    mpm bench end-to-end  windows per second of the engine alone, and what decoding and encoding cost
    mpm bench codec       what decoding and encoding cost, for the results of searches

Every size rests on the low end of what was measured, and its assumptions are printed with it.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

_CODEC_STEPS = ("decode", "cut", "png")
_SECONDS_OF_HOUR = 3600
_COLUMNS = (
    "",
    "measured/s",
    "range",
    "p50/p99 ms",
    "plan/s",
    "replicas",
    "+ spare",
    "devices",
    "load",
    "one away",
    "per device-hour",
    "codec cores",
)


class ResultError(ValueError):
    """A file is not a result, or a field of it not what it should be; the message names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one deployment did on one device.

    Attributes:
        name: of the configuration.
        device: what it ran on.
        rate, low, high: pictures per second, and its range; all the same where none was measured. 0 where promises
            were kept at no rate that was tried.
        replicas: how many shared the device.
        p50_ms, p99_ms: latency at that rate.
        codec_ms: CPU milliseconds a picture costs in decoding and encoding.
        assumptions: what has to hold for these numbers to mean what they say.
    """

    name: str
    device: str
    rate: float
    low: float
    high: float
    replicas: int = 1
    p50_ms: float | None = None
    p99_ms: float | None = None
    codec_ms: float | None = None
    assumptions: tuple[str, ...] = ()


def read_results(files: Sequence[Path], windows_per_picture: float | None = None) -> list[Measured]:
    """Everything that was measured in these files, in order.

    Args:
        windows_per_picture: for results that count windows.

    Raises:
        ResultError: a file is none of the three kinds, or a field is missing or out of range.
        OSError: it can't be read.
    """
    found: list[Measured] = []
    costs: list[tuple[float, str]] = []
    for file in files:
        fields = _read(file)
        if "slo" in fields:
            found += _from_search(fields)
        elif "served_windows_per_second" in fields:
            found.append(_from_end_to_end(fields, windows_per_picture))
        elif "repeats" in fields:
            costs.append(_codec_cost(fields))
        else:
            raise ResultError(
                f"{file}: expected the result of loadtest search (with `slo`), or of handlers.bench end-to-end "
                f"(`served_windows_per_second`) or codec (`repeats`), got {_named(fields.value)}"
            )
    if not found:
        raise ResultError("nothing was measured in these files but the cost of decoding and encoding")
    if not costs:
        return found
    ms, assumption = max(costs)
    return [one if one.codec_ms is not None else _with_cost(one, ms, assumption) for one in found]


class _Fields:
    """A mapping of a file whose values are checked as they are taken; knows where it stands."""

    def __init__(self, value: Any, file: Path, path: str = "") -> None:
        self.place = f"{file}: {path}" if path else str(file)
        if not isinstance(value, Mapping):
            raise ResultError(f"{self.place}: expected a mapping, got {_shown(value)}")
        self.value = value
        self._file = file
        self._path = path

    def __contains__(self, name: str) -> bool:
        return name in self.value

    def number(self, name: str, *, minimum: float | None = None) -> float:
        """A finite number, at least `minimum`, or above 0 without one."""
        value = self._get(name)
        wanted = "a number > 0" if minimum is None else f"a number >= {minimum:g}"
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._error(name, wanted, value)
        if value <= 0 if minimum is None else value < minimum:
            raise self._error(name, wanted, value)
        return float(value)

    def count(self, name: str) -> int:
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(name, "a number of things >= 1", value)
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value:
            raise self._error(name, "text", value)
        return value

    def fields(self, name: str) -> "_Fields":
        return _Fields(self._get(name), self._file, self._below(name))

    def rows(self, name: str) -> "list[_Fields]":
        value = self._get(name)
        if not isinstance(value, list) or not value:
            raise self._error(name, "a list that is not empty", value)
        return [_Fields(row, self._file, f"{self._below(name)}[{i}]") for i, row in enumerate(value)]

    def _get(self, name: str) -> Any:
        if name not in self.value:
            raise ResultError(f"{self._file}: {self._below(name)}: missing; there are {_named(self.value)}")
        return self.value[name]

    def _below(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _error(self, name: str, expected: str, value: Any) -> ResultError:
        return ResultError(f"{self._file}: {self._below(name)}: expected {expected}, got {_shown(value)}")


def _read(file: Path) -> _Fields:
    try:
        return _Fields(json.loads(file.read_text()), file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{file}: expected JSON: {error}") from None


def _from_search(fields: _Fields) -> list[Measured]:
    device = fields.text("device")
    found = []
    for row in fields.rows("results"):
        low, rate = (row.number(name, minimum=0) for name in ("low", "rate_per_second"))
        high = row.number("high")
        if not low <= rate <= high:
            raise ResultError(f"{row.place}: expected low <= rate_per_second <= high, got {low:g}, {rate:g}, {high:g}")
        configuration = row.fields("configuration")
        found.append(
            Measured(
                name=row.text("name"),
                device=device,
                rate=rate,
                low=low,
                high=high,
                replicas=configuration.count("replicas") if "replicas" in configuration else 1,
                p50_ms=_latency(row, "p50_ms"),
                p99_ms=_latency(row, "p99_ms"),
                assumptions=tuple(_assumed_of_search(fields, row)),
            )
        )
    return found


def _latency(row: _Fields, name: str) -> float | None:
    """A latency of a search; none where the middle one of its repeats kept the promises at no rate."""
    return None if row.value.get(name, 0) is None else row.number(name)


def _assumed_of_search(fields: _Fields, row: _Fields) -> Iterator[str]:
    yield f"rate: the highest that held {fields.text('slo')}; sized by the low end of its range"
    if "coverage" in fields:
        coverage = 100 * fields.number("coverage", minimum=0)
        yield f"range: from the least to the greatest repeat; {coverage:.0f} % of such ranges hold the true median"
    if "doubtful_trials" in row and (doubtful := row.number("doubtful_trials", minimum=0)):
        yield f"rate: {doubtful:.0f} trials broke perhaps because of the client; the server may hold more"
    if "library" not in row or not row.fields("library").number("compared", minimum=0):
        yield "masks: not compared with the library's"


def _from_end_to_end(fields: _Fields, windows_per_picture: float | None) -> Measured:
    if "windows_per_picture" in fields:
        windows = fields.number("windows_per_picture")
    elif windows_per_picture is not None:
        windows = windows_per_picture
    else:
        raise ResultError(f"{fields.place}: counts windows; expected --windows-per-picture to make pictures of them")
    rate = fields.number("served_windows_per_second") / windows
    steps = fields.fields("median_ms")
    return Measured(
        name=f"engine alone, {fields.text('runtime')}",
        device=fields.fields("environment").text("processor"),
        rate=rate,
        low=rate,
        high=rate,
        p50_ms=fields.number("alone_ms_p50"),
        codec_ms=steps.number("decode", minimum=0) + steps.number("encode", minimum=0),
        assumptions=(
            f"rate: the engine without a server, saturated, no range and no SLO; {windows:g} windows per picture",
            "p50: of one picture at a time",
            "cores: medians of decoding (cutting included) and encoding on this machine, one thread a picture",
        ),
    )


def _codec_cost(fields: _Fields) -> tuple[float, str]:
    """Milliseconds of the dearest picture, so that a mix of them can't cost more."""
    spent: dict[str, dict[str, float]] = {}
    for row in fields.rows("results"):
        spent.setdefault(row.text("picture"), {})[row.text("step")] = row.number("ms", minimum=0)
    for picture, steps in spent.items():
        missing = [step for step in _CODEC_STEPS if step not in steps]
        if missing:
            raise ResultError(f"{fields.place}: results: no step {missing[0]!r} for the picture {picture!r}")
    costs = {picture: sum(steps[step] for step in _CODEC_STEPS) for picture, steps in spent.items()}
    dearest = max(costs, key=lambda picture: costs[picture])
    device = fields.fields("environment").text("processor")
    usual = statistics.median(costs.values())
    return costs[dearest], (
        f"cores: decode, cut and PNG of {dearest}, the dearest picture measured, {costs[dearest]:.2f} ms on {device} "
        f"(median of all pictures {usual:.2f} ms)"
    )


def _with_cost(measured: Measured, ms: float, assumption: str) -> Measured:
    return replace(measured, codec_ms=ms, assumptions=(*measured.assumptions, assumption))


def _named(value: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, value))[:8]) or "nothing"


def _shown(value: Any) -> str:
    return repr(value)[:60]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a target rate needs of one configuration.

    Attributes:
        measured: what it rests on.
        usable_per_replica: pictures per second that a replica is planned for.
        replicas: that carry the target rate.
        replicas_with_spare: the same with one away, in a rollout or on a drained node.
        devices: for those, spare included.
        load: of the low end that each carries with nobody away, and with one away.
        pictures_per_device_hour: at the low end.
        codec_cores: CPU cores that decoding and encoding keep busy in a replica at the low end.
    """

    measured: Measured
    usable_per_replica: float
    replicas: int
    replicas_with_spare: int
    devices: int
    load: float
    load_one_away: float
    pictures_per_device_hour: float
    codec_cores: float | None


def size_up(measured: Measured, rate: float, headroom: float) -> Size:
    """Replicas for a rate.

    Args:
        rate: pictures per second in the busiest minute.
        headroom: share of the low end that is left free, 0 to below 1.

    Raises:
        ValueError: rate or headroom are out of range, or the low end is 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: expected pictures per second > 0, got {rate:g}")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom: expected a share within 0..1, 1 excluded, got {headroom:g}")
    if measured.low <= 0:
        raise ValueError(f"{measured.name}: expected a low end > 0, got {measured.low:g}")
    low = measured.low / measured.replicas
    usable = low * (1 - headroom)
    replicas = math.ceil(rate / usable - 1e-9)
    return Size(
        measured=measured,
        usable_per_replica=usable,
        replicas=replicas,
        replicas_with_spare=replicas + 1,
        devices=math.ceil((replicas + 1) / measured.replicas),
        load=rate / ((replicas + 1) * low),
        load_one_away=rate / (replicas * low),
        pictures_per_device_hour=measured.low * _SECONDS_OF_HOUR,
        codec_cores=None if measured.codec_ms is None else low * measured.codec_ms / 1000,
    )


def table(sizes: Sequence[Size]) -> list[str]:
    """The sizes, a line each under a line of headings."""
    rows = [_COLUMNS] + [_row(size) for size in sizes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _row(size: Size) -> tuple[str, ...]:
    measured = size.measured
    span = "-" if measured.low == measured.high else f"{measured.low:.3g}..{measured.high:.3g}"
    latencies = "/".join("-" if ms is None else f"{ms:.0f}" for ms in (measured.p50_ms, measured.p99_ms))
    return (
        measured.name,
        f"{measured.rate:.3g}",
        span,
        latencies,
        f"{size.usable_per_replica:.3g}",
        str(size.replicas),
        str(size.replicas_with_spare),
        str(size.devices),
        f"{100 * size.load:.0f} %",
        f"{100 * size.load_one_away:.0f} %",
        f"{size.pictures_per_device_hour:,.0f}",
        "-" if size.codec_cores is None else f"{size.codec_cores:.2g}",
    )


def assumptions(sizes: Sequence[Size], rate: float, headroom: float) -> list[str]:
    """What has to hold: for all sizes, then for each."""
    common = [
        f"{rate:g} pictures per second in the busiest minute, of the same mix as measured",
        f"plan: the low end of what one replica did, less {100 * headroom:g} % for bursts and for slower days",
        "replicas add up: a proxy spreads requests evenly, and they share nothing that saturates",
        "spare: one replica may be away, in a rollout with maxUnavailable 1 or with its node; load is then `one away`",
        "devices: one per replica, unless the measurement had several replicas on one",
        "per device-hour: pictures at the low end, with the device busy all the hour",
    ]
    if any(size.codec_cores is not None for size in sizes):
        common.append("codec cores: busy at the low end, in each replica, beside what the network itself takes")
    if len(devices := dict.fromkeys(size.measured.device for size in sizes)) > 1:
        common.append(f"measured on different devices, which don't compare: {'; '.join(devices)}")
    own = [f"{size.measured.name}: {each}" for size in sizes for each in size.measured.assumptions]
    return common + own


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT.json...")
@click.option("--rate", type=float, required=True, help="Pictures per second in the busiest minute.")
@click.option("--headroom", type=float, default=0.3, show_default=True, help="Share of a replica left free.")
@click.option("--windows-per-picture", type=float, help="For results that count windows.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the sizes as JSON.")
def command(
    results: Sequence[Path], rate: float, headroom: float, windows_per_picture: float | None, out: Path | None
) -> None:
    """Compute how many replicas a rate needs, from results of a search and of benchmarks."""
    windows = windows_per_picture
    if windows is not None and not (math.isfinite(windows) and windows >= 1):
        raise ValueError(f"windows-per-picture: expected a number >= 1, got {windows:g}")
    measured = read_results(results, windows)
    never = [one.name for one in measured if not one.low]
    sizes = [size_up(one, rate, headroom) for one in measured if one.low]
    if not sizes:
        raise ValueError(f"nothing to size: no rate that was tried held in every repeat, of {'; '.join(never)}")
    assumed = assumptions(sizes, rate, headroom)
    if out:
        report = {"rate_per_second": rate, "headroom": headroom, "assumptions": assumed}
        out.write_text(json.dumps(report | {"sizes": [asdict(size) for size in sizes]}, indent=2) + "\n")
    print("\n".join(table(sizes)))
    for name in never:
        print(f"{name}: no size, because in one repeat or more no rate that was tried held")
    print("\nAssuming")
    print("\n".join(f"  {each}" for each in assumed))
