"""When requests are due. Known before the run begins, so that no server can slow the clock.

A trace is a file of arrivals, one a line, in seconds from its beginning and in any order:

    {"at": 0.31}                                        JSON lines, .jsonl
    {"at": 1.02, "picture": "street.jpg", "kind": "json"}

    at,picture,kind                                     or CSV, .csv, with a header
    0.31,,
    1.02,street.jpg,json

`picture` is a file name of the folder of pictures and `kind` one of `pictures.KINDS`; the mix chooses what a line
leaves out. `python -m loadtest --save-trace FILE` writes what a run sent.
"""

import csv
import json
import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from loadtest.checking import check_number

from .shapes import Phase

PROCESSES = ("poisson", "even")
_FIELDS = ("at", "picture", "kind")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is due.

    Attributes:
        at: seconds from the beginning.
        picture: name of what it sends; empty where the mix chooses.
        kind: how it sends it, one of `loadtest.client.pictures.KINDS`; empty where the mix chooses.
    """

    at: float
    picture: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        check_number("at", self.at)
        for name, value in (("picture", self.picture), ("kind", self.kind)):
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a name, got {value!r}")


def arrivals_of(phases: Sequence[Phase], process: str, seed: int) -> list[Arrival]:
    """Due times of a shape.

    Args:
        phases: rates over time.
        process: "poisson", arrivals that know nothing of each other; or "even", equally spaced.
        seed: of the Poisson process.

    Raises:
        ValueError: the process is unknown.

    The process runs at rate 1 in a time that passes faster where the rate is higher; so phases need no seams.
    """
    if process not in PROCESSES:
        raise ValueError(f"process: expected one of {', '.join(PROCESSES)}, got {process!r}")
    dice = random.Random(seed)
    ends = list(accumulate(phase.seconds for phase in phases))
    passed = list(accumulate((phase.seconds * phase.rate for phase in phases), initial=0.0))
    if process == "poisson":
        gaps: Iterable[float] = (dice.expovariate(1.0) for _ in count())
    else:
        gaps = (0.5 if i == 0 else 1.0 for i in count())
    found: list[Arrival] = []
    for due in accumulate(gaps):
        if due >= passed[-1]:
            return found
        i = bisect_right(passed, due) - 1
        found.append(Arrival(ends[i] - phases[i].seconds + (due - passed[i]) / phases[i].rate))
    raise AssertionError("arrivals never end")


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
        raise ValueError(f"{path}: expected a .csv or .jsonl file")
    found = []
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            rows: Iterable[tuple[int, Any]] = _csv_rows(lines) if path.suffix == ".csv" else _json_rows(lines)
            for number, row in rows:
                found.append(_arrival(path, number, row, speed))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text") from None
    if not found:
        raise ValueError(f"{path}: expected at least one arrival, got none")
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


def _csv_rows(lines: Iterable[str]) -> Iterable[tuple[int, Any]]:
    yield from enumerate(csv.DictReader(lines), start=2)


def _json_rows(lines: Iterable[str]) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError:
            yield number, line.strip()


def _arrival(path: Path, number: int, row: Any, speed: float) -> Arrival:
    if not isinstance(row, dict) or set(row) - set(_FIELDS) or row.get("at") is None:
        raise ValueError(f"{path}, line {number}: expected at, and perhaps picture and kind; got {str(row)[:80]!r}")
    try:
        at = float(row["at"]) / speed
    except (TypeError, ValueError):
        at = math.nan
    try:
        return Arrival(at, row.get("picture") or "", row.get("kind") or "")
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
