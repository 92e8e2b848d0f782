"""JPEG XL."""

import re
import struct
from collections.abc import Callable, Iterator

from .base import MAX_PARTS, Header, Reader


def _bits(data: bytes) -> Callable[[int], int]:
    """Take bits of what JPEG XL begins with, the lowest first."""
    value, position = int.from_bytes(data, "little"), 0

    def take(number: int) -> int:
        nonlocal position
        position += number
        return value >> (position - number) & ((1 << number) - 1)

    return take


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Names of boxes, and where their contents begin and end."""
    position = 0
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        stop = position + length if length else len(data)
        yield name, start, min(stop, len(data))
        position = max(stop, start)


def _read_jpegxl(data: bytes) -> Header:
    begin = 0
    if data[:2] != b"\xff\x0a":
        begin = next(
            start + (4 if name == b"jxlp" else 0) for name, start, _ in _boxes(data) if name in (b"jxlc", b"jxlp")
        )
    take = _bits(data[begin + 2 : begin + 34])

    def side() -> int:
        return take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1)
    height = 8 * (take(5) + 1) if is_small else side()
    ratio = take(3)
    if ratio:
        over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
        width = height * over // under
    else:
        width = 8 * (take(5) + 1) if is_small else side()
    return Header("JPEG XL", width, height, data, decoding_bytes=48)


READER = Reader(re.compile(rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a"), _read_jpegxl)
