"""Raw frames: uncompressed RGB pixels as a NumPy file, for callers that have them anyway."""

import math
import re
import struct
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from handlers.errors import ErrorKind, ServingError

_MAGIC = b"\x93NUMPY"
# What every writer of such files writes. NumPy itself parses Python here, which CPython 3.11 now and then fails to do
# in several threads at once (SystemError: AST constructor recursion depth mismatch).
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,12}, ?){0,8}(?:[0-9]{1,12})?)\),? ?\}\s*"
)
_UINT8 = ("|u1", "<u1", ">u1", "=u1", "u1")


class NpyHeader(NamedTuple):
    """What a NumPy file holds, and where its values begin."""

    descr: str
    fortran_order: bool
    shape: tuple[int, ...]
    offset: int


def read_header(data: bytes | bytearray) -> NpyHeader:
    """Parse the header of a NumPy file of plain numbers.

    Raises:
        ValueError: it has none.

    Source: numpy.lib.format, versions 1.0 to 3.0.
    """
    length_format = "<H" if data[6:7] == b"\x01" else "<I"
    start = len(_MAGIC) + 2 + struct.calcsize(length_format)
    if not is_frame(data) or data[6:7] not in (b"\x01", b"\x02", b"\x03") or len(data) < start:
        raise ValueError("not a NumPy file of version 1, 2 or 3")
    (length,) = struct.unpack_from(length_format, data, len(_MAGIC) + 2)
    found = _HEADER.fullmatch(data, start, start + min(length, 10_000))
    if found is None or start + length > len(data):
        raise ValueError("not the header of plain numbers")
    shape = tuple(int(size) for size in found[3].replace(b" ", b"").split(b",") if size)
    return NpyHeader(found[1].decode("latin-1"), found[2] == b"True", shape, start + length)


def is_frame(data: bytes | bytearray) -> bool:
    """Whether data claims to be a NumPy file."""
    return data[: len(_MAGIC)] == _MAGIC


@dataclass(frozen=True, slots=True)
class Frame:
    """A raw frame whose header was read.

    Attributes:
        size: height and width in pixels.
        num_bytes: of the file.
    """

    size: tuple[int, int]
    num_bytes: int
    _data: bytes
    _offset: int

    # As an EncodedPicture has them.
    reduction: ClassVar[int] = 1
    decoding_bytes: ClassVar[int] = 0
    is_apart: ClassVar[bool] = False

    @property
    def original_size(self) -> tuple[int, int]:
        return self.size

    def decode(self) -> np.ndarray:
        """uint8 RGB [H, W, 3], read-only and not copied."""
        return np.frombuffer(self._data, np.uint8, offset=self._offset).reshape(*self.size, 3)


def read_frame(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> Frame:
    """Read the header of a frame.

    Args:
        data: a NumPy file (`numpy.save`) of uint8 [H, W, 3] in C order; only what can change is copied.
        max_bytes: longer data is refused.
        max_pixels: larger frames are refused.

    Raises:
        ServingError: too large, or not such a frame.
    """
    height, width, offset = _read_header(data, max_bytes, max_pixels)
    return Frame((height, width), len(data), bytes(data), offset)


def _read_header(data: bytes | bytearray, max_bytes: int, max_pixels: int) -> tuple[int, int, int]:
    """Height, width, and where the pixels begin."""
    if len(data) > max_bytes:
        raise ServingError(ErrorKind.TOO_LARGE, f"image: expected at most {max_bytes} bytes, got {len(data)}")
    try:
        descr, fortran_order, shape, offset = read_header(data)
    except ValueError as error:
        raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the .npy frame is broken") from error
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1 or descr not in _UINT8 or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"image: expected a .npy frame of uint8 [H, W, 3] in C order, got {descr!r} {list(shape)}{order}",
        )
    height, width, _ = shape
    if height * width > max_pixels:
        raise ServingError(
            ErrorKind.TOO_LARGE,
            f"image: expected at most {max_pixels} pixels, got {width}x{height} = {width * height}",
        )
    if len(data) - offset != math.prod(shape):
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"image: expected {math.prod(shape)} bytes of pixels for a .npy frame of {width}x{height}, "
            f"got {len(data) - offset}",
        )
    return height, width, offset
