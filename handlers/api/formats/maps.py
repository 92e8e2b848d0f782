"""Which patches share a token after each merge, beside all that is told as JSON."""

import base64
from itertools import product
from typing import TYPE_CHECKING, Any

from mpm_ops.classes import Classes

from .base import Format
from .json import describe_picture, to_bytes

if TYPE_CHECKING:
    from handlers.engine.request import Picture


def describe_merges(picture: "Picture", patch_size: int) -> dict[str, Any]:
    """Where the windows lie, and for each its maps: one for each merge, from patches, row by row, to tokens.

    Tokens are counted from 0; patches with one number share a token. A map is base64 of little-endian uint16.
    """
    plan = picture.plan
    places = product(plan.tops, plan.lefts)
    return {
        "frame": plan.frame_size,  # that windows lie in: the picture as the network sees it
        "window_size": plan.window_size,
        "patch_size": patch_size,
        "windows": [
            {
                "top": top,
                "left": left,
                "maps": [base64.b64encode(m.numpy().astype("<u2").tobytes()).decode() for m in window.merge_maps],
            }
            for (top, left), window in zip(places, picture.windows, strict=True)
        ],
    }


def _encode(picture: "Picture", classes: Classes, patch_size: int) -> bytes:
    return to_bytes({**describe_picture(picture, classes), "merging": describe_merges(picture, patch_size)})


MAPS = Format(media_types=("application/json",), output="RESULT_JSON", encode=_encode, is_view=True, needs_maps=True)
