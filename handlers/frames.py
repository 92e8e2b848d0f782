"""Raw frames: uncompressed RGB pixels as a NumPy file, for callers that have them anyway."""

import io
import math

import numpy as np

from .errors import ErrorKind, ServingError

_MAGIC = b"\x93NUMPY"


def is_frame(data: bytes | bytearray) -> bool:
    """Whether data claims to be a NumPy file."""
    return data[: len(_MAGIC)] == _MAGIC


def read_frame_size(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Height and width of a frame, from its header; refuses what `decode_frame` would."""
    height, width, _ = _read_header(data, max_bytes, max_pixels)
    return height, width


def decode_frame(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """The pixels of a frame, without copying them where data is immutable.

    Args:
        data: a NumPy file (`numpy.save`) of uint8 [H, W, 3] in C order.
        max_bytes: longer data is refused.
        max_pixels: larger frames are refused from their header.

    Returns:
        uint8 RGB [H, W, 3], read-only.

    Raises:
        ServingError: too large, or not such a frame.
    """
    height, width, offset = _read_header(data, max_bytes, max_pixels)
    return np.frombuffer(bytes(data), np.uint8, offset=offset).reshape(height, width, 3)


def _read_header(data: bytes | bytearray, max_bytes: int, max_pixels: int) -> tuple[int, int, int]:
    """Height, width, and where the pixels begin."""
    if len(data) > max_bytes:
        raise ServingError(ErrorKind.TOO_LARGE, f"image: expected at most {max_bytes} bytes, got {len(data)}")
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # a parser of text that may be anything
        raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the .npy frame is broken") from error
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1 or dtype != np.uint8 or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"image: expected a .npy frame of uint8 [H, W, 3] in C order, got {dtype} {list(shape)}{order}"[:200],
        )
    height, width, _ = shape
    if height * width > max_pixels:
        raise ServingError(
            ErrorKind.TOO_LARGE,
            f"image: expected at most {max_pixels} pixels, got {width}x{height} = {width * height}",
        )
    pixels = len(data) - file.tell()
    if pixels != math.prod(shape):
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"image: expected {math.prod(shape)} bytes of pixels for a .npy frame of {width}x{height}, got {pixels}",
        )
    return height, width, file.tell()
