"""Tags of TIFF's, of which EXIF is one."""

import struct
from collections.abc import Mapping

_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q"}
_WIDTHS = {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8, 13: 4, 17: 8, 18: 8}
_MAX_TAGS = 1000


def tiff_tags(data: bytes) -> Mapping[int, tuple[int, ...]]:
    """Tags of the first directory of a TIFF that hold a few integers; others are empty.

    Raises:
        ValueError, struct.error: it has none.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("neither II nor MM")
    is_big = data[2:4] in (b"+\0", b"\0+")
    offset, count, entry, inline = ("Q", "Q", "HHQ", 8) if is_big else ("I", "H", "HHI", 4)
    (position,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
    (number,) = struct.unpack_from(order + count, data, position)
    position += struct.calcsize(order + count)
    tags = dict[int, tuple[int, ...]]()
    for i in range(min(number, _MAX_TAGS)):
        at = position + i * (struct.calcsize(order + entry) + inline)
        tag, kind, values = struct.unpack_from(order + entry, data, at)
        at += struct.calcsize(order + entry)
        tags[tag] = ()
        if kind in _TYPES and values <= 16:
            form = f"{order}{values}{_TYPES[kind]}"
            if struct.calcsize(form) > inline:
                (at,) = struct.unpack_from(order + offset, data, at)
            if at + struct.calcsize(form) <= len(data):
                tags[tag] = struct.unpack_from(form, data, at)
    return tags


def orientation_of(exif: bytes) -> int:
    """1 to 8, and 1 for what is broken or missing."""
    try:
        (orientation,) = tiff_tags(exif).get(274, (1,)) or (1,)
    except (ValueError, OverflowError, struct.error):
        return 1
    return orientation if 1 <= orientation <= 8 else 1
