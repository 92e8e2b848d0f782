"""Pictures and windows that were never decoded, for tests of what passes them on."""

import math
from typing import Any

import numpy as np
import pytest

from handlers.api.decode import EncodedPicture
from handlers.api.options import RequestOptions
from handlers.engine.lane import Lane
from handlers.engine.request import Picture, Reply, Request, Window
from mpm_ops.windows import WindowPlan

PLAN = WindowPlan((64, 64), (64, 64), (64, 64), 64, (0,), (0,))
LANE = Lane(0, "1", 2)


def make_picture(
    name: str = "test",
    *,
    lane: Lane = LANE,
    arrived: float = 0.0,
    bulk: bool = False,
    request: Request | None = None,
    **state: Any,
) -> Picture:
    options = RequestOptions(request_id=name, bulk=bulk)
    return Picture(request or Request(name, 0.0, math.inf), options, lane, PLAN, arrived, **state)


def make_window(picture: Picture, lane: Lane, length: int = 10, state: Any = None) -> Window:
    """A window of a picture; `num_left` counts it."""
    window = Window(picture, lane, length, state, [length - 1] * (lane.stage + 1))
    picture.windows.append(window)
    picture.num_left += 1
    return window


def make_reply(body: bytes = b"png", **state: Any) -> Reply:
    fields: dict[str, Any] = {"tokens": (4, 2), "seconds": {"compute": 0.5}, "num_windows": 1}
    return Reply({"png": body}, "image/png", **(fields | state))


BREAKS = 23  # height of a picture that `break_decoding` breaks


def break_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pictures of one height raise what nobody expects."""
    decode = EncodedPicture.decode

    def broken(self: EncodedPicture) -> np.ndarray:
        if self.size[0] == BREAKS:
            raise ZeroDivisionError("secret")
        return decode(self)

    monkeypatch.setattr(EncodedPicture, "decode", broken)
