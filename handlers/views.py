"""Pictures for people: what the model saw, how sure it was, and which tokens merged."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpm_ops.classes import Classes
from mpm_ops.windows import WindowPlan

_CAPTION_MIN_SIDE = 200  # pixels; below, a caption would hide the picture
_EDGE = np.array([255, 255, 255], np.uint8)


def overlay_view(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Blend class colours over the picture, outline the regions and name the largest classes.

    Args:
        image: uint8 RGB [H, W, 3].
        labels: [H, W] class ids.

    Returns:
        uint8 RGB [H, W, 3].
    """
    blended = cv2.addWeighted(image, 0.45, classes.colors[labels], 0.55, 0)
    blended[_edges(labels)] = _EDGE
    areas = np.bincount(labels.ravel(), minlength=len(classes))
    largest = [i for i in np.argsort(-areas, kind="stable")[:8].tolist() if areas[i] >= 0.005 * labels.size]
    return _captioned(blended, [(classes.names[i], tuple(classes.colors[i].tolist())) for i in largest])


def confidence_view(confidence: np.ndarray) -> np.ndarray:
    """Colour [H, W] probabilities from dark (unsure) to bright (sure), as uint8 RGB [H, W, 3]."""
    scaled = (np.clip(confidence, 0, 1) * 255).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    scale = cv2.applyColorMap(np.array([[38, 128, 250]], np.uint8), cv2.COLORMAP_VIRIDIS)[0, :, ::-1].tolist()
    legend = [(f"{name} sure", tuple(color)) for name, color in zip(("15 %", "50 %", "98 %"), scale, strict=True)]
    return _captioned(np.ascontiguousarray(colored), legend)


def tokens_view(
    image: np.ndarray, plan: WindowPlan, merge_maps: Sequence[np.ndarray], patch_size: int, token_counts: Sequence[int]
) -> np.ndarray:
    """Show what merging did: merged patches in one flat colour with an outline, single patches untouched.

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
    flat = tokens.ravel()
    pixels = np.bincount(flat)
    mean = np.stack([np.bincount(flat, weights=image[..., c].ravel()) for c in range(3)], axis=1)
    mean = (mean / np.maximum(pixels, 1)[:, None]).astype(np.uint8)

    patches = np.bincount(np.concatenate(_numbered(merge_maps)))
    merged = (patches > 1)[tokens]
    shown = np.where(merged[..., None], mean[tokens], image)
    edges = _edges(np.where(merged, tokens, -1))
    shown[edges] = shown[edges] // 2 + _EDGE // 2
    steps = " > ".join(str(count) for count in token_counts)
    return _captioned(shown, [(f"{steps} tokens", (255, 255, 255))])


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
    return [m + start for m, start in zip(merge_maps, starts, strict=True)]


def _edges(regions: np.ndarray) -> np.ndarray:
    """[H, W] bool, pixels whose right or lower neighbour belongs to another region; thicker on large pictures."""
    edges: np.ndarray = np.zeros(regions.shape, np.uint8)
    edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edges[:-1] |= regions[:-1] != regions[1:]
    thickness = round(min(regions.shape) / 700)
    if thickness > 1:
        edges = cv2.dilate(edges, np.ones((thickness, thickness), np.uint8))
    return edges.astype(bool)


def _captioned(image: np.ndarray, entries: Sequence[tuple[str, tuple[int, ...]]]) -> np.ndarray:
    """Lines of text, each behind a square of its colour, on a dark plate in the lower left corner."""
    if min(image.shape[:2]) < _CAPTION_MIN_SIDE or not entries:
        return image
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(11, min(image.shape[:2]) // 32)
    font = ImageFont.load_default(size)
    line, margin = round(1.4 * size), size // 2
    width = 2 * margin + line + round(max(draw.textlength(text, font) for text, _ in entries))
    top = image.shape[0] - line * len(entries) - 2 * margin
    draw.rectangle((0, top, width, image.shape[0]), fill=(0, 0, 0, 150))
    for i, (text, color) in enumerate(entries):
        y = top + margin + i * line
        draw.rectangle((margin, y + size // 5, margin + size - 1, y + size // 5 + size - 1), fill=(*color, 255))
        draw.text((margin + line, y), text, font=font, fill=(255, 255, 255, 255))
    return np.array(picture)
