"""The forms in which a picture is answered: one file and one entry of the table for each.

To add one, write a file with a `Format` in it and name it here: content negotiation, Triton's outputs and the
memory that is reserved for encoding follow from the table.
"""

from .base import Format
from .json import JSON
from .maps import MAPS
from .npy import NPY
from .png import GREY, PNG
from .views import CONFIDENCE, OVERLAY, TOKENS

FORMATS: dict[str, Format] = {
    "png": PNG,
    "json": JSON,
    "npy": NPY,
    "overlay": OVERLAY,
    "tokens": TOKENS,
    "confidence": CONFIDENCE,
    "grey": GREY,
    "maps": MAPS,
}
MASKS = tuple(name for name, form in FORMATS.items() if not form.is_view)
VIEWS = tuple(name for name, form in FORMATS.items() if form.is_view)

__all__ = ["FORMATS", "MASKS", "VIEWS", "Format"]
