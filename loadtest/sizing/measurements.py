"""What was measured of a deployment, from the JSON of the search and of the benchmarks."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_CODEC_STEPS = ("decode", "cut", "png")


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
        ResultError: a file is none of the four kinds, or a field is missing or out of range.
        OSError: it can't be read.
    """
    found: list[Measured] = []
    costs: list[tuple[float, str]] = []
    for file in files:
        fields = _read(file)
        if "slo" in fields:
            found += _from_search(fields)
        elif "servers" in fields:
            found += _from_servers(fields)
        elif "served_windows_per_second" in fields:
            found.append(_from_end_to_end(fields, windows_per_picture))
        elif "repeats" in fields:
            costs.append(_codec_cost(fields))
        else:
            raise ResultError(
                f"{file}: expected the result of loadtest.search (with `slo`), or of handlers.bench servers "
                "(`servers`), end-to-end (`served_windows_per_second`) or codec (`repeats`), "
                f"got {_named(fields.value)}"
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
        yield "masks: not held against the library's"


def _from_servers(fields: _Fields) -> list[Measured]:
    """The best number of clients for each server."""
    device = fields.fields("environment").text("processor")
    best: dict[str, tuple[float, _Fields]] = {}
    for row in fields.rows("servers"):
        way, rps = row.text("way"), row.number("rps")
        row.count("clients")
        if way not in best or rps > best[way][0]:
            best[way] = rps, row
    return [
        Measured(
            name=way,
            device=device,
            rate=rps,
            low=rps,
            high=rps,
            p50_ms=row.number("ms_p50"),
            p99_ms=row.number("ms_p99"),
            assumptions=(
                "rate: saturated, in a closed loop, no range and no SLO; latencies are those of "
                f"{row.count('clients')} asking at a time",
            ),
        )
        for way, (rps, row) in best.items()
    ]


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
