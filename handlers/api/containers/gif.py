"""GIF."""

import re
import struct

from .base import MAX_PARTS, Header, Reader, refuse


def _read_gif(data: bytes) -> Header:
    """A GIF without comments and the like before its first frame."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags % 8 + 1) if flags & 0x80 else 0)
    kept = [data[:position]]
    blocks = iter(range(MAX_PARTS))
    for _ in blocks:
        if data[position : position + 1] != b"!":
            break
        stop = position + 2
        for _ in blocks:
            if not data[stop : stop + 1].strip(b"\0"):
                break
            stop += 1 + data[stop]
        else:
            raise refuse(f"a GIF of at most {MAX_PARTS} blocks before its first frame")
        if data[position + 1 : position + 2] == b"\xf9":
            kept = [kept[0], data[position : stop + 1]]
        position = stop + 1
    else:
        raise refuse(f"a GIF of at most {MAX_PARTS} blocks before its first frame")
    if data[position : position + 1] != b",":
        raise ValueError("no frame")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    if left + frame_width > width or top + frame_height > height:
        raise refuse(
            f"a GIF whose first frame lies within {width}x{height}, got one that ends at "
            f"{left + frame_width}x{top + frame_height}"
        )
    return Header("GIF", width, height, b"".join([*kept, data[position:]]), decoding_bytes=16)


READER = Reader(re.compile(rb"GIF8[79]a"), _read_gif)
