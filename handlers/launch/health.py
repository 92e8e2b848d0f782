"""Is the model behind a server alive? Asks it for the mask of a tiny picture.

Both servers call themselves healthy while the process that holds the model is dead or stuck: a liveness
probe has to ask the model. An overloaded one may refuse, or answer late, and is alive all the same if it computed
something in the meantime. Its metrics tell that, so they have to be exported; without them a server that refuses is
asked again until the time is over, because it is alive if room comes.
"""

import time
import urllib.parse
import zlib
from typing import NamedTuple

from handlers.client import connect, read_metrics
from handlers.png import png_file, png_size

_SIDE = 16
_PAUSE_SECONDS = 0.2
_NO_ROOM = (503, 504, 507)  # refused, late, or bodies on their way in are too many


class UnhealthyError(Exception):
    """The model did not answer as a living one does.

    Attributes:
        status: of HTTP, that it answered with; 0 if it did not.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Progress(NamedTuple):
    """How much a model has done so far: pictures answered, and tokens computed."""

    pictures: float
    tokens: float


def check_model(url: str, *, timeout_seconds: float, metrics_url: str = "") -> None:
    """Return once the model has answered a tiny picture, or has computed something while it had no room for it.

    Args:
        url: of the model, on TorchServe (`/predictions/NAME`) or on Triton (`/v2/models/NAME`).
        timeout_seconds: for everything.
        metrics_url: of the model's metrics; empty for nowhere.

    Raises:
        UnhealthyError: no answer in time, or another answer than a mask, and nothing computed.
        ValueError: the URL is not one of a model.
    """
    deadline = time.monotonic() + timeout_seconds
    told = "no answer"
    with connect(url) as client:
        before = read_progress(metrics_url, url)
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = client.ask(tiny_picture(), content_type="image/png", timeout_seconds=left)
            except TimeoutError:
                if _computes(before, metrics_url, url):
                    return
                raise UnhealthyError(f"{url}: not answered within {timeout_seconds:g} s") from None
            except OSError as error:
                raise UnhealthyError(f"{url}: {error}") from None
            if answer.status == 200:
                if not _is_mask(answer.body):
                    raise UnhealthyError(f"{url}: expected the mask of the picture, got {answer.body[:40]!r}")
                return
            told = f"status {answer.status}: {answer.body[:200].decode(errors='replace').strip()}"
            if answer.status not in _NO_ROOM:
                raise UnhealthyError(f"{url}: {told}", answer.status)
            if _computes(before, metrics_url, url):
                return
            time.sleep(_PAUSE_SECONDS)
    raise UnhealthyError(f"{url}: not answered within {timeout_seconds:g} s; last it said {told}")


def read_progress(metrics_url: str, model_url: str) -> Progress | None:
    """What a model has done so far, None where that isn't told.

    Args:
        metrics_url: of its metrics; empty for nowhere.
        model_url: of the model, see `check_model`.
    """
    if not metrics_url:
        return None
    model = urllib.parse.urlsplit(model_url).path.partition("/versions/")[0].rpartition("/")[2]
    try:
        metrics = read_metrics(metrics_url)
    except (OSError, ValueError):
        return None
    return Progress(*(metrics.total(name, model=model) for name in ("mpm_images_total", "mpm_tokens_total")))


def _computes(before: Progress | None, metrics_url: str, model_url: str) -> bool:
    """Whether a model got something done since."""
    now = read_progress(metrics_url, model_url)
    return before is not None and now is not None and now.tokens > before.tokens


def tiny_picture() -> bytes:
    """A black PNG, made without a codec: a probe that runs every few seconds should start fast."""
    return png_file(_SIDE, _SIDE, 8, 0, (b"IDAT", zlib.compress(bytes(_SIDE * (1 + _SIDE)))))


def _is_mask(data: bytes) -> bool:
    return png_size(data) == (_SIDE, _SIDE)
