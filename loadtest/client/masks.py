"""Is an answer right? Masks under load are held against those of the same pictures from an idle server, and these
against the library's."""

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from .pictures import Item
from .ways import Answer

OK = "ok"
_PNG = b"\x89PNG\r\n\x1a\n"


class MaskError(ValueError):
    """An answer is not what was asked for; the message says why in a few words that group well."""


class OtherImageError(ValueError):
    """An image, but not one of class ids; the message is its format and mode."""


@dataclass(frozen=True)
class Reference:
    """What a picture's mask is.

    Attributes:
        png: as an idle server gave it, or the library made it.
    """

    png: bytes

    @cached_property
    def labels(self) -> np.ndarray:
        return read_mask(self.png)

    @cached_property
    def areas(self) -> Mapping[int, int]:
        """Pixels by class."""
        ids, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def read_mask(png: bytes) -> np.ndarray:
    """Class ids [H, W] of a mask.

    Raises:
        MaskError: it is not a palette or grey PNG, or an index lies outside of the palette.
    """
    if png[:8] != _PNG:
        raise MaskError("not a PNG")
    try:
        labels, colors = decode_mask(png)
    except OtherImageError as other:
        raise MaskError(f"a {other}, not of class ids") from None
    except OSError:
        raise MaskError("a broken PNG") from None
    if colors is not None and labels.max(initial=0) >= len(colors):
        raise MaskError("a class outside of the palette")
    return labels


def decode_mask(png: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Class ids [H, W] of a palette or grey PNG, and the palette's colours [K, 3]; None without a palette.

    Raises:
        OtherImageError: it is an image of another kind.
        OSError: it can't be read.
    """
    try:
        with Image.open(io.BytesIO(png)) as opened:
            if opened.format != "PNG" or opened.mode not in ("P", "L", "I", "I;16"):
                raise OtherImageError(f"{opened.format} of mode {opened.mode}")
            palette = opened.getpalette() if opened.mode == "P" else None
            labels = np.asarray(opened)
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    return labels, None if palette is None else np.asarray(palette, np.uint8).reshape(-1, 3)


def check_answer(
    item: Item, answer: Answer, reference: Reference | None, *, min_agreement: float
) -> tuple[str, float | None]:
    """What became of a request.

    Args:
        reference: of the picture; None where there is none yet, or for what is bad.
        min_agreement: share of pixels that have to have the reference's class.

    Returns:
        OK or what is wrong, and the share of pixels that agree, where that was found out.
    """
    if item.kind == "bad":
        return _check_refusal(answer), None
    if answer.status != 200:
        return f"status {answer.status}", None
    try:
        if item.kind == "json":
            agreement = _check_json(item, answer.body, reference)
        else:
            agreement = _check_png(item, answer.body, reference)
    except MaskError as error:
        return f"wrong: {error}", None
    if agreement is not None and agreement < min_agreement:
        return "wrong: another mask", agreement
    return OK, agreement


def _check_refusal(answer: Answer) -> str:
    if answer.status == 503:
        return "status 503"  # refused, but for lack of room
    if not 400 <= answer.status < 500:
        return f"wrong: status {answer.status} for what is no picture"
    if b"Traceback" in answer.body:
        return "wrong: a traceback"
    return OK


def _check_png(item: Item, body: bytes, reference: Reference | None) -> float | None:
    if reference is not None and body == reference.png:
        return 1.0  # as deterministic servers answer: nothing to decode
    if body[:8] != _PNG or len(body) < 33:
        raise MaskError("not a PNG")
    width, height = struct.unpack(">II", body[16:24])
    if (height, width) != item.size:
        raise MaskError("another size than the picture")
    labels = read_mask(body)
    if reference is None:
        return None
    if labels.shape != reference.labels.shape:
        raise MaskError("another size than the reference")
    return float((labels == reference.labels).mean())


def _check_json(item: Item, body: bytes, reference: Reference | None) -> float | None:
    """By areas alone: two masks agree at most as much as they do."""
    try:
        described = json.loads(body)
        size = (described["height"], described["width"])
        areas = {entry["id"]: entry["area"] for entry in described["classes"]}
    except (ValueError, KeyError, TypeError):
        raise MaskError("not the JSON of a mask") from None
    if size != item.size:
        raise MaskError("another size than the picture")
    if sum(areas.values()) != size[0] * size[1]:
        raise MaskError("areas that do not fill the picture")
    if reference is None:
        return None
    shared = sum(min(area, reference.areas.get(index, 0)) for index, area in areas.items())
    return float(shared / (size[0] * size[1]))
