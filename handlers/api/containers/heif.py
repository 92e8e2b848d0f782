"""AVIF and HEIC."""

import re
from collections.abc import Callable

from .base import Header, Reader


def _read_heif(name: str, decoding_bytes: int) -> Callable[[bytes], Header]:
    extent = re.compile(rb"(?s)ispe.{4}(.{4})(.{4})")

    def read(data: bytes) -> Header:
        """The largest picture that the file speaks of: others are its tiles and thumbnails."""
        sizes = [(int.from_bytes(m[1], "big"), int.from_bytes(m[2], "big")) for m in extent.finditer(data[: 2**20])]
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return Header(name, width, height, data, decoding_bytes=decoding_bytes)

    return read


AVIF = Reader(re.compile(rb"(?s).{4}ftyp(avif|avis|(mif1|miaf).{0,40}avif)"), _read_heif("AVIF", 24))
HEIC = Reader(re.compile(rb"(?s).{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"), _read_heif("HEIC", 24))
