"""What checks of settings share: every message names the field, what was expected and what came."""

import math
from typing import Any


def check_number(name: str, value: Any, *, minimum: float = 0.0, above: bool = False) -> None:
    """Raise a ValueError unless the value is a finite number at least, or above, the minimum."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum or (above and value <= minimum):
        raise ValueError(f"{name}: expected a number {'>' if above else '>='} {minimum:g}, got {value!r}")


def check_integer(name: str, value: Any, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")


def check_share(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number within 0..1, got {value!r}")


def parse_share(text: str) -> float:
    """`5%` or `0.05`.

    Raises:
        ValueError: it is neither, or not within 0..1.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share such as 5% or 0.05, got {text!r}")
    return share


_UNITS = (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0))


def parse_seconds(text: str) -> float:
    """`800ms`, `2s`, `30m`, `1h`, or plain seconds.

    Raises:
        ValueError: it is none of these, or negative.
    """
    number, factor = text, 1.0
    for unit, seconds in _UNITS:
        if text.endswith(unit):
            number, factor = text.removesuffix(unit), seconds
            break
    try:
        value = float(number) * factor
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"expected a duration such as 800ms, 2s or 30m, got {text!r}")
    return value
