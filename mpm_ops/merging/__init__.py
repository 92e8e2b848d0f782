"""Ways to merge tokens, by name: where each cuts the network, what it does there, and how patches get their results.

A merger is written as its name and its parameters, `none`, `mpm:2,5`, `mpm:1,3,keep=0.75,weighted`, `tome:r=46`:
numbers alone are the blocks of its schedule, names alone are flags. To add one: write its file here, and name its
class in MERGERS.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .algm import ALGM_THRESHOLDS, Algm
from .base import Merger, Tower
from .mpm import Mpm, NoMerging
from .region import Region
from .tome import TOME_REDUCTIONS, ToMe

MERGERS: Mapping[str, type[Merger]] = {"none": NoMerging, "mpm": Mpm, "tome": ToMe, "algm": Algm, "region": Region}

__all__ = [
    "ALGM_THRESHOLDS",
    "MERGERS",
    "TOME_REDUCTIONS",
    "Algm",
    "Merger",
    "Mpm",
    "NoMerging",
    "Region",
    "ToMe",
    "Tower",
]


def make_merger(text: str, tower: Tower) -> Merger:
    """Build a merger for a network from its name and parameters.

    Args:
        text: such as "mpm:2,5" or "tome:r=46"; a parameter that is left out has its default for the network.
        tower: the encoder that it will merge in.

    Raises:
        ValueError: the name or a parameter is unknown or malformed, or does not fit the network.
    """
    name, _, rest = text.partition(":")
    if name not in MERGERS:
        raise ValueError(f"merger: expected one of {', '.join(MERGERS)} and its parameters, got {text!r}")
    kind = MERGERS[name]
    known = {field.name: field.metadata["parse"] for field in fields(kind) if "parse" in field.metadata}
    values: dict[str, Any] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = item.strip().partition("=")
        if not equals and key in known and known[key] is bool:
            value = key  # a flag
        elif not equals:
            key, value = "schedule", key
        elif known.get(key) is bool:
            raise ValueError(f"merger: expected {key} alone, a flag, got {item.strip()!r} in {text!r}")
        if key not in known:
            named = ", ".join(known) or "none"
            raise ValueError(f"merger: {name} has no parameter {key}, expected one of: {named}; got {text!r}")
        try:
            parsed = known[key](value)
        except ValueError:
            expected = "a block's number" if key == "schedule" else f"{known[key].__name__} for {key}"
            raise ValueError(f"merger: expected {expected}, got {value!r} in {text!r}") from None
        if key == "schedule":
            parsed = (*values.get(key, ()), parsed)
        elif key in values:
            raise ValueError(f"merger: {key} is given twice in {text!r}")
        values[key] = parsed
    return kind(tower=tower, **values)
