"""When requests are due. Decided before they are sent, so that no server can slow the clock down.

A trace is a file of arrivals, one a line, in seconds from its beginning and in any order:

    {"at": 0.31}                                        JSON lines, .jsonl
    {"at": 1.02, "picture": "street.jpg", "kind": "json"}

    at,picture,kind                                     or CSV, .csv, with a header
    0.31,,
    1.02,street.jpg,json

`picture` is a file name of the folder of pictures and `kind` one of `pictures.KINDS`; what a line leaves out is chosen
as without a trace. `--save-trace FILE` writes what a run sent.
"""

import csv
import json
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any

from .checks import check_number

PROCESSES = ("poisson", "even")
_FIELDS = ("at", "picture", "kind")


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of constant rate.

    Attributes:
        seconds: how long it lasts; infinity for the last one of a run without an end.
        rate: requests per second; 0 for a pause.
    """

    seconds: float
    rate: float

    def __post_init__(self) -> None:
        if self.seconds != math.inf:
            check_number("seconds", self.seconds, above=True)
        check_number("rate", self.rate)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is due.

    Attributes:
        at: seconds from the beginning.
        picture: name of the picture's file; empty where the mix chooses.
        kind: one of `pictures.KINDS`; empty where the mix chooses.
    """

    at: float
    picture: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        check_number("at", self.at)
        for name, value in (("picture", self.picture), ("kind", self.kind)):
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a name, got {value!r}")


Factors = Sequence[tuple[float, float]]  # shares of the time, which add up to 1, and what the load is multiplied with


def _steady(options: Any) -> Factors:
    return [(1.0, 1.0)]


def _steps(options: Any) -> Factors:
    try:
        factors = [float(factor) for factor in options.steps.split(",")]
    except ValueError:
        raise ValueError(f"steps: expected numbers such as 0.5,1,2, got {options.steps!r}") from None
    for factor in factors:
        check_number("steps", factor)
    return [(1 / len(factors), factor) for factor in factors]


def _spike(options: Any) -> Factors:
    check_number("peak", options.peak)
    return [(0.3, 1.0), (0.2, options.peak), (0.5, 1.0)]


FACTORS: Mapping[str, Callable[[Any], Factors]] = {
    "steady": _steady,
    "steps": _steps,
    "spike": _spike,
    "soak": _steady,
}


def phases_of(factors: Factors, rate: float, seconds: float) -> tuple[Phase, ...]:
    """Rates over time.

    Raises:
        ValueError: factors change over a run that has no end.
    """
    if len(factors) > 1 and seconds == math.inf:
        raise ValueError("run-time: expected with a shape that changes, got none")
    return tuple(Phase(share * seconds, factor * rate) for share, factor in factors)


def factor_at(factors: Factors, share: float) -> float:
    """The factor after this share of the time."""
    ends = accumulate(part for part, _ in factors)
    return next((factor for end, (_, factor) in zip(ends, factors, strict=True) if share < end), factors[-1][1])


def arrivals_of(phases: Sequence[Phase], process: str, seed: int) -> Iterator[Arrival]:
    """Due times of phases, one after the other; without an end where the last phase has none.

    Args:
        process: "poisson", arrivals that are independent of each other; or "even", equally spaced.
        seed: of the Poisson process.

    The process runs at rate 1 in a time that passes faster where the rate is higher, so phases need no seams.
    """
    dice = random.Random(seed)
    starts = list(accumulate((phase.seconds for phase in phases), initial=0.0))
    passed = list(accumulate((phase.seconds * phase.rate for phase in phases), initial=0.0))
    gaps = iter(lambda: dice.expovariate(1.0), None) if process == "poisson" else chain([0.5], repeat(1.0))
    for due in accumulate(gaps):
        if due >= passed[-1]:
            return
        i = bisect_right(passed, due) - 1
        yield Arrival(starts[i] + (due - passed[i]) / phases[i].rate)


def read_trace(path: Path, *, speed: float = 1.0) -> list[Arrival]:
    """Arrivals of a file, in order of time.

    Args:
        path: .jsonl or .csv; see above.
        speed: 2 replays twice as fast.

    Raises:
        ValueError: the file holds no arrival, or a line is not one; the message names the line.
        OSError: it can't be read.
    """
    check_number("speed", speed, above=True)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"trace: expected a .csv or .jsonl file, got {path}")
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            rows = enumerate(csv.DictReader(lines), start=2) if path.suffix == ".csv" else _json_rows(lines)
            found = [_arrival(f"trace: {path}, line {number}", row, speed) for number, row in rows]
        except UnicodeDecodeError:
            raise ValueError(f"trace: {path}: not UTF-8 text") from None
    if not found:
        raise ValueError(f"trace: {path}: expected at least one arrival, got none")
    return sorted(found, key=lambda arrival: arrival.at)


def write_trace(path: Path, arrivals: Iterable[Arrival]) -> None:
    """Write arrivals as .jsonl or .csv, by the name of the file."""
    with path.open("w", encoding="utf-8", newline="") as out:
        if path.suffix == ".csv":
            writer = csv.writer(out)
            writer.writerow(_FIELDS)
            writer.writerows((round(arrival.at, 6), arrival.picture, arrival.kind) for arrival in arrivals)
            return
        for arrival in arrivals:
            named = {"picture": arrival.picture, "kind": arrival.kind}
            row = {"at": round(arrival.at, 6), **{name: value for name, value in named.items() if value}}
            out.write(json.dumps(row) + "\n")


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError:
            yield number, line.strip()


def _arrival(where: str, row: Any, speed: float) -> Arrival:
    if not isinstance(row, dict) or set(row) - set(_FIELDS) or row.get("at") is None:
        raise ValueError(f"{where}: expected at, and perhaps picture and kind; got {str(row)[:80]!r}")
    try:
        at = float(row["at"]) / speed
    except (TypeError, ValueError):
        at = math.nan
    try:
        return Arrival(at, row.get("picture") or "", row.get("kind") or "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
