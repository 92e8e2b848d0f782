"""BMP."""

import re
import struct

from .base import Header, Reader


def _read_bmp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return Header("BMP", abs(width), abs(height), data, decoding_bytes=16)


READER = Reader(re.compile(rb"(?s)BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"), _read_bmp)
