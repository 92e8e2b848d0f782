"""What every reader of a format gives, within which limits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from handlers.errors import ErrorKind, ServingError

MAX_PROFILE_BYTES = 4 * 2**20  # those of printers have one or two megabytes
MAX_PARTS = 50_000  # segments, chunks, boxes or blocks of a file


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a picture says.

    Attributes:
        format: its name, as people write it.
        width, height: as stored.
        data: what a decoder needs of the file.
        orientation: EXIF's, 1 to 8.
        profile: of its colours, as ICC wrote it down; empty for sRGB.
        decoding_bytes: that decoding takes at most for each pixel.
        detail: what the decoder of this format wants to know beside.
        unpacked: pixels that decoding unpacks where they are more than the picture's.
    """

    format: str
    width: int
    height: int
    data: bytes
    orientation: int = 1
    profile: bytes = b""
    decoding_bytes: int = 8
    detail: str = ""
    unpacked: int = 0

    @property
    def num_pixels(self) -> int:
        """What decoding unpacks."""
        return max(self.width * self.height, self.unpacked)


class Reader(NamedTuple):
    """How the files of a format begin, and what reads their headers."""

    pattern: re.Pattern[bytes]
    read: Callable[[bytes], Header]


def refuse(expected: str) -> ServingError:
    return ServingError(ErrorKind.BAD_REQUEST, f"image: expected {expected}")


def checked(profile: bytes) -> bytes:
    if len(profile) > MAX_PROFILE_BYTES:
        raise refuse(f"a colour profile of at most {MAX_PROFILE_BYTES} bytes")
    return profile
