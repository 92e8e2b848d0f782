"""Checks of settings: every message names the field, what was expected and what was given."""

import math
from typing import Any

_UNITS = (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0))


def check_number(name: str, value: Any, *, minimum: float = 0.0, above: bool = False) -> None:
    """Raise a ValueError unless the value is a finite number at least, or above, the minimum."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum or (above and value <= minimum):
        raise ValueError(f"{name}: expected a number {'>' if above else '>='} {minimum:g}, got {value!r}")


def check_integer(name: str, value: Any, *, minimum: int) -> None:
    """Raise a ValueError unless the value is an integer, at least the minimum."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")


def parse_share(name: str, text: str) -> float:
    """`5%` or `0.05`; a ValueError if it is neither, or not within 0..1."""
    share = _scaled(text, "%", 0.01) if text.endswith("%") else _scaled(text, "", 1.0)
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: expected a share such as 5% or 0.05, got {text!r}")
    return share


def parse_seconds(name: str, text: str) -> float:
    """`800ms`, `2s`, `30m`, `1h`, or plain seconds; a ValueError if it is none of these, or negative."""
    value = _scaled(text, *next(unit for unit in _UNITS if text.endswith(unit[0])))
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a duration such as 800ms, 2s or 30m, got {text!r}")
    return value


def parse_pairs(name: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping; a ValueError if an entry is not NAME=VALUE, or a name is given twice."""
    found: dict[str, str] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        key, equals, value = entry.rpartition("=")
        if not equals or not key or key in found:
            raise ValueError(f"{name}: expected NAME=VALUE, each name once, got {entry!r}")
        found[key] = value
    return found


def parse_weights(text: str) -> dict[str, float]:
    """`0.jpg=2,night*=0` as numbers by patterns of file names."""
    found = {}
    for pattern, number in parse_pairs("weights", text).items():
        try:
            found[pattern] = float(number)
        except ValueError:
            raise ValueError(f"weights: {pattern}: expected a number, got {number!r}") from None
        check_number(f"weights: {pattern}", found[pattern])
    return found


def _scaled(text: str, unit: str, factor: float) -> float:
    try:
        return float(text.removesuffix(unit)) * factor
    except ValueError:
        return math.nan
