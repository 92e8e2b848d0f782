"""TIFF, which cameras' RAW files are too."""

import re

from .base import Header, Reader, refuse
from .exif import tiff_tags
from .refused import OFFERED, RAW

_MAX_SAMPLES = 8  # a negative or huge number would be believed when memory is counted


def _read_tiff(data: bytes) -> Header:
    tags = tiff_tags(data)

    def tag(number: int, default: int) -> int:
        return (tags.get(number) or (default,))[0]

    is_reduced, has_more = tag(254, 0) & 1, 330 in tags
    if 50706 in tags or tag(262, 0) in (32803, 34892) or (is_reduced and has_more):
        raise refuse(f"{OFFERED}, got {RAW}")
    width, height = tag(256, 0), tag(257, 0)
    if not (width and height):
        raise ValueError("no size")
    samples, bits = tag(277, 1), max(tags.get(258) or (1,))
    if not (1 <= samples <= _MAX_SAMPLES and 1 <= bits <= 64):
        raise refuse(f"a TIFF of 1 to {_MAX_SAMPLES} samples a pixel of 1 to 64 bits, got {samples} of {bits}")
    stored = -(-samples * bits // 8)
    return Header(
        "TIFF",
        width,
        height,
        data,
        orientation=min(max(tag(274, 1), 1), 8),
        decoding_bytes=3 * stored + 16,
        unpacked=max(width, tag(322, 0)) * max(height, tag(323, 0)),  # tiles may be larger than the picture
    )


READER = Reader(re.compile(rb"(?s)(II[\x2a\x2b]\0(?!.{4}CR)|MM\0[\x2a\x2b])"), _read_tiff)
