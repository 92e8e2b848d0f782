"""Values of any kind to 8-bit RGB as a person sees it: colour profiles, transparency, depth."""

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

STRIP_PIXELS = 2**20  # converted at once: as a whole a picture would take several times its memory

Transform = Callable[[np.ndarray], np.ndarray]

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_PROBE = np.stack(np.meshgrid(*3 * [np.linspace(0, 255, 9)]), axis=-1).astype(np.uint8).reshape(27, 27, 3)


def to_srgb(profile: bytes, mode: str) -> Transform | None:
    """What makes sRGB of uint8 values of a colour profile; None where there is nothing to do.

    Args:
        profile: ICC's; a broken one, or one of other colours, is ignored as browsers do.
        mode: Pillow's: RGB, L [H, W] or CMYK.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None

    def apply(values: np.ndarray) -> np.ndarray:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(values, mode), transform))

    if mode == "RGB" and np.abs(apply(_PROBE).astype(int) - _PROBE).max() <= 1:
        return None  # sRGB by any name
    return apply


def strips(height: int, width: int) -> Iterator[slice]:
    """Rows that are converted at once."""
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def convert(height: int, width: int, part: Callable[[slice], np.ndarray]) -> np.ndarray:
    """uint8 RGB [H, W, 3], made strip by strip from what `part` gives for some rows: RGB, or grey [rows, W]."""
    pixels = np.empty((height, width, 3), np.uint8)
    for rows in strips(height, width):
        values = part(rows)
        if values.ndim == 3:
            pixels[rows] = values
        else:
            for channel in range(3):  # seven times as fast as spreading them over the last axis
                pixels[rows, :, channel] = values
    return pixels


def image_to_rgb(image: Image.Image, profile: bytes = b"", key: tuple[int, ...] = ()) -> np.ndarray:
    """A loaded picture of Pillow's.

    Args:
        image: of any mode.
        profile: of its colours.
        key: the value that is transparent, as deep as the picture's own.
    """
    mode = image.mode
    if mode in ("I", "F"):
        values = np.asarray(image)
        spread = own_range(values)
        return convert(image.height, image.width, lambda rows: spread(values[rows]))
    is_grey = mode in ("1", "L", "LA", "La") or mode.startswith("I;16")
    transform = to_srgb(profile, "L" if is_grey else "CMYK" if mode == "CMYK" else "RGB")

    def part(rows: slice) -> np.ndarray:
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if mode.startswith("I;16"):
            deep = np.asarray(strip)
            shown = (deep >> 8).astype(np.uint8)
            shown = transform(shown) if transform else shown
            if key:
                hidden = deep == key[0]
                shown = np.where(hidden if shown.ndim == 2 else hidden[..., None], np.uint8(255), shown)
            return shown
        if strip.has_transparency_data:
            strip = strip if strip.mode == "RGBA" else strip.convert("RGBA")
            if transform is None:
                picture = Image.new("RGB", strip.size, "white")
                picture.paste(strip, mask=strip)
                return np.asarray(picture)
            values = np.asarray(strip)
            colours = np.ascontiguousarray(values[..., 0] if is_grey else values[..., :3])
            return over_white(transform(colours), values[..., 3])
        if transform:
            kind = "L" if is_grey else "CMYK" if mode == "CMYK" else "RGB"
            shown = transform(np.asarray(strip if mode == kind else strip.convert(kind)))
        else:
            shown = np.asarray(strip if mode == "RGB" else strip.convert("RGB"))
        if key:
            hidden = np.asarray(strip.convert("L") if is_grey else strip)
            hidden = hidden == key[0] if is_grey else (hidden == key).all(-1)
            shown = np.where(hidden[..., None], np.uint8(255), shown)
        return shown

    return convert(image.height, image.width, part)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours or grey, uint8, with alpha, laid over white; rounded as Pillow does."""
    alpha = alpha if colours.ndim == 2 else alpha[..., None]
    mixed = colours.astype(np.uint32) * alpha + 255 * (255 - alpha.astype(np.uint32)) + 128
    return ((mixed + (mixed >> 8)) >> 8).astype(np.uint8)


def own_range(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What spreads values without a fixed range over 8 bits, as an image viewer does."""
    lowest, highest = np.inf, -np.inf
    for rows in strips(values.shape[0], max(1, values[0].size)):
        part = _finite(values[rows])
        lowest, highest = min(lowest, float(part.min())), max(highest, float(part.max()))
    scale = 255 / (highest - lowest or 1.0)
    return lambda part: ((_finite(part) - lowest) * scale).astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
