"""JPEG."""

import re
import struct

from handlers.errors import ErrorKind, ServingError

from .base import MAX_PARTS, Header, Reader, checked, refuse
from .exif import orientation_of

# Every scan of a JPEG goes over all its pixels again, and an empty one takes less than 100 bytes: without a limit
# a small file keeps a thread busy for minutes. Encoders write about 10.
_MAX_SCANS = 64
_MAX_SCANNED_PIXELS = 2**30

_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")  # those that a length follows, and the end of the picture
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ARITHMETIC = (0xC9, 0xCA)
_PROGRESSIVE = (0xC2, 0xCA)
_BYTES_PER_PIXEL = 512  # at least a bit for each of 64


def _read_jpeg(data: bytes) -> Header:
    """The first picture of a JPEG file, of its metadata only what tells how its values become colours."""
    kept, parts, exif = [data[:2]], dict[int, bytes](), b""
    size, kind, components, scans, first_scan, end = (0, 0), 0, 0, 0, 0, 0
    position = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, position)
        if found is None:
            break
        code, start = found[1][0], found.end()
        if code == 0xD9:
            end = start
            break
        stop = start + int.from_bytes(data[start : start + 2], "big")
        body = data[start + 2 : stop] if not scans else b""
        if not scans and data.count(b"\xff", position, found.start()) != found.start() - position:
            kept.append(data[position : found.start()])  # between two segments nothing else may stand
        if code == 0xDA:
            scans += 1
            first_scan = first_scan or found.start()
        elif scans:
            pass
        elif code == 0xE1 and body.startswith(b"Exif\0\0"):
            exif = exif or body[6:]
        elif code == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            parts.setdefault(body[12], body[14:])
        elif not (0xE0 <= code <= 0xEF or code == 0xFE) or body.startswith((b"JFIF\0", b"Adobe")):
            kept.append(data[found.start() : stop])
        if code in _SIZES and not kind and len(body) >= 6:
            kind, size, components = code, struct.unpack_from(">HH", body, 1), body[5]
        position = max(start, stop)
    else:
        raise refuse(f"a JPEG of at most {MAX_PARTS} segments")
    height, width = size
    if not scans or not kind:
        raise ValueError("no picture")
    most = min(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(1, width * height))
    if scans > max(1, most):
        raise refuse(f"a JPEG of at most {most} scans at its size of {width}x{height}, got {scans}")
    if kind not in _ARITHMETIC and len(data) - first_scan < width * height // _BYTES_PER_PIXEL:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"image: broken or truncated JPEG picture of {width}x{height} pixels"
        )
    return Header(
        "JPEG",
        width,
        height,
        b"".join([*kept, data[first_scan : end or len(data)]]),
        orientation_of(exif),
        checked(b"".join(parts[i] for i in sorted(parts))),
        decoding_bytes=12 if kind in _PROGRESSIVE or components == 4 else 8,
        detail=("progressive" if kind in _PROGRESSIVE else "") + ("" if end else " endless"),
    )


READER = Reader(re.compile(rb"\xff\xd8\xff"), _read_jpeg)
