"""WebP."""

import re
import struct

from .base import MAX_PARTS, Header, Reader, checked, refuse
from .exif import orientation_of


def _read_webp(data: bytes) -> Header:
    chunks = dict[bytes, bytes]()
    position = 12
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        chunks.setdefault(name, body if name in (b"VP8X", b"ICCP", b"EXIF") else body[:10])
        position += 8 + length + length % 2
    else:
        raise refuse(f"a WebP of at most {MAX_PARTS} chunks")
    exif = chunks.get(b"EXIF", b"").removeprefix(b"Exif\0\0")
    flags = 0
    if b"VP8X" in chunks:
        flags, body = chunks[b"VP8X"][0], chunks[b"VP8X"]
        width, height = (int.from_bytes(body[i : i + 3], "little") + 1 for i in (4, 7))
    elif b"VP8L" in chunks:
        bits = int.from_bytes(chunks[b"VP8L"][1:5], "little")
        width, height, flags = bits % 2**14 + 1, (bits >> 14) % 2**14 + 1, (bits >> 28) % 2 * 16
    else:
        width, height = (side % 2**14 for side in struct.unpack_from("<HH", chunks.get(b"VP8 ", b""), 6))
    is_animation, has_alpha = flags & 2, flags & 16
    return Header(
        "WebP",
        width,
        height,
        data,
        orientation_of(exif),
        checked(chunks.get(b"ICCP", b"")),
        decoding_bytes=24 if is_animation else 16 if has_alpha else 14,
        detail="animation" if is_animation else "alpha" if has_alpha else "",
    )


READER = Reader(re.compile(rb"(?s)RIFF.{4}WEBP"), _read_webp)
