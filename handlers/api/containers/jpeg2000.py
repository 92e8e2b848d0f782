"""JPEG 2000."""

import re
import struct

from .base import MAX_PARTS, Header, Reader, refuse


def _read_jpeg2000(data: bytes) -> Header:
    at = data.index(b"\xff\x4f\xff\x51", 0, 2**20)
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    tile_width, tile_height = struct.unpack_from(">II", data, at + 24)
    (components,) = struct.unpack_from(">H", data, at + 40)
    if components > 4:
        raise refuse(f"a JPEG 2000 picture of at most 4 components, got {components}")
    if -(-right // max(1, tile_width)) * -(-bottom // max(1, tile_height)) > MAX_PARTS:
        raise refuse(f"a JPEG 2000 picture of at most {MAX_PARTS} tiles")
    return Header("JPEG 2000", right - left, bottom - top, data, decoding_bytes=12 * max(components, 3))


READER = Reader(re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), _read_jpeg2000)
