"""Pictures for people: what the model saw, how sure it was, and which tokens merged."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpm_ops.classes import Classes
from mpm_ops.windows import WindowPlan

from .base import Format

if TYPE_CHECKING:
    from handlers.engine.request import Picture

Color = tuple[int, ...]

_CAPTION_MIN_SIDE = 200  # pixels; below, a caption would hide the picture
_TINTS = {2: (60, 130, 220), 3: (60, 190, 130), 4: (245, 190, 60)}  # by patches of a token; 4 stands for more too
_TINT = 0.4
_STRIP_PIXELS = 2**20
_PNG_LEVEL = 1
_VIEW_TYPES = ("image/png", "image/jpeg")
_VIEW_BYTES = 16  # a pixel; measured on 64 million pixels of noise: 12.3


def encode_picture(image: np.ndarray, media_type: str) -> bytes:
    """uint8 RGB [H, W, 3] -> PNG or JPEG."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 90} if media_type == "image/jpeg" else {"compress_level": _PNG_LEVEL}
    Image.fromarray(image).save(buffer, media_type.removeprefix("image/").upper(), **options)
    return buffer.getvalue()


def overlay_view(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Blend class colours over the picture, outline the regions and name the largest classes.

    Args:
        image: uint8 RGB [H, W, 3].
        labels: [H, W] class ids.

    Returns:
        uint8 RGB [H, W, 3].
    """
    blended = np.empty_like(image)
    for rows in _strips(image.shape[:2]):
        cv2.addWeighted(image[rows], 0.45, classes.colors[labels[rows]], 0.55, 0, dst=blended[rows])
    _outline(blended, labels, 0.6)
    areas = np.bincount(labels.ravel(), minlength=len(classes))
    largest = [i for i in np.argsort(-areas, kind="stable")[:8].tolist() if areas[i] >= 0.005 * labels.size]
    return _captioned(blended, [(classes.names[i], tuple(classes.colors[i].tolist())) for i in largest])


def confidence_view(confidence: np.ndarray) -> np.ndarray:
    """Colour [H, W] probabilities from dark (unsure) to bright (sure), as uint8 RGB [H, W, 3]."""
    colored = np.empty((*confidence.shape, 3), np.uint8)
    for rows in _strips(confidence.shape):
        scaled = (np.clip(confidence[rows], 0, 1) * 255).astype(np.uint8)
        colored[rows] = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    scale = cv2.applyColorMap(np.array([[38, 128, 250]], np.uint8), cv2.COLORMAP_VIRIDIS)[0, :, ::-1].tolist()
    legend: list[tuple[str, Color | None]] = [
        (f"{percent} % sure", tuple(color)) for percent, color in zip((15, 50, 98), scale, strict=True)
    ]
    return _captioned(colored, legend)


def tokens_view(
    image: np.ndarray, plan: WindowPlan, merge_maps: Sequence[np.ndarray], patch_size: int, token_counts: Sequence[int]
) -> np.ndarray:
    """Show what merging did: merged patches in one flat colour, tinted by their number; single ones untouched.

    Args:
        image: uint8 RGB [H, W, 3].
        plan: where the picture's windows lie.
        merge_maps: per window, the token that stands for each patch; [N] integers.
        patch_size: pixels of a window per patch.
        token_counts: tokens of the whole picture at the start and after each merge, for the caption.

    Returns:
        uint8 RGB [H, W, 3].
    """
    tokens = _token_of_pixel(plan, merge_maps, patch_size)
    patches = np.bincount(np.concatenate(_numbered(merge_maps)))
    pixels = np.zeros(len(patches), np.int64)
    sums = np.zeros((len(patches), 3))
    for rows in _strips(image.shape[:2]):
        flat = tokens[rows].ravel()
        pixels += np.bincount(flat, minlength=len(patches))
        for c in range(3):
            sums[:, c] += np.bincount(flat, weights=image[rows, :, c].ravel(), minlength=len(patches))
    mean = sums / np.maximum(pixels, 1)[:, None]
    tints = np.array([_TINTS.get(number, (0, 0, 0)) for number in range(5)])[np.minimum(patches, 4)]
    colors = ((1 - _TINT) * mean + _TINT * tints).astype(np.uint8)

    shown = np.empty_like(image)
    for rows in _strips(image.shape[:2]):
        merged = (patches > 1)[tokens[rows]]
        shown[rows] = np.where(merged[..., None], colors[tokens[rows]], image[rows])
        tokens[rows][~merged] = -1
    _outline(shown, tokens, 0.25)
    return _captioned(shown, _tokens_legend(token_counts))


def _tokens_legend(token_counts: Sequence[int]) -> list[tuple[str, Color | None]]:
    steps = " > ".join(str(count) for count in token_counts)
    if len(token_counts) == 1:
        return [(f"{steps} tokens, none merged", None)]
    return [
        (f"{steps} tokens", None),
        (f"{100 * token_counts[-1] / token_counts[0]:.0f} % left", None),
        ("2 patches in one", _TINTS[2]),
        ("3 in one", _TINTS[3]),
        ("4 or more in one", _TINTS[4]),
    ]


def _token_of_pixel(plan: WindowPlan, merge_maps: Sequence[np.ndarray], patch_size: int) -> np.ndarray:
    """[H, W] token number of every pixel, over all windows; where windows overlap, the nearer one counts."""
    row_window, row_patch = _nearest_window(plan, patch_size, axis=0)
    column_window, column_patch = _nearest_window(plan, patch_size, axis=1)
    grid = -(-plan.window_size // patch_size)
    numbered = np.stack(_numbered(merge_maps)).reshape(len(plan.tops), len(plan.lefts), grid, grid)
    return numbered[row_window[:, None], column_window[None], row_patch[:, None], column_patch[None]]


def _nearest_window(plan: WindowPlan, patch_size: int, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row (axis 0) or column (axis 1) of the picture, its window and the patch within it."""
    origins = np.array((plan.tops, plan.lefts)[axis])
    pixels, frame = plan.original_size[axis], plan.frame_size[axis]
    position = (np.arange(pixels) + 0.5) * frame / pixels
    bounds = (origins[:-1] + plan.window_size + origins[1:]) / 2  # the middle of each overlap
    window = np.searchsorted(bounds, position, side="right")
    return window, ((position - origins[window]) // patch_size).astype(np.int64)


def _numbered(merge_maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The maps with numbers that no two windows share."""
    starts = np.cumsum([0] + [int(m.max()) + 1 for m in merge_maps[:-1]])
    return [(m + start).astype(np.int32) for m, start in zip(merge_maps, starts, strict=True)]


def _strips(size: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a picture of this height and width, a few at a time: what is made of them may be wide numbers."""
    rows = max(1, _STRIP_PIXELS // size[1])
    for top in range(0, size[0], rows):
        yield slice(top, top + rows)


def _edges(regions: np.ndarray) -> np.ndarray:
    """[H, W] bool, pixels whose right or lower neighbour belongs to another region; thicker on large pictures."""
    edges: np.ndarray = np.zeros(regions.shape, np.uint8)
    edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edges[:-1] |= regions[:-1] != regions[1:]
    thickness = round(min(regions.shape) / 700)
    if thickness > 1:
        edges = cv2.dilate(edges, np.ones((thickness, thickness), np.uint8))
    return edges.astype(bool)


def _outline(image: np.ndarray, regions: np.ndarray, strength: float) -> None:
    """Lighten the edges of regions, in place."""
    edges = _edges(regions)
    for rows in _strips(edges.shape):
        strip, marked = image[rows], edges[rows]
        strip[marked] = ((1 - strength) * strip[marked] + strength * 255).astype(np.uint8)


def _captioned(image: np.ndarray, entries: Sequence[tuple[str, Color | None]]) -> np.ndarray:
    """Lines of text, some behind a square of their colour, on a dark plate in the lower left corner; drawn in place.

    What would take more than half of the picture's height is left out.
    """
    height, width = image.shape[:2]
    size = max(12, min(height, width) // 32)
    line, margin = round(1.5 * size), size // 2
    entries = entries[: height // 2 // line]
    if min(height, width) < _CAPTION_MIN_SIDE or not entries:
        return image
    plate_height = line * len(entries) + 2 * margin
    picture = Image.fromarray(image[height - plate_height :])  # a copy of the whole would be most of a view's memory
    draw = ImageDraw.Draw(picture, "RGBA")
    font = ImageFont.load_default(size)
    indents = [0 if color is None else line for _, color in entries]
    right = max(indent + draw.textlength(text, font) for indent, (text, _) in zip(indents, entries, strict=True))
    draw.rectangle((0, 0, 2 * margin + round(right), plate_height), fill=(0, 0, 0, 170))
    for i, (text, color) in enumerate(entries):
        middle = margin + i * line + line // 2
        if color is not None:
            square = (margin, middle - size // 2, margin + size - 1, middle - size // 2 + size - 1)
            draw.rectangle(square, fill=(*color, 255))
        draw.text((margin + indents[i], middle), text, font=font, fill=(255, 255, 255, 255), anchor="lm")
    image[height - plate_height :] = np.asarray(picture)
    return image


def _overlay(picture: "Picture", classes: Classes, patch_size: int) -> np.ndarray:
    assert picture.image is not None
    return overlay_view(picture.image, picture.labels, classes)


def _tokens(picture: "Picture", classes: Classes, patch_size: int) -> np.ndarray:
    assert picture.image is not None
    unmerged = np.arange((-(-picture.plan.window_size // patch_size)) ** 2)
    maps = [unmerged if w.merge_map is None else w.merge_map.cpu().numpy() for w in picture.windows]
    return tokens_view(picture.image, picture.plan, maps, patch_size, picture.tokens_per_stage)


def _confidence(picture: "Picture", classes: Classes, patch_size: int) -> np.ndarray:
    assert picture.confidence is not None
    return confidence_view(picture.confidence)


def _view(
    draw: Callable[["Picture", Classes, int], np.ndarray], *, needs_image: bool = False, needs_confidence: bool = False
) -> Format:
    def encode(picture: "Picture", classes: Classes, patch_size: int) -> bytes:
        asked = picture.options.media_type
        return encode_picture(draw(picture, classes, patch_size), asked if asked in _VIEW_TYPES else _VIEW_TYPES[0])

    return Format(
        media_types=_VIEW_TYPES,
        output="MASK_PNG",
        encode=encode,
        bytes_per_pixel=_VIEW_BYTES,
        is_view=True,
        needs_image=needs_image,
        needs_confidence=needs_confidence,
    )


OVERLAY = _view(_overlay, needs_image=True)
TOKENS = _view(_tokens, needs_image=True)
CONFIDENCE = _view(_confidence, needs_confidence=True)
