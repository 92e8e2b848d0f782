"""Pictures in: bytes to RGB arrays, with everything refused that can be refused from a header.

JPEG and PNG are decoded here, in the caller's thread, from files that hold nothing but the picture; other formats in
processes of their own, see `apart`.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from handlers.errors import ErrorKind, ServingError

from .apart import decode_apart
from .colours import convert, image_to_rgb, to_srgb
from .containers import MAX_SIDE, Header, read_header
from .frames import Frame, is_frame, read_frame

Image.init()  # load the parsers now rather than in the first request

# The limit is ours and known before decoding; Pillow's own would only warn, and at another number.
Image.MAX_IMAGE_PIXELS = None

_REDUCTIONS = (2, 4, 8)  # by which a JPEG can be decoded smaller, in a fraction of the time and memory
_MAX_REDUCED = 4  # times the limit of pixels, at most

_JPEG_END = b"\xff\xd9"

# What turns the EXIF orientations upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """An encoded picture whose header was read.

    Attributes:
        size: height and width in pixels, as a person sees it; where the orientation is only known to the decoder
            (AVIF, HEIC, JPEG XL), as they are stored.
        num_bytes: encoded.
        reduction: by which the picture is decoded smaller, because it has more pixels than are allowed; 1 for none.
    """

    size: tuple[int, int]
    num_bytes: int
    reduction: int
    _header: Header

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width before the reduction."""
        sides = self._header.height, self._header.width
        return sides[::-1] if self._header.orientation in _SIDEWAYS else sides

    @property
    def decoding_bytes(self) -> int:
        """What decoding takes at most."""
        return self._header.decoding_bytes * self._header.num_pixels // self.reduction**2

    @property
    def is_apart(self) -> bool:
        """Decoded in a process of its own, for which the thread waits."""
        return self._header.format not in ("JPEG", "PNG")

    def decode(self) -> np.ndarray:
        """uint8 RGB [H, W, 3], see `decode_image`."""
        header = self._header
        try:
            if self.is_apart:
                pixels, orientation = decode_apart(header)
            else:
                pixels = _decode_jpeg(header, self.reduction) if header.format == "JPEG" else _decode_png(header)
                orientation = header.orientation
            return _TURNS[orientation](pixels) if orientation in _TURNS else pixels
        except ServingError:
            raise
        except Exception as error:
            raise ServingError(
                ErrorKind.BAD_REQUEST,
                f"image: broken or truncated {header.format} picture of {header.width}x{header.height} pixels",
            ) from error


def read_picture(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> EncodedPicture | Frame:
    """Read the header of a picture, and no pixel.

    Args:
        data: an encoded picture, see `containers.OFFERED`, or a raw frame, see `frames`.
        max_bytes: longer data is refused.
        max_pixels: larger pictures are decoded reduced where their format can do so, and refused otherwise.

    Raises:
        ServingError: too large, or not a picture.
    """
    if is_frame(data):
        return read_frame(data, max_bytes=max_bytes, max_pixels=max_pixels)
    if len(data) > max_bytes:
        raise ServingError(ErrorKind.TOO_LARGE, f"image: expected at most {max_bytes} bytes, got {len(data)}")
    if not data:
        raise ServingError(ErrorKind.BAD_REQUEST, "image: expected an encoded picture, got an empty body")
    header = read_header(bytes(data))
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise ServingError(ErrorKind.BAD_REQUEST, "image: the header of the picture is broken")
    reduction = _reduction(header, max_pixels)
    sides = -(-height // reduction), -(-width // reduction)
    size = sides[::-1] if header.orientation in _SIDEWAYS else sides
    return EncodedPicture(size, len(data), reduction, header)


def decode_image(data: bytes | bytearray, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """Decode a picture the way a person sees it.

    The first frame of an animation, turned upright by its EXIF orientation; transparency over white; colours of
    another profile as sRGB; grey, palette, CMYK, 16-bit and float pictures become 8-bit RGB.

    Args:
        data, max_bytes, max_pixels: see `read_picture`.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ServingError: too large, or not a readable picture.
    """
    return read_picture(data, max_bytes=max_bytes, max_pixels=max_pixels).decode()


def _reduction(header: Header, max_pixels: int) -> int:
    """How many times smaller a picture has to be decoded.

    Raises:
        ServingError: it is too large, and can't be.
    """
    width, height = header.width, header.height
    pixels = header.num_pixels
    if pixels <= max_pixels:
        if max(width, height) > MAX_SIDE:
            raise ServingError(
                ErrorKind.TOO_LARGE, f"image: expected sides of at most {MAX_SIDE} pixels, got {width}x{height}"
            )
        return 1
    told = ""
    if header.format == "JPEG":
        can_reduce = pixels <= _MAX_REDUCED * max_pixels and "progressive" not in header.detail
        for reduction in _REDUCTIONS if can_reduce else ():
            if -(-width // reduction) * -(-height // reduction) <= max_pixels:
                return reduction
        told = f"; baseline JPEGs of up to {_MAX_REDUCED * max_pixels} are decoded reduced"
    raise ServingError(
        ErrorKind.TOO_LARGE, f"image: expected at most {max_pixels} pixels, got {width}x{height} = {pixels}{told}"
    )


def _decode_jpeg(header: Header, reduction: int) -> np.ndarray:
    """The pixels that Pillow would give, without its copies; Pillow judges which flaws are harmless."""
    width, height = header.width, header.height
    try:
        whole = header.data + (_JPEG_END if "endless" in header.detail else b"")
        *size, space, _ = simplejpeg.decode_jpeg_header(whole)
        if size != [height, width]:
            raise ValueError("another size")
        space = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
        if space == "GRAY" and not header.profile:
            space = "RGB"
        least = {} if reduction == 1 else {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        pixels = simplejpeg.decode_jpeg(whole, space, **least)
    except Exception:  # a flaw, or an unusual kind
        if reduction > 1:
            raise
        image = Image.open(io.BytesIO(header.data), formats=["JPEG"])
        if image.size != (width, height):
            raise ValueError("another size") from None
        image.load()
        return image_to_rgb(image, header.profile)
    if space == "CMYK":
        if b"Adobe" in header.data[: header.data.find(b"\xff\xda")]:
            np.subtract(255, pixels, out=pixels)
        return image_to_rgb(Image.fromarray(pixels, "CMYK"), header.profile)
    pixels = pixels[..., 0] if space == "GRAY" else pixels
    transform = to_srgb(header.profile, "L" if space == "GRAY" else "RGB")
    if transform is None:
        return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    return convert(pixels.shape[0], pixels.shape[1], lambda rows: transform(pixels[rows]))


def _decode_png(header: Header) -> np.ndarray:
    depth, colour, *hidden = header.detail.split()
    key = tuple(int(hidden[0][i : i + 4], 16) for i in range(0, len(hidden[0]), 4)) if hidden else ()
    if colour == "2" and depth == "16" and len(key) == 3:  # only whole values tell which pixels are transparent
        return _hide_deep_colour(header, key)
    if len(key) != {"0": 1, "2": 3}.get(colour):
        key = ()
    if colour == "0" and int(depth) < 8:
        key = tuple(value * 255 // (2 ** int(depth) - 1) for value in key)
    image = Image.open(io.BytesIO(header.data), formats=["PNG"])
    if image.size != (header.width, header.height):
        raise ValueError("another size")
    image.load()
    return image_to_rgb(image, header.profile, key)


def _hide_deep_colour(header: Header, key: tuple[int, ...]) -> np.ndarray:
    """A PNG of 16-bit RGB, white where its values are the key; Pillow reads no more than 8 of the 16 bits."""
    import imagecodecs  # 30 MB that hardly anybody needs

    values = imagecodecs.png_decode(header.data)
    if values.dtype != np.uint16 or values.shape != (header.height, header.width, 3):
        raise ValueError("another size or depth")
    transform = to_srgb(header.profile, "RGB")

    def part(rows: slice) -> np.ndarray:
        shown = (values[rows] >> 8).astype(np.uint8)
        shown = transform(shown) if transform else shown
        return np.where((values[rows] == key).all(-1, keepdims=True), np.uint8(255), shown)

    return convert(header.height, header.width, part)
