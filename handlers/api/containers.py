"""What files of pictures say before their pixels: which format, how large, which way up, which colours.

Nothing here decodes. Parsers are bounded by the length of the file and by the limits below, and what nobody needs
(comments, previews, text) is left out of what decoders get.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from handlers.errors import ErrorKind, ServingError

OFFERED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, JPEG XL or JPEG 2000, or a .npy frame"

MAX_SIDE = 65_535  # rows cost memory of their own
_MAX_PROFILE_BYTES = 4 * 2**20  # those of printers have one or two megabytes

# Every scan of a JPEG goes over all its pixels again, and an empty one takes less than 100 bytes: without a limit
# a small file keeps a thread busy for minutes. Encoders write about 10.
_MAX_SCANS = 64
_MAX_SCANNED_PIXELS = 2**30
_MAX_SAMPLES = 8  # of a TIFF; a negative or huge number would be believed when memory is counted
_MAX_PARTS = 50_000  # segments, chunks, boxes or blocks of a file

_RAW = "a camera's RAW file: develop it to JPEG or TIFF"
_TEXT = rb"(?is)(\xef\xbb\xbf)?\s*"
_NAMES: tuple[tuple[bytes, str], ...] = (  # how what we refuse begins, and what to do
    (rb"\x1f\x8b", "gzip data: send the picture itself"),
    (rb"%PDF", "a PDF: render its page as PNG or JPEG"),
    (rb"(?s).{4}ftypcrx|II\x2a\0.{4}CR|IIU\0|IIRO|IIRS|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM", _RAW),
    (
        rb"(?s).{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01[\xb3\xba]|FLV\x01|OggS",
        "a video: send one of its frames as JPEG or PNG",
    ),
    (_TEXT + rb"(https?|ftp|file|s3|gs)://", "a URL: send the bytes of the picture"),
    (_TEXT + rb"data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD", "base64 text: send the bytes of the picture"),
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file with `git lfs pull`"),
    (_TEXT + rb'(\{\s*["}]|\[\s*["{\d\[\]])', "JSON: send the bytes of the picture as the body"),
    (_TEXT + rb"(<\?xml[^>]{0,200}>\s*)?(<!--.{0,200}-->\s*)?(<!doctype svg|<svg)", "an SVG: render it as PNG"),
    (_TEXT + rb"<(!doctype html|html|head|body)", "an HTML page, maybe an error's: send the picture itself"),
    (rb"PK\x03\x04", "a ZIP archive: send the pictures in it one by one"),
    (rb"8BPS", "a Photoshop file: export it as PNG or JPEG"),
    (rb"\x76\x2f\x31\x01|#\?RADIANCE", "an HDR picture: export it as PNG or JPEG"),
    (rb"(?s).{128}DICM", "a DICOM file: export its picture as PNG or TIFF"),
    (rb"P[1-7]\s", "a PNM picture: convert it to PNG"),
    (rb"\0\0\x01\0", "an icon: convert it to PNG"),
    (rb"(?s)--\S{1,70}\r\nContent-", "a form that was not parsed: send it as multipart/form-data, or the bytes alone"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a picture says.

    Attributes:
        format: its name, as people write it.
        width, height: as stored.
        data: what a decoder needs of the file.
        orientation: EXIF's, 1 to 8.
        profile: of its colours, as ICC wrote it down; empty for sRGB.
        decoding_bytes: that decoding takes at most for each pixel.
        detail: what the decoder of this format wants to know beside.
        unpacked: pixels that decoding unpacks where they are more than the picture's.
    """

    format: str
    width: int
    height: int
    data: bytes
    orientation: int = 1
    profile: bytes = b""
    decoding_bytes: int = 8
    detail: str = ""
    unpacked: int = 0

    @property
    def num_pixels(self) -> int:
        """What decoding unpacks."""
        return max(self.width * self.height, self.unpacked)


def read_header(data: bytes) -> Header:
    """Find out from its content what a file is, and read its header.

    Raises:
        ServingError: not a picture that we decode, or broken where it can't be.
    """
    for pattern, read in _FORMATS:
        if pattern.match(data):
            try:
                return read(data)
            except (ValueError, IndexError, OverflowError, StopIteration, struct.error) as error:
                raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the picture is broken") from error
    start = data[:1000]
    told = next((name for pattern, name in _NAMES if re.match(pattern, start)), f"{len(data)} other bytes")
    raise ServingError(ErrorKind.BAD_REQUEST, f"image: expected {OFFERED}, got {told}")


def _refuse(expected: str) -> ServingError:
    return ServingError(ErrorKind.BAD_REQUEST, f"image: expected {expected}")


# JPEG

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
    for _ in range(_MAX_PARTS):
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
        raise _refuse(f"a JPEG of at most {_MAX_PARTS} segments")
    height, width = size
    if not scans or not kind:
        raise ValueError("no picture")
    most = min(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(1, width * height))
    if scans > max(1, most):
        raise _refuse(f"a JPEG of at most {most} scans at its size of {width}x{height}, got {scans}")
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
        _checked(b"".join(parts[i] for i in sorted(parts))),
        decoding_bytes=12 if kind in _PROGRESSIVE or components == 4 else 8,
        detail=("progressive" if kind in _PROGRESSIVE else "") + ("" if end else " endless"),
    )


# PNG

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
    for _ in range(_MAX_PARTS):
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
        raise _refuse(f"a PNG of at most {_MAX_PARTS} chunks")
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
        profile = inflater.decompress(data, _MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return b""
    return _checked(profile)


def _checked(profile: bytes) -> bytes:
    if len(profile) > _MAX_PROFILE_BYTES:
        raise _refuse(f"a colour profile of at most {_MAX_PROFILE_BYTES} bytes")
    return profile


# WebP, GIF, BMP


def _read_webp(data: bytes) -> Header:
    chunks = dict[bytes, bytes]()
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        chunks.setdefault(name, body if name in (b"VP8X", b"ICCP", b"EXIF") else body[:10])
        position += 8 + length + length % 2
    else:
        raise _refuse(f"a WebP of at most {_MAX_PARTS} chunks")
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
        _checked(chunks.get(b"ICCP", b"")),
        decoding_bytes=24 if is_animation else 16 if has_alpha else 14,
        detail="animation" if is_animation else "alpha" if has_alpha else "",
    )


def _read_gif(data: bytes) -> Header:
    """A GIF without comments and the like before its first frame."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags % 8 + 1) if flags & 0x80 else 0)
    kept = [data[:position]]
    blocks = iter(range(_MAX_PARTS))
    for _ in blocks:
        if data[position : position + 1] != b"!":
            break
        stop = position + 2
        for _ in blocks:
            if not data[stop : stop + 1].strip(b"\0"):
                break
            stop += 1 + data[stop]
        else:
            raise _refuse(f"a GIF of at most {_MAX_PARTS} blocks before its first frame")
        if data[position + 1 : position + 2] == b"\xf9":
            kept = [kept[0], data[position : stop + 1]]
        position = stop + 1
    else:
        raise _refuse(f"a GIF of at most {_MAX_PARTS} blocks before its first frame")
    if data[position : position + 1] != b",":
        raise ValueError("no frame")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    if left + frame_width > width or top + frame_height > height:
        raise _refuse(
            f"a GIF whose first frame lies within {width}x{height}, got one that ends at "
            f"{left + frame_width}x{top + frame_height}"
        )
    return Header("GIF", width, height, b"".join([*kept, data[position:]]), decoding_bytes=16)


def _read_bmp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return Header("BMP", abs(width), abs(height), data, decoding_bytes=16)


# TIFF, and EXIF, which is one

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


def _read_tiff(data: bytes) -> Header:
    tags = tiff_tags(data)

    def tag(number: int, default: int) -> int:
        return (tags.get(number) or (default,))[0]

    is_reduced, has_more = tag(254, 0) & 1, 330 in tags
    if 50706 in tags or tag(262, 0) in (32803, 34892) or (is_reduced and has_more):
        raise _refuse(f"{OFFERED}, got {_RAW}")
    width, height = tag(256, 0), tag(257, 0)
    if not (width and height):
        raise ValueError("no size")
    samples, bits = tag(277, 1), max(tags.get(258) or (1,))
    if not (1 <= samples <= _MAX_SAMPLES and 1 <= bits <= 64):
        raise _refuse(f"a TIFF of 1 to {_MAX_SAMPLES} samples a pixel of 1 to 64 bits, got {samples} of {bits}")
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


# AVIF, HEIC, JPEG 2000, JPEG XL


def _read_heif(name: str, decoding_bytes: int) -> Callable[[bytes], Header]:
    extent = re.compile(rb"(?s)ispe.{4}(.{4})(.{4})")

    def read(data: bytes) -> Header:
        """The largest picture that the file speaks of: others are its tiles and thumbnails."""
        sizes = [(int.from_bytes(m[1], "big"), int.from_bytes(m[2], "big")) for m in extent.finditer(data[: 2**20])]
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return Header(name, width, height, data, decoding_bytes=decoding_bytes)

    return read


def _read_jpeg2000(data: bytes) -> Header:
    at = data.index(b"\xff\x4f\xff\x51", 0, 2**20)
    right, bottom, left, top = struct.unpack_from(">IIII", data, at + 8)
    tile_width, tile_height = struct.unpack_from(">II", data, at + 24)
    (components,) = struct.unpack_from(">H", data, at + 40)
    if components > 4:
        raise _refuse(f"a JPEG 2000 picture of at most 4 components, got {components}")
    if -(-right // max(1, tile_width)) * -(-bottom // max(1, tile_height)) > _MAX_PARTS:
        raise _refuse(f"a JPEG 2000 picture of at most {_MAX_PARTS} tiles")
    return Header("JPEG 2000", right - left, bottom - top, data, decoding_bytes=12 * max(components, 3))


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
    for _ in range(_MAX_PARTS):
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


_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Header]], ...] = tuple(
    (re.compile(pattern), read)
    for pattern, read in (
        (rb"\xff\xd8\xff", _read_jpeg),
        (rb"\x89PNG\r\n\x1a\n", _read_png),
        (rb"(?s)RIFF.{4}WEBP", _read_webp),
        (rb"GIF8[79]a", _read_gif),
        (rb"(?s)BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", _read_bmp),
        (rb"(?s)(II[\x2a\x2b]\0(?!.{4}CR)|MM\0[\x2a\x2b])", _read_tiff),
        (rb"(?s).{4}ftyp(avif|avis|(mif1|miaf).{0,40}avif)", _read_heif("AVIF", 24)),
        (rb"(?s).{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", _read_heif("HEIC", 24)),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _read_jpeg2000),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", _read_jpegxl),
    )
)
