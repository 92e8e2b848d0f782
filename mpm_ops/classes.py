"""Names and colours of a model's classes."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .models import read_variant, trained_on

_DATASETS = Path(__file__).with_name("datasets")
_OFFICIAL = {"ade20k": 150, "cityscapes": 19, "pascal_context": 60}  # classes


@dataclass(frozen=True, slots=True)
class Classes:
    """names: one per class; colors: uint8 RGB [K, 3]."""

    names: tuple[str, ...]
    colors: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def load_classes(folder: Path, n_cls: int) -> Classes:
    """Names and colours of the classes of a checkpoint's folder.

    They are those of `classes.csv` (index,name,red,green,blue), where there is one; else those of the official dataset
    that variant.yml says the network was trained on (ade20k, cityscapes, pascal_context), if it has as many, where a
    class that has the colour of one before it gets another; else the classes are numbered and coloured.

    Raises:
        ValueError: the file does not describe exactly classes 0..n_cls-1.
    """
    path = folder / "classes.csv"
    if path.is_file():
        return _read_classes(path, n_cls)
    variant = folder / "variant.yml"
    dataset = trained_on(read_variant(variant)) if variant.is_file() else ""
    if dataset in _OFFICIAL and n_cls == _OFFICIAL[dataset]:
        official = _read_classes(_DATASETS / f"{dataset}.csv", n_cls)
        return Classes(official.names, _told_apart(official.colors))
    return Classes(tuple(f"class {i}" for i in range(n_cls)), default_colors(n_cls))


def _read_classes(path: Path, n_cls: int) -> Classes:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel starts it with a byte order mark
            header = file.readline()
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=";" if ";" in header else ","))  # and has ; in half of Europe
        entries = sorted((int(r["index"]), r["name"], [int(r[c]) for c in ("red", "green", "blue")]) for r in rows)
        colors = np.array([color for _, _, color in entries], dtype=np.int64).reshape(-1, 3)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected columns index, name, red, green, blue as UTF-8 text") from None
    if [index for index, _, _ in entries] != list(range(n_cls)):
        raise ValueError(f"{path}: expected classes 0..{n_cls - 1}, each once, got {len(entries)} rows")
    if colors.min() < 0 or colors.max() > 255:
        raise ValueError(f"{path}: expected colours within 0..255")
    return Classes(tuple(name for _, name, _ in entries), colors.astype(np.uint8))


def _told_apart(colors: np.ndarray) -> np.ndarray:
    """Where classes share a colour, all but the first get that of a coarse grid which is farthest from all others."""
    grid = np.stack(np.meshgrid(*3 * [np.arange(0, 256, 51)], indexing="ij"), axis=-1).reshape(-1, 3)
    apart = colors.astype(np.int64)
    for i in range(1, len(apart)):
        if (apart[:i] == apart[i]).all(axis=1).any():
            apart[i] = grid[np.abs(grid[:, None] - apart).sum(axis=2).min(axis=1).argmax()]
    return apart.astype(np.uint8)


def default_colors(n_cls: int) -> np.ndarray:
    """Well-separated colours for any number of classes: golden-ratio hues in three brightnesses."""
    hue = np.arange(n_cls) * 0.61803398875 % 1.0
    value = np.array([0.95, 0.75, 0.55])[np.arange(n_cls) % 3]
    channel = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (255 * value[:, None] * (1 - 0.75 * (1 - channel.clip(0, 1)))).round().astype(np.uint8)
