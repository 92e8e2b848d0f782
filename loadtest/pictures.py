"""What is sent: the pictures of a folder in several forms, and bytes that are no pictures."""

import fnmatch
import io
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from handlers.png import png_file

from .arrivals import Arrival
from .checks import check_number

KINDS = ("png", "json", "raw", "bad")
_SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to send.

    Attributes:
        name: of the picture's file, or of what is wrong.
        kind: "png" asks for a mask as PNG, "json" for a description; "raw" sends an uncompressed frame and asks for a
            PNG; "bad" sends what can't be answered.
        body: the bytes.
        content_type: of the body.
        size: height and width of the picture; zeros if bad.
    """

    name: str
    kind: str
    body: bytes
    content_type: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mix:
    """Chooses what each request sends.

    Args:
        items: by kind and name.
        shares: of the kinds; what they add up to is the whole.
        weights: of the pictures, by name.
        seed: decides together with the number of the request, so that any number of workers send the same.
    """

    items: Mapping[tuple[str, str], Item]
    shares: Mapping[str, float]
    weights: Mapping[str, float]
    seed: int

    def choose(self, number: int, arrival: Arrival | None = None) -> Item:
        """The item of a request.

        Raises:
            KeyError: the arrival names what the mix does not hold.
        """
        dice = random.Random(self.seed * 1_000_003 + number)
        drawn = dice.choices(list(self.shares), list(self.shares.values()))[0]
        kind = (arrival.kind if arrival else "") or drawn
        if kind == "bad":
            return self.items[kind, dice.choice([name for item_kind, name in self.items if item_kind == "bad"])]
        name = arrival.picture if arrival else ""
        return self.items[kind, name or dice.choices(list(self.weights), list(self.weights.values()))[0]]

    @property
    def pictures(self) -> list[Item]:
        """Items that get a mask, each picture and form once."""
        return [item for item in self.items.values() if item.kind in ("png", "raw")]


def load_mix(
    folder: Path,
    *,
    shares: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    raw: bool = False,
) -> Mix:
    """Read the pictures of a folder.

    Args:
        shares: of the `KINDS`; only masks as PNG by default.
        weights: by patterns of file names, the last that fits; 1 where none does. 0 leaves a picture out.
        raw: read raw frames too, though their share is 0: arrivals may ask for them.

    Raises:
        ValueError: a weight is out of range, or no picture is left.
        OSError: the folder can't be read.
    """
    shares, weights = shares or {"png": 1.0}, weights or {}
    for pattern, weight in weights.items():
        check_number(f"weights: {pattern}", weight)
    if not folder.is_dir():
        raise ValueError(f"pictures: expected a folder, got {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    chosen = {path: _weight(path.name, weights) for path in files}
    chosen = {path: weight for path, weight in chosen.items() if weight > 0}
    if not chosen:
        raise ValueError(f"{folder}: expected pictures ({', '.join(_SUFFIXES)}), got none with a weight above 0")
    items = [item for path in chosen for item in _forms(path, raw=raw or shares.get("raw", 0) > 0)]
    items += _bad_items(items[0])
    return Mix(
        {(item.kind, item.name): item for item in items},
        dict(shares),
        {path.name: weight for path, weight in chosen.items()},
        seed,
    )


def draw_sample(folder: Path, names: Sequence[str], most: int, seed: int) -> list[Path]:
    """At most so many of the pictures of a folder, the same for the same seed."""
    chosen = names if len(names) <= most else random.Random(seed).sample(sorted(names), most)
    return [folder / name for name in sorted(chosen)]


def read_frame(path: Path) -> np.ndarray:
    """A picture as a person sees it: uint8 RGB [H, W, 3], upright, transparency over white.

    Raises:
        ValueError: it can't be read.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if not picture.has_transparency_data:
                return np.asarray(picture.convert("RGB"))
            clear, opaque = picture.convert("RGBA"), Image.new("RGB", picture.size, "white")
            opaque.paste(clear, mask=clear)
            return np.asarray(opaque)
    except (UnidentifiedImageError, OSError):
        raise ValueError(f"{path}: not a picture that can be read") from None


PAINTED = Path("build/loadtest/pictures")
_SCENES: Mapping[str, Any] = {"clutter": (0, 0.35, 0.7, 1), "sizes": ((640, 480), (480, 640))}


def ensure_pictures(folder: Path = PAINTED, scenes: Mapping[str, Any] = _SCENES) -> None:
    """Paint road scenes as JPEG into a folder that has no files; the same arguments always give the same scenes.

    Empty and crowded scenes together, because a crowded one keeps more tokens when they merge.

    Args:
        scenes: `clutter` from 0, empty, to 1, crowded, and `sizes`, width and height.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    from model_store.demo.painter import paint_scene

    folder.mkdir(parents=True, exist_ok=True)
    for amount in scenes["clutter"]:
        for width, height in scenes["sizes"]:
            image, _ = paint_scene(height, width, clutter=amount, seed=0)
            Image.fromarray(image).save(folder / f"clutter{round(100 * amount):03d}_{width}x{height}.jpg", quality=92)


def _weight(name: str, weights: Mapping[str, float]) -> float:
    return ([1.0] + [weight for pattern, weight in weights.items() if fnmatch.fnmatch(name, pattern)])[-1]


def _forms(path: Path, *, raw: bool) -> list[Item]:
    body = path.read_bytes()
    try:
        with Image.open(io.BytesIO(body)) as opened:
            turned = opened.getexif().get(274, 1) >= 5  # orientation: the server answers upright
            width, height = opened.size[::-1] if turned else opened.size
    except (UnidentifiedImageError, OSError):
        raise ValueError(f"{path}: not a picture that can be read") from None
    content_type = _SUFFIXES[path.suffix.lower()]
    found = [Item(path.name, kind, body, content_type, (height, width)) for kind in ("png", "json")]
    if raw:
        buffer = io.BytesIO()
        np.save(buffer, read_frame(path))
        found.append(Item(path.name, "raw", buffer.getvalue(), "application/x-npy", (height, width)))
    return found


def _bad_items(good: Item) -> list[Item]:
    """What must be refused: noise, half a picture, and one that says to be huge."""
    huge = png_file(60_000, 60_000, 8, 2, (b"IDAT", zlib.compress(b"\0" * 9)))
    bodies = {
        "noise": random.Random(0).randbytes(4096),
        "half a picture": good.body[: len(good.body) // 2],
        "60000x60000 in 70 bytes": huge,
    }
    return [Item(name, "bad", body, "application/octet-stream", (0, 0)) for name, body in bodies.items()]
