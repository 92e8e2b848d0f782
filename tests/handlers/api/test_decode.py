"""Kinds of pictures against the values that a person sees, and files made to cost: all of them generated here."""

import contextlib
import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import imagecodecs
import numpy as np
import psutil
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from handlers.api import apart
from handlers.api.decode import decode_image, read_picture
from handlers.api.frames import Frame
from handlers.errors import ErrorKind, ServingError

HEIGHT, WIDTH = 12, 16
MAX_PIXELS = 64_000_000


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    return decode_image(data, max_bytes=2**25, max_pixels=max_pixels)


def refusal(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ServingError:
    with pytest.raises(ServingError) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def scene() -> np.ndarray:
    """uint8 RGB whose values are multiples of 17, so that 4, 8, 12 and 16 bits can hold them exactly."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    planes = np.stack([columns, rows, (rows + columns) // 2], axis=-1)
    return (planes * 17).astype(np.uint8)


def grey() -> np.ndarray:
    return scene()[..., 0]


def as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def deep(values: np.ndarray, dtype: Any = np.uint16) -> np.ndarray:
    return values.astype(dtype) * dtype(257)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    options.setdefault("photometric", "rgb" if values.ndim == 3 else "minisblack")
    tifffile.imwrite(buffer, values, metadata=None, software=False, **options)
    return buffer.getvalue()


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """Rows of 12-bit samples packed by hand: encoders are rare."""
    samples = 1 if values.ndim == 2 else 3
    wide = values.astype(np.uint32) * 4095 // 255
    bits = (wide.reshape(HEIGHT, -1, 1) >> np.arange(11, -1, -1)) & 1
    pixels = np.packbits(bits.reshape(HEIGHT, -1).astype(np.uint8), axis=1).tobytes()
    entries = [(256, 3, 1, WIDTH), (257, 3, 1, HEIGHT), (259, 3, 1, 1), (262, 3, 1, 1 if samples == 1 else 2)]
    entries += [(273, 4, 1, 200), (277, 3, 1, samples), (278, 3, 1, HEIGHT), (279, 4, 1, len(pixels))]
    entries += [(258, 3, samples, 12 if samples == 1 else 190)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    return head.ljust(190, b"\0") + struct.pack("<3H", 12, 12, 12) + bytes(4) + pixels


def display_p3() -> bytes:
    """An ICC profile of Display P3's primaries with a gamma of 2.2."""
    matrix = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(number, (0.9642, 1.0, 0.8249)))}
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix, strict=True):
        tags[name] = b"XYZ \0\0\0\0" + b"".join(map(number, column))
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        tags[name] = b"curv" + struct.pack(">IIH", 0, 1, round(2.2 * 256)) + bytes(2)
    tags[b"desc"] = b"desc" + struct.pack(">II", 0, 3) + b"p3\0" + bytes(78) + bytes(3)
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    size = offset + len(body)
    head = struct.pack(">I4sI", size, b"lcms", 0x02100000) + b"mntrRGB XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acspAPPL" + bytes(24) + struct.pack(">i", 0)
    head = head[:68] + b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + body


@cache
def p3_as_srgb(red: int, green: int, blue: int) -> tuple[int, ...]:
    """One colour by the definition: linear light, primaries, sRGB's curve; no colour library."""
    matrix = np.array([(0.51512, 0.29198, 0.1571), (0.2412, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)])
    srgb = np.array([(0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.7141)])
    light = np.linalg.inv(srgb) @ matrix @ ((np.array([red, green, blue]) / 255) ** 2.2)
    light = np.clip(light, 0, 1)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in np.rint(255 * curve))


def in_p3() -> np.ndarray:
    return np.array([[p3_as_srgb(*colour) for colour in row] for row in scene().tolist()], np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: np.ndarray, depth: int, colour: int, width: int, *chunks: bytes) -> bytes:
    """A PNG of rows of bytes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    start = b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks)
    return start + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    return (
        jpeg[:2] + b"".join(b"\xff" + bytes([c]) + struct.pack(">H", len(b) + 2) + b for c, b in segments) + jpeg[2:]
    )


def xmp_of_a_turned_picture() -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )


def bmp_of_4_bits_a_channel() -> bytes:
    red, green, blue = (scene()[::-1, :, i].astype(np.uint16) // 17 for i in range(3))
    pixels = (red << 8 | green << 4 | blue).astype("<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 56, WIDTH, HEIGHT, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<IIII", 0xF00, 0x0F0, 0x00F, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels


RGB, GREY = scene(), grey()
ALPHA = np.where(np.arange(WIDTH) < 8, 255, 0).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)
OVER_WHITE = np.where(ALPHA > 0, GREY, 255).astype(np.uint8)
IMAGE = Image.fromarray(RGB)
GARBAGE = b"Exif\0\0II*\0\xff\xff\xff\x7f"
PALETTE = np.stack([np.arange(256)[::-1]] * 3).astype(np.uint16)
INKS = np.dstack([255 - RGB, np.zeros_like(GREY)])

# Kind: the file, what a person sees, and by how much a lossy format may differ.
KINDS: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {
    "TIFF, 16-bit RGB, planes apart": (
        lambda: tiff(np.moveaxis(deep(RGB), -1, 0), planarconfig="separate"),
        RGB,
        0,
    ),
    "TIFF, 8-bit RGB, planes apart": (lambda: tiff(np.moveaxis(RGB, -1, 0), planarconfig="separate"), RGB, 0),
    "TIFF, 16-bit CMYK, planes apart": (
        lambda: tiff(np.moveaxis(deep(INKS), -1, 0), photometric="separated", planarconfig="separate"),
        RGB,
        0,
    ),
    "TIFF, 8-bit CMYK": (lambda: tiff(INKS, photometric="separated"), RGB, 0),
    "TIFF, 12-bit grey": (lambda: tiff_of_12_bits(GREY), as_rgb(GREY), 0),
    "TIFF, 12-bit RGB": (lambda: tiff_of_12_bits(RGB), RGB, 0),
    "TIFF, 16-bit grey, 0 is white": (lambda: tiff(deep(255 - GREY), photometric="miniswhite"), as_rgb(GREY), 0),
    "TIFF, 8-bit grey, 0 is white": (lambda: tiff(255 - GREY, photometric="miniswhite"), as_rgb(GREY), 0),
    "TIFF, palette of 8-bit values": (
        lambda: tiff(255 - GREY, photometric="palette", colormap=PALETTE),
        as_rgb(GREY),
        0,
    ),
    "TIFF, palette": (lambda: tiff(255 - GREY, photometric="palette", colormap=deep(PALETTE)), as_rgb(GREY), 0),
    "TIFF, 32-bit grey": (lambda: tiff(GREY.astype(np.uint32) * 2**24), as_rgb(GREY), 1),
    "TIFF, float RGB": (lambda: tiff((RGB / 255).astype(np.float32)), RGB, 0),
    "TIFF, float grey of any range": (lambda: tiff(GREY.astype(np.float32) * 9 - 50), as_rgb(GREY), 1),
    "TIFF, half floats": (lambda: tiff((RGB / 255).astype(np.float16)), RGB, 1),
    "TIFF, 16-bit grey and alpha": (
        lambda: tiff(np.dstack([deep(GREY), deep(ALPHA)]), photometric="minisblack", extrasamples=["unassalpha"]),
        as_rgb(OVER_WHITE),
        0,
    ),
    "TIFF, premultiplied alpha": (
        lambda: tiff(
            np.dstack([np.where(ALPHA[..., None] > 0, RGB, 0).astype(np.uint8), ALPHA]), extrasamples=["assocalpha"]
        ),
        np.where(ALPHA[..., None] > 0, RGB, 255),
        0,
    ),
    "BigTIFF of Motorola's": (lambda: tiff(RGB, bigtiff=True, byteorder=">"), RGB, 0),
    "BigTIFF of Intel's": (lambda: tiff(RGB, bigtiff=True), RGB, 0),
    "TIFF, WebP inside": (lambda: tiff(RGB, compression="webp", compressionargs={"lossless": True}), RGB, 0),
    "TIFF, zstd, predictor": (lambda: tiff(RGB, compression="zstd", predictor=True), RGB, 0),
    "TIFF, LZW, tiles": (lambda: tiff(RGB, compression="lzw", tile=(16, 16)), RGB, 0),
    "TIFF, fax": (
        lambda: encode(Image.fromarray(GREY > 100), "TIFF", compression="group4"),
        as_rgb(np.where(GREY > 100, 255, 0).astype(np.uint8)),
        0,
    ),
    "TIFF, JPEG inside": (lambda: encode(IMAGE, "TIFF", compression="jpeg", quality=98), RGB, 20),
    "PNG, a transparent 16-bit grey": (
        lambda: png(deep(GREY).astype(">u2"), 16, 0, WIDTH, chunk(b"tRNS", struct.pack(">H", 17 * 257))),
        as_rgb(np.where(GREY == 17, 255, GREY).astype(np.uint8)),
        0,
    ),
    "PNG, a transparent 16-bit colour": (
        lambda: png(deep(RGB).astype(">u2"), 16, 2, WIDTH, chunk(b"tRNS", struct.pack(">3H", *deep(RGB[3, 5])))),
        np.where((RGB[3, 5] == RGB).all(-1, keepdims=True), 255, RGB),
        0,
    ),
    "PNG, almost a transparent 16-bit colour": (
        lambda: png(deep(RGB).astype(">u2"), 16, 2, WIDTH, chunk(b"tRNS", struct.pack(">3H", *deep(RGB[3, 5]) + 1))),
        RGB,
        0,
    ),
    "PNG, a transparent 2-bit grey": (
        lambda: png(np.full((HEIGHT, 4), 0b00011011, np.uint8), 2, 0, WIDTH, chunk(b"tRNS", b"\0\1")),
        as_rgb(np.tile(np.array([0, 255, 170, 255], np.uint8), (HEIGHT, 4))),
        0,
    ),
    "PNG, broken EXIF": (lambda: encode(IMAGE, "PNG", exif=GARBAGE, dpi=(72, 72)), RGB, 0),
    "PNG, 16-bit grey and alpha": (
        lambda: png(np.dstack([deep(GREY), deep(ALPHA)]).astype(">u2").reshape(HEIGHT, -1), 16, 4, WIDTH),
        as_rgb(OVER_WHITE),
        0,
    ),
    "PNG, Display P3": (lambda: encode(IMAGE, "PNG", icc_profile=display_p3()), in_p3(), 2),
    "PNG, broken profile": (lambda: encode(IMAGE, "PNG", icc_profile=b"no profile" * 20), RGB, 0),
    "PNG, profile of other colours": (
        lambda: encode(Image.fromarray(GREY), "PNG", icc_profile=display_p3()),
        as_rgb(GREY),
        0,
    ),
    "JPEG, Display P3": (
        lambda: encode(IMAGE, "JPEG", quality=100, subsampling=0, icc_profile=display_p3()),
        in_p3(),
        10,
    ),
    "TIFF, Display P3": (lambda: encode(IMAGE, "TIFF", icc_profile=display_p3()), in_p3(), 2),
    "WebP, Display P3": (lambda: encode(IMAGE, "WEBP", lossless=True, icc_profile=display_p3()), in_p3(), 2),
    "AVIF, Display P3": (
        lambda: encode(IMAGE, "AVIF", quality=100, subsampling="4:4:4", icc_profile=display_p3()),
        in_p3(),
        6,
    ),
    "PNG, sRGB by its profile": (
        lambda: encode(IMAGE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RGB,
        0,
    ),
    "JPEG, broken EXIF and a density": (
        lambda: encode(IMAGE, "JPEG", quality=100, subsampling=0, dpi=(72, 72), exif=GARBAGE),
        RGB,
        4,
    ),
    "JPEG, without its end": (lambda: encode(IMAGE, "JPEG", quality=100, subsampling=0)[:-2], RGB, 4),
    "JPEG, progressive, without its end": (
        lambda: encode(IMAGE, "JPEG", quality=100, subsampling=0, progressive=True)[:-2],
        RGB,
        4,
    ),
    "JPEG, turned by XMP alone": (
        lambda: with_segments(
            encode(IMAGE, "JPEG", quality=100, subsampling=0),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp_of_a_turned_picture()),
        ),
        RGB,
        4,
    ),
    "JPEG, CMYK without its end": (
        lambda: encode(IMAGE.convert("CMYK"), "JPEG", quality=100, subsampling=0)[:-2],
        RGB,
        6,
    ),
    "WebP, broken EXIF": (lambda: encode(IMAGE, "WEBP", lossless=True, exif=GARBAGE), RGB, 0),
    "WebP, transparent": (
        lambda: encode(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True),
        np.where(ALPHA[..., None] > 0, RGB, 255),
        0,
    ),
    "AVIF": (lambda: encode(IMAGE, "AVIF", quality=100, subsampling="4:4:4"), RGB, 4),
    "AVIF, turned": (
        lambda: encode(IMAGE, "AVIF", quality=100, subsampling="4:4:4", exif=turned(6)),
        np.rot90(RGB, -1),
        4,
    ),
    "JPEG 2000": (lambda: encode(IMAGE, "JPEG2000"), RGB, 0),
    "JPEG 2000, a codestream": (lambda: bytes(imagecodecs.jpeg2k_encode(RGB, codecformat="j2k", level=0)), RGB, 0),
    "JPEG 2000, 16-bit grey": (lambda: bytes(imagecodecs.jpeg2k_encode(deep(GREY), level=0)), as_rgb(GREY), 0),
    "JPEG XL": (lambda: bytes(imagecodecs.jpegxl_encode(RGB, lossless=True)), RGB, 0),
    "JPEG XL, 16-bit": (lambda: bytes(imagecodecs.jpegxl_encode(deep(RGB), lossless=True)), RGB, 0),
    "JPEG XL, transparent": (
        lambda: bytes(imagecodecs.jpegxl_encode(np.dstack([RGB, ALPHA]), lossless=True)),
        np.where(ALPHA[..., None] > 0, RGB, 255),
        0,
    ),
    "JPEG XL, in boxes": (lambda: bytes(imagecodecs.jpegxl_encode(RGB, lossless=True, usecontainer=True)), RGB, 0),
    "BMP, 4 bits a channel": (bmp_of_4_bits_a_channel, RGB, 0),
}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    make, expected, most = KINDS[kind]
    data = make()
    picture = read_picture(data, max_bytes=2**25, max_pixels=MAX_PIXELS)
    got = picture.decode()
    assert got.dtype == np.uint8
    assert sorted(picture.size) == sorted(got.shape[:2])
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= most
    for length in (len(data) // 2, len(data) // 4):
        assert refusal(data[:length]).kind is ErrorKind.BAD_REQUEST


REFUSED = {
    b"\x1f\x8b\x08" + bytes(20): "gzip data",
    b"%PDF-1.7\n": "a PDF",
    b"\0\0\0\x18ftypcrx " + bytes(20): "a camera's RAW file",
    b"II*\0\x10\0\0\0CR\2\0" + bytes(20): "a camera's RAW file",
    b"FUJIFILMCCD-RAW " + bytes(20): "a camera's RAW file",
    b"\0\0\0\x18ftypmp42" + bytes(20): "a video",
    b"\x1aE\xdf\xa3" + bytes(20): "a video",
    b"RIFF\0\0\0\0AVI " + bytes(20): "a video",
    b'{"image": "aGVsbG8="}': "JSON",
    b"[[0, 1], [2, 3]]": "JSON",
    b"https://example.org/street.jpg\n": "a URL",
    b"data:image/png;base64,iVBORw0KGgo=": "base64 text",
    b"/9j/4AAQSkZJRgABAQAAAQABAAD": "base64 text",
    b"<!DOCTYPE html><html>404</html>": "an HTML page",
    b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG",
    b"PK\3\4" + bytes(20): "a ZIP archive",
    b"8BPS\0\1" + bytes(20): "a Photoshop file",
    b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer",
    b"hello": "5 other bytes",
}


@pytest.mark.parametrize("data", REFUSED, ids=lambda data: repr(data[:12]))
def test_what_is_no_picture_is_named(data: bytes) -> None:
    error = refusal(data)
    assert error.kind is ErrorKind.BAD_REQUEST
    assert f", got {REFUSED[data]}" in str(error)
    assert len(str(error)) < 250


def tiff_of(*entries: tuple[int, int, bytes]) -> bytes:
    """A TIFF of nothing but tags: number, type and value of four bytes."""
    packed = b"".join(struct.pack("<HHI", number, kind, 1) + value for number, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        tiff_of((256, 9, struct.pack("<i", -10)), (257, 9, struct.pack("<i", -10))),
        tiff_of((256, 4, struct.pack("<I", 9)), (257, 4, struct.pack("<I", 9)), (258, 9, struct.pack("<i", -8000))),
        tiff_of((256, 4, struct.pack("<I", 9)), (257, 4, struct.pack("<I", 9)), (277, 4, struct.pack("<I", 65535))),
        b"II\x2b\0\x08\0\0\0" + b"\xff" * 8,  # BigTIFF, whose first directory lies beyond all files
        b"GIF89a\x01\0\x01\0\0\0\0" + (b"!\xfe" + b"\1a" * 30_000 + b"\0") * 2,
        b"\xff\x4f\xff\x51" + struct.pack(">HH8IH", 41, 0, 1000, 1000, 0, 0, 1, 1, 0, 0, 3),
    ],
    ids=["sides below 0", "bits below 0", "many samples", "far directory", "many blocks", "many tiles"],
)
def test_headers_that_lie(data: bytes) -> None:
    with pytest.raises(ServingError, match=r"^image: ") as raised:
        read_picture(data, max_bytes=10**6, max_pixels=10**6)
    assert raised.value.kind is ErrorKind.BAD_REQUEST


def test_a_raw_file_that_begins_as_a_tiff_with_a_thumbnail() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(RGB, photometric="rgb", subfiletype=1, subifds=1)
        writer.write(deep(GREY), photometric="minisblack")
    assert "a camera's RAW file: develop it" in str(refusal(buffer.getvalue()))
    negative = tiff(RGB, extratags=[(50706, 1, 4, b"\1\4\0\0", True)])
    assert "a camera's RAW file: develop it" in str(refusal(negative))


def gif_that_disposes_of_a_gigabyte() -> bytes:
    frame = b"\x21\xf9\x04\x08\0\0\0\0,\0\0\0\0\0\x80\0\x80\0\2\2\x44\1\0;"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame


def gif_of_comments(size: int) -> bytes:
    data = encode(Image.fromarray(GREY), "GIF")
    start = 13 + 3 * 2 ** (data[10] % 8 + 1)
    return data[:start] + b"!\xfe" + size // 256 * (b"\xff" + bytes(255)) + b"\0" + data[start:]


def png_of_profiles(count: int) -> bytes:
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(4 * 2**20)))
    return png(GREY, 8, 0, WIDTH, *count * [profile])


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A JPEG that claims many pixels, and has scans of none."""
    jpeg = encode(Image.fromarray(GREY), "JPEG", progressive=True)
    start = jpeg.index(b"\xff\xc2")
    jpeg = jpeg[: start + 5] + struct.pack(">HH", side, side) + jpeg[start + 9 :]
    scan = jpeg[jpeg.rindex(b"\xff\xda") : jpeg.rindex(b"\xff\xda") + 10] + b"\0"
    return jpeg[:-2] + count * scan + bytes(side * side // 512) + jpeg[-2:]


def webp_claim(side: int) -> bytes:
    """Lossless, of one colour: 34 bytes say all about any number of pixels."""
    head = (side - 1) | (side - 1) << 14
    body = b"\x2f" + struct.pack("<I", head) + b"\x88\x88\x08\x00\x00\x00\x00\x00\x00"
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def tiff_of_tags(count: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", 40000 + i % 20000, 7, 2**24, 8) for i in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)


JPEG = encode(IMAGE, "JPEG")

BOMBS: dict[str, Callable[[], bytes]] = {
    "GIF that disposes of a gigabyte": gif_that_disposes_of_a_gigabyte,
    "GIF of 30 MB of comments": lambda: gif_of_comments(30 * 10**6),
    "PNG of 30 MB of profiles": lambda: png_of_profiles(7000),
    "PNG of empty chunks": lambda: png(GREY, 8, 0, WIDTH, chunk(b"teXt", b"") * 2_600_000),
    "PNG of one column": lambda: (
        png(np.empty((0, 1)), 8, 2, 1)[:16] + struct.pack(">II", 1, 64_000_000) + png(np.empty((0, 1)), 8, 2, 1)[24:]
    ),
    "JPEG of 30 MB of EXIF": lambda: with_segments(JPEG, *460 * [(0xE1, b"Exif\0\0" + bytes(65_000))]),
    "JPEG of 30 MB of fill": lambda: JPEG[:2] + 30 * 10**6 * b"\xff" + JPEG[2:],
    "JPEG of 60 empty scans": lambda: jpeg_of_scans(8000, 60),
    "JPEG of 5000 empty scans": lambda: jpeg_of_scans(8000, 5000),
    "JPEG of 14 empty scans": lambda: jpeg_of_scans(8000, 14),
    "WebP of 64 megapixels in 34 bytes": lambda: webp_claim(8000),
    "TIFF of tags": lambda: tiff_of_tags(65_000),
    "JPEG XL of 30 MB of boxes": lambda: (
        b"\0\0\0\x0cJXL \r\n\x87\n" + 3 * 10**6 * struct.pack(">I4s", 8, b"free") + b"\0\0\0\0jxlc\xff\x0a" + bytes(40)
    ),
}

# Peak memory beyond the file, of this process and of the one that decodes.
MOST_MB = {"WebP of 64 megapixels in 34 bytes": 900, "JPEG of 14 empty scans": 600}
ASK = """
import resource, sys, time
from handlers.api.decode import decode_image
from handlers.errors import ServingError
data = sys.stdin.buffer.read()
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    decode_image(data, max_bytes=2**26, max_pixels=64_000_000)
except ServingError:
    pass
seconds = time.monotonic() - start
from handlers.api.apart import end_all
end_all()
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(seconds, own / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_bombs_cost(bomb: str) -> None:
    data = BOMBS[bomb]()
    done = subprocess.run([sys.executable, "-c", ASK], input=data, stdout=subprocess.PIPE, check=True)
    seconds, own, apart_mb = map(float, done.stdout.split())
    assert seconds < 30
    assert own + apart_mb - 64 < MOST_MB.get(bomb, 150), (own, apart_mb)


def test_a_decoder_that_does_not_return_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_SECONDS", 0.0)
    monkeypatch.setattr(apart, "_SECONDS_PER_MEGAPIXEL", 0.0)
    start = time.monotonic()
    assert "took longer than" in str(refusal(encode(IMAGE, "JPEG2000")))
    assert time.monotonic() - start < 10
    monkeypatch.undo()
    assert decode(encode(IMAGE, "JPEG2000")).shape == RGB.shape  # by another process


def test_decoders_inherit_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    apart.end_all()
    monkeypatch.setenv("A_SECRET", "told to nobody")
    decode(encode(IMAGE, "JPEG2000"))
    (child,) = [each for each in psutil.Process().children() if "handlers.api.other_formats" in each.cmdline()]
    assert "A_SECRET" not in child.environ()
    assert child.environ()["OMP_NUM_THREADS"] == "1"


def test_a_decoder_that_wants_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (1000, 1000)), "JPEG2000")
    decode(data)
    monkeypatch.setattr(apart, "BASE_BYTES", -34 * 10**6)
    assert "memory" in str(refusal(data))
    monkeypatch.undo()
    assert decode(data).shape == (1000, 1000, 3)


class TestReduced:
    def jpeg(self, width: int = 400, height: int = 300, **options: Any) -> bytes:
        return encode(Image.fromarray(np.full((height, width, 3), (200, 30, 30), np.uint8)), "JPEG", **options)

    @pytest.mark.parametrize(("most", "size"), [(120_000, (300, 400)), (119_999, (150, 200)), (30_000, (150, 200))])
    def test_only_above_the_limit(self, most: int, size: tuple[int, int]) -> None:
        picture = read_picture(self.jpeg(), max_bytes=2**25, max_pixels=most)
        assert not isinstance(picture, Frame)
        assert picture.size == size
        assert picture.original_size == (300, 400)
        assert picture.reduction == (1 if size == (300, 400) else 2)
        assert picture.decode().shape == (*size, 3)

    def test_turned(self) -> None:
        picture = read_picture(self.jpeg(401, exif=turned(6)), max_bytes=2**25, max_pixels=100_000)
        assert picture.size == (201, 150)
        assert picture.original_size == (401, 300)
        assert picture.decode().shape == (201, 150, 3)

    def test_others_are_refused(self) -> None:
        for data in (self.jpeg(progressive=True), self.jpeg(1000)):
            error = refusal(data, max_pixels=50_000)
            assert error.kind is ErrorKind.TOO_LARGE
            assert "baseline JPEGs of up to 200000 are decoded reduced" in str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_mutated_files() -> None:
    files = [make() for make, _, _ in KINDS.values()]
    random = np.random.default_rng(0)
    for i in range(10_000):
        data = bytearray(files[i % len(files)])
        for _ in range(random.integers(1, 6)):
            position = int(random.integers(0, len(data)))
            data[position] = random.integers(0, 256)
            if random.integers(0, 20) == 0:
                del data[position : position + int(random.integers(1, 50))]
        with contextlib.suppress(ServingError):
            got = decode(bytes(data), max_pixels=10**6)
            assert got.dtype == np.uint8
            assert got.ndim == 3
            assert got.shape[2] == 3
