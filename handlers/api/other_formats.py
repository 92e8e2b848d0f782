"""Formats other than JPEG and PNG, decoded in a process of their own: `python -m handlers.api.other_formats FD`."""

import io
import json
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image

from handlers.errors import ErrorKind, ServingError

from .apart import send_json
from .colours import convert, image_to_rgb, over_white, own_range, to_srgb
from .containers import orientation_of

_IDLE_SECONDS = 60.0
_PILLOW = {"GIF": "GIF", "BMP": "BMP", "AVIF": "AVIF", "JPEG 2000": "JPEG2000", "HEIC": "HEIF", "WebP": "WEBP"}

Image.MAX_IMAGE_PIXELS = None  # the limit is what the header said
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each has a stack, and there may be many cores

Decoded = tuple[np.ndarray, int]


def decode(told: Mapping[str, Any], profile: bytes, data: bytes) -> Decoded:
    """uint8 RGB pixels as they are stored, and the orientation; any exception means that the file is broken.

    Args:
        told: fields of `containers.Header`.
        profile: of its colours; where it is empty, the decoder may find one.
        data: the file.
    """
    name = told["format"]
    if name == "TIFF":
        return _decode_tiff(told, data), told["orientation"]
    if name == "JPEG XL":
        import imagecodecs

        return _array_to_rgb(_no_more(imagecodecs.jpegxl_decode(data, numthreads=1), told), profile), 1
    if name == "WebP" and told["detail"] != "animation":
        import imagecodecs

        pixels = imagecodecs.webp_decode(data, hasalpha=told["detail"] == "alpha")
        return _array_to_rgb(_no_more(pixels, told), profile), told["orientation"]
    if name == "BMP" and data[28:34] == b"\x10\0\3\0\0\0":
        return _decode_bmp_of_masks(told, data), 1
    return _decode_with_pillow(told, profile, data)


def _decode_with_pillow(told: Mapping[str, Any], profile: bytes, data: bytes) -> Decoded:
    if told["format"] == "HEIC":
        import pi_heif

        pi_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    image = Image.open(io.BytesIO(data), formats=[_PILLOW[told["format"]]])
    _check_size(image.width, image.height, told)
    orientation = told["orientation"]
    if told["format"] in ("AVIF", "HEIC"):
        orientation = orientation_of((image.info.get("exif") or b"").removeprefix(b"Exif\0\0"))
    profile = profile or image.info.get("icc_profile") or b""
    image.load()
    return image_to_rgb(image, profile), orientation


def _decode_bmp_of_masks(told: Mapping[str, Any], data: bytes) -> np.ndarray:
    """A BMP of 16 bits a pixel, which masks give to red, green and blue."""
    (start,) = struct.unpack_from("<I", data, 10)
    (height,) = struct.unpack_from("<i", data, 22)
    width, masks = told["width"], struct.unpack_from("<3I", data, 54)
    stride = -(-width // 2) * 2
    rows = np.frombuffer(data, "<u2", abs(height) * stride, start).reshape(abs(height), stride)[:, :width]
    rows = rows[::-1] if height > 0 else rows
    planes = []
    for mask in masks:
        low = mask & -mask
        values = (rows & np.uint16(mask)).astype(np.uint32) // low
        planes.append((values * 255 // (mask // low)).astype(np.uint8))
    return np.stack(planes, axis=-1)


def _check_size(width: int, height: int, told: Mapping[str, Any]) -> None:
    if width * height > told["width"] * told["height"]:
        raise ValueError(f"{width}x{height} pixels where the header says {told['width']}x{told['height']}")


def _no_more(pixels: np.ndarray, told: Mapping[str, Any]) -> np.ndarray:
    _check_size(pixels.shape[1], pixels.shape[0], told)
    return pixels


def _array_to_rgb(
    pixels: np.ndarray, profile: bytes = b"", *, bits: int = 0, premultiplied: bool = False
) -> np.ndarray:
    """RGB of grey, grey and alpha, RGB or RGBA [H, W(, S)], of whole numbers with so many bits, or of floats."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, samples = pixels.shape
    num_colours = 1 if samples < 3 else 3
    to_bytes = _to_bytes(pixels[..., :num_colours], bits)
    transform = to_srgb(profile, "L" if num_colours == 1 else "RGB")
    if pixels.dtype == np.uint8 and bits in (0, 8) and samples == 3 and transform is None:
        return pixels

    def part(rows: slice) -> np.ndarray:
        strip = pixels[rows]
        shown = to_bytes(strip[..., :num_colours])
        shown = shown[..., 0] if num_colours == 1 else shown
        alpha = _to_bytes(strip[..., -1], bits)(strip[..., -1]) if samples in (2, 4) else None
        if alpha is not None and premultiplied:
            whole = np.maximum(alpha, 1).astype(np.uint32)
            shown = np.minimum(shown.astype(np.uint32) * 255 // (whole if shown.ndim == 2 else whole[..., None]), 255)
            shown = shown.astype(np.uint8)
        shown = transform(np.ascontiguousarray(shown)) if transform else shown
        return shown if alpha is None else over_white(shown, alpha)

    return convert(height, width, part)


def _to_bytes(values: np.ndarray, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Whole numbers from 0 have a fixed range, and so have floats of colours within 0 and 1; others their own."""
    if values.dtype == bool:
        return lambda part: part.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        depth = bits or 8 * values.dtype.itemsize
        if depth < 8:
            return lambda part: (part.astype(np.uint16) * 255 // (2**depth - 1)).astype(np.uint8)
        return lambda part: (part >> (depth - 8)).astype(np.uint8)
    if values.dtype.kind == "f" and (values.ndim == 2 or values.shape[-1] > 1):
        with np.errstate(invalid="ignore"):
            if float(np.min(values)) >= 0 and float(np.max(values)) <= 1:
                return lambda part: np.rint(part * np.float64(255)).astype(np.uint8)
    return own_range(values)


# TIFF

_TO_PILLOW = (6, 8)  # YCbCr and L*a*b*, and
_FAXES_AND_OLD_JPEG = (2, 3, 4, 6)  # ways to compress, that libtiff knows


def _decode_tiff(told: Mapping[str, Any], data: bytes) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        profile = page.tags[34675].value if 34675 in page.tags else b""
        _check_size(page.imagewidth, page.imagelength, told)
        if page.imagedepth != 1 or page.photometric in (32803, 34892):
            raise ServingError(
                ErrorKind.BAD_REQUEST, "image: expected a TIFF of a flat picture, got layers or RAW data"
            )
        if page.photometric in _TO_PILLOW or page.compression in _FAXES_AND_OLD_JPEG:
            image = Image.open(io.BytesIO(data), formats=["TIFF"])
            _check_size(image.width, image.height, told)
            image.info.pop("icc_profile", None)
            image.load()
            return image_to_rgb(image, profile if image.mode in ("L", "RGB") else b"")
        samples, bits = page.samplesperpixel, page.bitspersample
        if not isinstance(bits, int) or samples > 5:
            raise ServingError(
                ErrorKind.BAD_REQUEST,
                f"image: expected a TIFF of 1 to 5 samples a pixel, all of one depth, got {samples} of {bits} bits",
            )
        pixels = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and samples > 1:
            pixels = np.moveaxis(pixels.reshape(samples, page.imagelength, page.imagewidth), 0, -1)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, samples)
        photometric, extra = int(page.photometric), tuple(map(int, page.extrasamples or ()))
        colormap: Any = page.colormap
    if photometric == 3:
        colours = colormap if colormap.max() < 256 else colormap >> 8
        palette = np.ascontiguousarray(colours.T.astype(np.uint8))
        return _array_to_rgb_by_palette(pixels[..., 0], palette, profile)
    if photometric == 5:
        return _cmyk_to_rgb(pixels, bits, profile)
    num_colours = 3 if photometric == 2 else 1
    has_alpha = samples > num_colours and extra[:1] in ((1,), (2,))
    pixels = pixels[..., : num_colours + has_alpha]
    if photometric == 0:
        grey = pixels[..., :1]
        if grey.dtype == bool:
            grey = ~grey
        elif grey.dtype.kind == "u":
            grey = (2**bits - 1) - grey
        else:
            grey = -grey
        pixels = np.concatenate([grey, pixels[..., 1:]], axis=-1) if has_alpha else grey
    return _array_to_rgb(pixels, profile, bits=bits, premultiplied=has_alpha and extra[0] == 1)


def _array_to_rgb_by_palette(indices: np.ndarray, palette: np.ndarray, profile: bytes) -> np.ndarray:
    transform = to_srgb(profile, "RGB")
    palette = transform(palette[None])[0] if transform else palette
    indices = indices.astype(np.uint8) if indices.dtype == bool else indices
    return convert(indices.shape[0], indices.shape[1], lambda rows: palette[indices[rows]])


def _cmyk_to_rgb(pixels: np.ndarray, bits: int, profile: bytes) -> np.ndarray:
    if pixels.shape[-1] < 4:
        raise ServingError(ErrorKind.BAD_REQUEST, f"image: expected a TIFF of 4 inks, got {pixels.shape[-1]}")
    to_bytes, transform = _to_bytes(pixels, bits), to_srgb(profile, "CMYK")

    def part(rows: slice) -> np.ndarray:
        inks = np.ascontiguousarray(to_bytes(pixels[rows])[..., :4])
        return transform(inks) if transform else np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))

    return convert(pixels.shape[0], pixels.shape[1], part)


# The process


def main(connection: Connection) -> None:
    """Decode what comes until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a server that drains still answers; its end closes the connection
    warnings.simplefilter("ignore")
    while connection.poll(_IDLE_SECONDS):
        try:
            told = json.loads(connection.recv_bytes())
            profile, data = connection.recv_bytes(), connection.recv_bytes()
        except EOFError:
            return
        _limit(told["max_bytes"], told["seconds"])
        try:
            pixels, orientation = decode(told, profile, data)
        except ServingError as error:
            send_json(connection, {"kind": error.kind.value, "error": str(error)})
        except MemoryError:
            size = f"{told['format']} picture of {told['width']}x{told['height']} pixels"
            most = told["max_bytes"] // 2**20
            _refuse(connection, f"the {size} takes more than the {most} MiB of memory that its size allows")
        except Exception:
            size = f"{told['format']} picture of {told['width']}x{told['height']} pixels"
            _refuse(connection, f"broken or truncated {size}")
        else:
            height, width, _ = pixels.shape
            send_json(connection, {"height": height, "width": width, "orientation": orientation})
            with open(connection.fileno(), "wb", closefd=False) as stream:
                stream.write(np.ascontiguousarray(pixels).data)
        told = profile = data = pixels = None  # type: ignore[assignment]


def _refuse(connection: Connection, message: str) -> None:
    send_json(connection, {"kind": ErrorKind.BAD_REQUEST.value, "error": f"image: {message}"})


def _limit(max_bytes: int, seconds: float) -> None:
    """Bound what this process takes from now on."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
