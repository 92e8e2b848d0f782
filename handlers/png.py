"""PNG's container, for whoever writes one without a codec."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_file(width: int, height: int, depth: int, color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """The signature, a header, these chunks of a kind and its data, and the end."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as a PNG's header says; None if the bytes are no PNG."""
    if not data.startswith(SIGNATURE) or len(data) < 33:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height
