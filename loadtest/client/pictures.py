"""What is sent: a folder of pictures, in several forms, and things that are no pictures.

    python -m loadtest.client.pictures --out DIR [--clutter 0,0.5,1] [--sizes 640x480,960x540] [--seeds 2]

paints road scenes from empty to crowded, because a busy picture keeps more tokens when they merge than an empty one:
the mix of both decides how lengths vary.
"""

import argparse
import fnmatch
import io
import random
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loadtest.checking import check_number, check_share

from .arrivals import Arrival

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
    """Which item a request sends.

    Args:
        items: by kind and name.
        shares: of the kinds but png, which gets the rest.
        weights: of the pictures, by name.
        seed: decides together with the number of the request; so any number of workers send the same.
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
        kind = (arrival.kind if arrival else "") or self._kind(dice)
        if kind == "bad":
            names = [name for item_kind, name in self.items if item_kind == "bad"]
            return self.items[kind, dice.choice(names)]
        name = arrival.picture if arrival else ""
        return self.items[kind, name or dice.choices(list(self.weights), list(self.weights.values()))[0]]

    @property
    def pictures(self) -> list[Item]:
        """What gets a mask, without what is asked for as JSON."""
        return [item for item in self.items.values() if item.kind in ("png", "raw")]

    def _kind(self, dice: random.Random) -> str:
        drawn = dice.random()
        for kind, share in self.shares.items():
            drawn -= share
            if drawn < 0:
                return kind
        return "png"


def load_mix(
    folder: Path, *, shares: Mapping[str, float], weights: Mapping[str, float], seed: int, raw: bool = False
) -> Mix:
    """Read the pictures of a folder.

    Args:
        shares: of the kinds json, raw and bad.
        weights: by patterns of file names, the last that fits; 1 where none does. 0 leaves a picture out.
        raw: read raw frames too, though their share is 0: arrivals may ask for them.

    Raises:
        ValueError: a share or weight is out of range, or no picture is left.
        OSError: the folder can't be read.
    """
    for kind, share in shares.items():
        if kind not in KINDS or kind == "png":
            raise ValueError(f"shares: expected json, raw and bad, got {kind!r}")
        check_share(kind, share)
    if sum(shares.values()) > 1:
        raise ValueError(f"shares: expected at most 1 in sum, got {sum(shares.values()):g}")
    for pattern, weight in weights.items():
        check_number(f"weight of {pattern}", weight)
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


def paint_pictures(
    out: Path, *, clutter: Sequence[float], sizes: Sequence[tuple[int, int]], num_seeds: int
) -> list[Path]:
    """Paint road scenes as JPEG; the same arguments always give the same scenes.

    Args:
        clutter: from 0, empty, to 1, crowded.
        sizes: width and height.
        num_seeds: scenes of each clutter and size.
    """
    from model_store.demo.painter import paint_scene  # to prepare only: under load there is no library at hand

    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for amount in clutter:
        for width, height in sizes:
            for seed in range(num_seeds):
                image, _ = paint_scene(height, width, clutter=amount, seed=seed)
                paths.append(out / f"clutter{round(100 * amount):03d}_{width}x{height}_{seed}.jpg")
                Image.fromarray(image).save(paths[-1], quality=92)
    return paths


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
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", huge), (b"IDAT", zlib.compress(b"\0" * 9)), (b"IEND", b""))
    )
    bodies = {
        "noise": random.Random(0).randbytes(4096),
        "half a picture": good.body[: len(good.body) // 2],
        "60000x60000 in 70 bytes": png,
    }
    return [Item(name, "bad", body, "application/octet-stream", (0, 0)) for name, body in bodies.items()]


def parse_size(text: str) -> tuple[int, int]:
    """`640x480` -> width and height."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"sizes: expected WIDTHxHEIGHT, got {text!r}")
    return int(width), int(height)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.client.pictures", description="Paint pictures to send.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clutter", default="0,0.35,0.7,1", help="from 0, empty, to 1, crowded (0,0.35,0.7,1)")
    parser.add_argument("--sizes", default="640x480,480x640", help="WIDTHxHEIGHT (640x480,480x640)")
    parser.add_argument("--seeds", type=int, default=1, help="scenes of each clutter and size (1)")
    arguments = parser.parse_args()
    try:
        painted = paint_pictures(
            arguments.out,
            clutter=[float(amount) for amount in arguments.clutter.split(",")],
            sizes=[parse_size(size) for size in arguments.sizes.split(",")],
            num_seeds=arguments.seeds,
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(painted)} pictures in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
