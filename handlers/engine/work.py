"""What the engine works on: requests, and the windows they are cut into."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from handlers.api.options import RequestOptions
from handlers.observe.tracing import RequestSpan
from mpm_ops.stages import WindowBatch
from mpm_ops.windows import WindowPlan

from .admission import Ticket


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way. Over as soon as its answer is, whoever gave it."""

    options: RequestOptions
    schedule: tuple[int, ...]
    answer: "Future[Any]"
    arrived: float
    ticket: Ticket
    span: RequestSpan
    seconds: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "merge": 0.0})
    pixels: int = 0  # of the whole picture
    ready_at: float = 0.0
    image: np.ndarray | None = None
    plan: WindowPlan | None = None
    windows: "list[Window]" = field(default_factory=list)
    encoded: bool = True  # False for a request of our own, which is answered with what the network found


@dataclass(slots=True, eq=False)
class Window:
    """One window of a request, between two stages."""

    request: Request
    state: Tensor | WindowBatch | None  # pixels [3, H, W] at first, None in the end
    lengths: list[int]  # image tokens at the start and after each merge
    logits: Tensor | None = None  # [K, Gh, Gw] in the end
    merge_map: Tensor | None = None  # [N] in the end
    is_finite: bool = True  # the logits


def by_request(windows: Sequence[Window]) -> dict[Request, list[Window]]:
    """The requests that windows belong to, and which are whose."""
    found: dict[Request, list[Window]] = {}
    for window in windows:
        found.setdefault(window.request, []).append(window)
    return found
