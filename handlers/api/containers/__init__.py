"""What files of pictures say before their pixels: which format, how large, which way up, which colours.

Nothing here decodes. Parsers are bounded by the length of the file and by the limits in `base`, and what nobody needs
(comments, previews, text) is left out of what decoders get. To add a format: write its file here and its entry in
READERS, and say in `decode` or `other_formats` what decodes it.
"""

import re
import struct
from collections.abc import Mapping

from handlers.errors import ErrorKind, ServingError

from . import bmp, gif, heif, jpeg, jpeg2000, jpegxl, png, tiff, webp
from .base import Header, Reader
from .exif import orientation_of
from .refused import NAMES, OFFERED

__all__ = ["MAX_SIDE", "OFFERED", "READERS", "Header", "orientation_of", "read_header"]

MAX_SIDE = 65_535  # rows cost memory of their own

READERS: Mapping[str, Reader] = {  # the first whose pattern a file begins with
    "JPEG": jpeg.READER,
    "PNG": png.READER,
    "WebP": webp.READER,
    "GIF": gif.READER,
    "BMP": bmp.READER,
    "TIFF": tiff.READER,
    "AVIF": heif.AVIF,
    "HEIC": heif.HEIC,
    "JPEG 2000": jpeg2000.READER,
    "JPEG XL": jpegxl.READER,
}


def read_header(data: bytes) -> Header:
    """Find out from its content what a file is, and read its header.

    Raises:
        ServingError: not a picture that we decode, or broken where it can't be.
    """
    for reader in READERS.values():
        if reader.pattern.match(data):
            try:
                return reader.read(data)
            except (ValueError, IndexError, OverflowError, StopIteration, struct.error) as error:
                raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the picture is broken") from error
    start = data[:1000]
    told = next((name for pattern, name in NAMES if re.match(pattern, start)), f"{len(data)} other bytes")
    raise ServingError(ErrorKind.BAD_REQUEST, f"image: expected {OFFERED}, got {told}")
