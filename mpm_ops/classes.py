"""Names and colours of a model's classes."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Classes:
    """names: one per class; colors: uint8 RGB [K, 3]."""

    names: tuple[str, ...]
    colors: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def load_classes(path: Path, n_cls: int) -> Classes:
    """Read `classes.csv` (index,name,red,green,blue); where there is none, number and colour the classes.

    Raises:
        ValueError: the file does not describe exactly classes 0..n_cls-1.
    """
    if not path.is_file():
        return Classes(tuple(f"class {i}" for i in range(n_cls)), default_colors(n_cls))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        entries = sorted((int(r["index"]), r["name"], [int(r[c]) for c in ("red", "green", "blue")]) for r in rows)
        colors = np.array([color for _, _, color in entries], dtype=np.int64).reshape(-1, 3)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected columns index, name, red, green, blue as UTF-8 text") from None
    if [index for index, _, _ in entries] != list(range(n_cls)):
        raise ValueError(f"{path}: expected classes 0..{n_cls - 1}, each once, got {len(entries)} rows")
    if colors.min() < 0 or colors.max() > 255:
        raise ValueError(f"{path}: expected colours within 0..255")
    return Classes(tuple(name for _, name, _ in entries), colors.astype(np.uint8))


def default_colors(n_cls: int) -> np.ndarray:
    """Well-separated colours for any number of classes: golden-ratio hues in three brightnesses."""
    hue = np.arange(n_cls) * 0.61803398875 % 1.0
    value = np.array([0.95, 0.75, 0.55])[np.arange(n_cls) % 3]
    channel = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (255 * value[:, None] * (1 - 0.75 * (1 - channel.clip(0, 1)))).round().astype(np.uint8)
