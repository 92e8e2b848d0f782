"""Pictures of any kind to what is sent, and what is answered to a mask with its classes."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .answers import Answer

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Source = "str | os.PathLike[str] | bytes | np.ndarray | Image"

_OVERLAY_SHARE = 0.55  # of the colours in an overlay
_TIMING = re.compile(r"(\w+);dur=([0-9.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundClass:
    """A class that occurs in a picture.

    Attributes:
        id: its value in the labels.
        color: red, green and blue.
        area: pixels.
        share: of all pixels, 0..1.
    """

    id: int
    name: str
    color: tuple[int, int, int]
    area: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer for one picture.

    Attributes:
        labels: [H, W] class ids, uint8, or uint16 where one is beyond 255; as large as the picture.
        classes: those that occur, largest first.
        tokens: of the picture, at the start and after each merge.
        timings: milliseconds of each step on the server.
        request_id: by which the server's log names the request.
        reduced_from: height and width of the picture, if the server decoded it smaller.
    """

    labels: "np.ndarray"
    classes: tuple[FoundClass, ...]
    tokens: tuple[int, ...]
    timings: Mapping[str, float]
    request_id: str
    reduced_from: tuple[int, int] | None
    _picture: bytes

    @classmethod
    def of(cls, answer: Answer, picture: bytes) -> Self:
        """Read the server's description of a mask.

        Args:
            answer: of status 200, as application/json.
            picture: that was sent.
        """
        import numpy as np

        fields = json.loads(answer.body)
        height, width = fields["height"], fields["width"]
        found = fields["classes"]
        by_column = np.empty(height * width, np.uint8 if all(each["id"] < 256 for each in found) else np.uint16)
        for each in found:
            edges = np.cumsum(_run_lengths(each["rle"]["counts"]))
            for start, end in zip(edges[::2], edges[1::2], strict=False):
                by_column[start:end] = each["id"]
        timings = _TIMING.findall(answer.headers.get("server-timing", "")) or fields["timings_ms"].items()
        return cls(
            labels=np.ascontiguousarray(by_column.reshape(width, height).T),
            classes=tuple(
                FoundClass(
                    id=each["id"],
                    name=each["name"],
                    color=tuple(each["color"]),
                    area=each["area"],
                    share=each["area"] / (height * width),
                )
                for each in found
            ),
            tokens=tuple(map(sum, zip(*fields["tokens_per_window"], strict=True))),
            timings={step: float(duration) for step, duration in timings},
            request_id=fields["request_id"],
            reduced_from=tuple(fields["reduced_from"]) if "reduced_from" in fields else None,
            _picture=picture,
        )

    def overlay(self, share: float = _OVERLAY_SHARE) -> "Image":
        """The picture under the colours of its classes.

        Args:
            share: of the colours, 0..1.

        Raises:
            PIL.UnidentifiedImageError: Pillow does not read this format; pass an array to `segment`.
        """
        import numpy as np
        from PIL import Image

        palette = np.zeros((int(self.labels.max()) + 1, 3), np.uint8)
        for each in self.classes:
            palette[each.id] = each.color
        size = self.labels.shape[1], self.labels.shape[0]
        return Image.blend(_shown(self._picture).resize(size), Image.fromarray(palette[self.labels]), share)


def encode_source(source: Any) -> bytes:
    """What is sent of a picture.

    Args:
        source: a path, an encoded picture, uint8 RGB [H, W, 3], or a picture of Pillow's.

    Raises:
        OSError: the file can't be read.
        TypeError, ValueError: it is nothing of these.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    buffer = io.BytesIO()
    if hasattr(source, "getexif"):  # Pillow's; a PNG keeps colour profile, orientation and transparency
        kept = {name: source.info[name] for name in ("icc_profile", "transparency") if source.info.get(name)}
        plain = source if source.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else source.convert("RGB")
        plain.save(buffer, "PNG", compress_level=1, exif=source.getexif(), **kept)
        return buffer.getvalue()
    if not hasattr(source, "__array__"):
        raise TypeError(f"picture: expected a path, bytes, an array or a Pillow image, got {type(source).__name__}")
    import numpy as np

    array = np.asarray(source)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"picture: expected uint8 RGB [H, W, 3], got {array.dtype} {list(array.shape)}")
    np.save(buffer, np.ascontiguousarray(array))
    return buffer.getvalue()


def _shown(picture: bytes) -> "Image":
    """Upright RGB of an encoded picture or a frame."""
    import numpy as np
    from PIL import Image, ImageOps

    if picture.startswith(b"\x93NUMPY"):
        return Image.fromarray(np.load(io.BytesIO(picture)))
    return ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")


def _run_lengths(counts: str) -> "np.ndarray":
    """Lengths of the runs outside and inside of a region, in turn, of COCO's compressed text.

    Each number is written in groups of 5 bits, the lowest first, and from the fourth on as its difference to the one
    before the last.
    """
    import numpy as np

    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    starts = np.r_[0, ends[:-1] + 1]
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (shifts[ends] + 5), 0)  # of two's complement
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
