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

KINDS = ("png", "json", "raw", "bad")
PAINTED = Path("build/loadtest/pictures")
_SCENES: Mapping[str, Any] = {"clutter": (0, 0.35, 0.7, 1), "sizes": ((640, 480), (480, 640))}
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

    def choose(self, number: int) -> Item:
        """The item of a request."""
        dice = random.Random(self.seed * 1_000_003 + number)
        kind = dice.choices(list(self.shares), list(self.shares.values()))[0]
        if kind == "bad":
            return dice.choice([item for item in self.items.values() if item.kind == "bad"])
        return self.items[kind, dice.choices(list(self.weights), list(self.weights.values()))[0]]

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
) -> Mix:
    """Read the pictures of a folder.

    Args:
        shares: of the `KINDS`; only masks as PNG by default.
        weights: by patterns of file names, the last that fits; 1 where none does. 0 leaves a picture out.

    Raises:
        ValueError: no picture is left.
        OSError: the folder can't be read.
    """
    shares = shares or {"png": 1.0}
    weighed = weigh_pictures(folder, weights or {})
    items = [item for path in weighed for item in _forms(path, raw=shares.get("raw", 0) > 0)]
    items += _bad_items(items[0])
    chosen = {path.name: weight for path, weight in weighed.items()}
    return Mix({(item.kind, item.name): item for item in items}, dict(shares), chosen, seed)


def weigh_pictures(folder: Path, weights: Mapping[str, float]) -> dict[Path, float]:
    """Files of a folder that are sent, and how often; see `load_mix`."""
    if not folder.is_dir():
        raise ValueError(f"pictures: expected a folder, got {folder}")
    found = {}
    for path in sorted(folder.iterdir()):
        fitting = [weight for pattern, weight in weights.items() if fnmatch.fnmatch(path.name, pattern)]
        if path.suffix.lower() in _SUFFIXES and (weight := [1.0, *fitting][-1]) > 0:
            found[path] = weight
    if not found:
        raise ValueError(f"{folder}: expected pictures ({', '.join(_SUFFIXES)}), got none with a weight above 0")
    return found


def draw_sample(files: Sequence[Path], most: int, seed: int) -> list[Path]:
    """At most so many files in the order of their names, the same for the same seed."""
    files = sorted(files)
    return files if len(files) <= most else sorted(random.Random(seed).sample(files, most))


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


def ensure_pictures(folder: Path = PAINTED, scenes: Mapping[str, Any] = _SCENES) -> None:
    """Paint road scenes as JPEG into a folder that has no files; the same arguments always give the same scenes.

    Empty and crowded scenes together, because a crowded one keeps more tokens when they merge.

    Args:
        scenes: `clutter` from 0, empty, to 1, crowded, and `sizes`, width and height.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    from model_store.demo.painter import paint_scene  # OpenCV

    folder.mkdir(parents=True, exist_ok=True)
    for amount in scenes["clutter"]:
        for width, height in scenes["sizes"]:
            image, _ = paint_scene(height, width, clutter=amount, seed=0)
            Image.fromarray(image).save(folder / f"clutter{round(100 * amount):03d}_{width}x{height}.jpg", quality=92)


def _forms(path: Path, *, raw: bool) -> list[Item]:
    frame, body, content_type = read_frame(path), path.read_bytes(), _SUFFIXES[path.suffix.lower()]
    size = (frame.shape[0], frame.shape[1])  # the server answers upright
    found = [Item(path.name, kind, body, content_type, size) for kind in ("png", "json")]
    if raw:
        buffer = io.BytesIO()
        np.save(buffer, frame)
        found.append(Item(path.name, "raw", buffer.getvalue(), "application/x-npy", size))
    return found


def _bad_items(good: Item) -> list[Item]:
    """What must be refused: noise, half a picture, and one that says to be huge."""
    bodies = {
        "noise": random.Random(0).randbytes(4096),
        "half a picture": good.body[: len(good.body) // 2],
        "60000x60000 in 70 bytes": png_file(60_000, 60_000, 8, 2, (b"IDAT", zlib.compress(b"\0" * 9))),
    }
    return [Item(name, "bad", body, "application/octet-stream", (0, 0)) for name, body in bodies.items()]
