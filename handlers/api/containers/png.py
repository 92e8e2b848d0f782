"""PNG."""

import re
import struct
import zlib

from .base import MAX_PARTS, MAX_PROFILE_BYTES, Header, Reader, checked, refuse
from .exif import orientation_of

_PNG_START = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


def _read_png(data: bytes) -> Header:
    """A PNG without its metadata; the colour that is transparent is the detail, in hexadecimal."""
    if data[12:16] != b"IHDR":
        raise ValueError("no header")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    kept, profile, exif, transparent = [_PNG_START], b"", b"", b""
    position, begin, end, is_whole = 8, 8, 8, False  # from `begin` to `end` all is needed
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, position)
        stop = position + 12 + length
        is_whole = stop <= len(data)
        body = slice(position + 8, position + 8 + length)
        if name in _NEEDED or (name == b"tRNS" and colour == 3):
            if end != position:
                kept.append(data[begin:end])
                begin = position
            end = stop
        elif name == b"tRNS":
            transparent = transparent or data[body][:6]
        elif name == b"iCCP" and not profile:
            profile = _inflate(data[body].partition(b"\0")[2][1:])
        elif name == b"eXIf":
            exif = exif or data[body]
        position = stop
        if name == b"IEND" or not is_whole:
            break
    else:
        raise refuse(f"a PNG of at most {MAX_PARTS} chunks")
    kept.append(data[begin:end])
    if is_whole:
        kept.append(_PNG_END)
    return Header(
        "PNG",
        width,
        height,
        b"".join(kept),
        orientation_of(exif),
        profile,
        decoding_bytes=12 if depth == 16 and colour != 0 else 8,
        detail=f"{depth} {colour} {transparent.hex()}",
    )


def _inflate(data: bytes) -> bytes:
    """A profile, empty if it is broken."""
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(data, MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
    return checked(profile)


READER = Reader(re.compile(re.escape(_PNG_START)), _read_png)
