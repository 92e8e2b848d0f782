"""Pictures in: bytes to RGB arrays, with everything refused that can be refused from a header."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from handlers.errors import ErrorKind, ServingError

from .frames import Frame, is_frame, read_frame

# JPEG stands for MPO too, which many phones write; Pillow knows no MPO of its own for reading.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

Image.init()  # load the parsers now rather than in the first request

# The limit is ours and known before decoding; Pillow's own would only warn, and at another number.
Image.MAX_IMAGE_PIXELS = None

# Every scan of a JPEG goes over all its pixels again, and an empty one takes less than 100 bytes: without a limit
# a small file keeps a thread busy for minutes. Encoders write about 10.
_JPEG_START = b"\xff\xd8"
_MAX_SCANS = 64
_MAX_SEGMENTS = 10_000
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")  # those that a length follows, and the end of the picture

_TIFF_TILE_SIZE = (322, 323)

# What decoding takes at most for each pixel: 4 in Pillow's memory, 4 more while it is turned or 3 in the array.
DECODING_BYTES = 8
_STRIP_PIXELS = 2**20

# EXIF orientations that cameras write, and what turns them upright; the mirrored ones are left to Pillow.
_TURNS = {1: None, 3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}

_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """An encoded picture whose header was read.

    Attributes:
        size: height and width in pixels, as a person sees it; where the orientation stands behind the pixels, as
            they are stored.
        num_bytes: encoded.
    """

    size: tuple[int, int]
    num_bytes: int
    _data: bytes
    _image: Image.Image

    def decode(self) -> np.ndarray:
        """uint8 RGB [H, W, 3], see `decode_image`."""
        image = self._image
        try:
            pixels = _decode_jpeg(self._data, image)
            if pixels is not None:
                return pixels
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb_pixels(image)
        except Exception as error:
            raise _broken(image) from error


def read_picture(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> EncodedPicture | Frame:
    """Read the header of a picture, and no pixel.

    Args:
        data: an encoded picture in one of FORMATS, or a raw frame, see `frames`.
        max_bytes: longer data is refused.
        max_pixels: larger pictures are refused.

    Raises:
        ServingError: too large, or not a picture.
    """
    if is_frame(data):
        return read_frame(data, max_bytes=max_bytes, max_pixels=max_pixels)
    buffer, image = _open(data, max_bytes, max_pixels)
    try:
        # Asked for its orientation, a PNG that doesn't tell it before its pixels would be decoded.
        sideways = (image.format != "PNG" or "exif" in image.info) and _orientation(image) in _SIDEWAYS
    except Exception as error:
        raise _broken(image) from error
    return EncodedPicture(image.size if sideways else image.size[::-1], len(data), buffer.getvalue(), image)


def decode_image(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """Decode a picture the way a person sees it.

    The first frame of an animation, turned upright by its EXIF orientation; transparency over white;
    grey, palette, CMYK and 16-bit pictures become 8-bit RGB.

    Args:
        data, max_bytes, max_pixels: see `read_picture`.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ServingError: too large, or not a readable picture.
    """
    return read_picture(data, max_bytes=max_bytes, max_pixels=max_pixels).decode()


def _open(data: bytes | bytearray, max_bytes: int, max_pixels: int) -> tuple[io.BytesIO, Image.Image]:
    if len(data) > max_bytes:
        raise ServingError(ErrorKind.TOO_LARGE, f"image: expected at most {max_bytes} bytes, got {len(data)}")
    if not data:
        raise ServingError(ErrorKind.BAD_REQUEST, "image: expected an encoded picture, got an empty body")
    if data[:2] == _JPEG_START and not _has_few_scans(data):
        raise ServingError(ErrorKind.BAD_REQUEST, f"image: expected a JPEG of at most {_MAX_SCANS} scans")
    try:
        buffer = io.BytesIO(data)
        image = Image.open(buffer, formats=FORMATS)
    except UnidentifiedImageError:
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"image: expected JPEG, PNG, WebP, GIF, BMP or TIFF, or a .npy frame, got {len(data)} other bytes",
        ) from None
    except Exception as error:  # parsers of broken headers raise all sorts of errors, and each means the same
        raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the picture is broken") from error
    width, height = _decoded_size(image)
    if width * height > max_pixels:
        raise ServingError(
            ErrorKind.TOO_LARGE,
            f"image: expected at most {max_pixels} pixels, got {width}x{height} = {width * height}",
        )
    return buffer, image


def _broken(image: Image.Image) -> ServingError:
    width, height = image.size
    return ServingError(
        ErrorKind.BAD_REQUEST, f"image: broken or truncated {image.format} picture of {width}x{height} pixels"
    )


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what decoding unpacks; a TIFF's tiles may be larger than its picture."""
    if not isinstance(image, TiffImageFile):
        return image.size
    tile = (image.tag_v2.get(tag) for tag in _TIFF_TILE_SIZE)
    width, height = (max(a, b) if isinstance(b, int) else a for a, b in zip(image.size, tile, strict=True))
    return width, height


def _has_few_scans(data: bytes | bytearray | memoryview) -> bool:
    """Whether the first picture of a JPEG file keeps to _MAX_SCANS, and to as many segments as are worth a look."""
    scans, position = 0, len(_JPEG_START)
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None or marker[1] == b"\xd9":
            return True
        scans += marker[1] == b"\xda"
        if scans > _MAX_SCANS:
            return False
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """The pixels that Pillow would give, without its copies; None for what it should judge itself."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn not in _TURNS:
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != image.size:
            return None
        pixels = simplejpeg.decode_jpeg(data)
    except Exception:  # a flaw, or an unusual kind, and Pillow knows which ones are harmless
        return None
    rotation = _TURNS[turn]
    return pixels if rotation is None else cv2.rotate(pixels, rotation)


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """uint8 RGB [H, W, 3], converted strip by strip: as a whole it would take several times the picture's memory."""
    height, rows = image.height, max(1, _STRIP_PIXELS // image.width)
    if image.mode in ("I", "F"):  # no fixed range: show what is there, as an image viewer does
        extremes = [(values.min(), values.max()) for values in map(_finite, _strips(image, rows))]
        lowest = min(low for low, _ in extremes)
        scale = 255 / (max(high for _, high in extremes) - lowest or 1.0)
        grey = (((_finite(strip) - lowest) * scale).astype(np.uint8) for strip in _strips(image, rows))
        parts = (np.broadcast_to(part[..., None], (*part.shape, 3)) for part in grey)
    else:
        parts = (np.asarray(_to_rgb(strip)) for strip in _strips(image, rows))
    pixels = np.empty((height, image.width, 3), np.uint8)
    for top, part in zip(range(0, height, rows), parts, strict=True):
        pixels[top : top + rows] = part
    return pixels


def _strips(image: Image.Image, rows: int) -> Iterator[Image.Image]:
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        picture = Image.new("RGB", rgba.size, "white")
        picture.paste(rgba, mask=rgba)
        return picture
    return image if image.mode == "RGB" else image.convert("RGB")
