"""What an entry of the table of formats says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpm_ops.classes import Classes

if TYPE_CHECKING:
    from handlers.engine.request import Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A form in which a picture is answered.

    Attributes:
        media_types: of the encoded bytes; the first unless the client prefers another.
        output: name of Triton's output that holds it.
        encode: bytes of a labelled picture, given the classes and the pixels of a window per patch.
        bytes_per_pixel: memory that encoding a large picture takes at most.
        array: what Triton's output holds in place of the encoded bytes; None for the bytes.
        is_view: asked for by X-MPM-View: a picture for people, another form of the mask, or more than JSON tells; the
            others by media type.
        needs_image: `encode` reads the whole picture's pixels.
        needs_confidence: `encode` reads the probability of each label.
        needs_maps: `encode` reads what each merge did to the windows.
    """

    media_types: tuple[str, ...]
    output: str
    encode: Callable[["Picture", Classes, int], bytes]
    bytes_per_pixel: int = 4  # measured on masks of 64 million pixels of noise: 3.1
    array: Callable[["Picture"], np.ndarray] | None = None
    is_view: bool = False
    needs_image: bool = False
    needs_confidence: bool = False
    needs_maps: bool = False
