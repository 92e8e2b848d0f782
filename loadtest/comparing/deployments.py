"""A model behind a URL, asked for one mask at a time, and its answers."""

import http.client
import re
import select
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loadtest.client.masks import OtherImageError, decode_mask

_MODEL_PATH = re.compile(r".*/(?:predictions/[^/]+|v2/models/[^/]+(?:/versions/[^/]+)?)")
_MOST_MESSAGE = 200  # characters of what a server said


class CompareError(ValueError):
    """What was asked for can't be compared; the message says why in a line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a deployment made of a picture.

    Attributes:
        seconds: from sending it to having all of the answer.
        labels: class ids [H, W]; None if there is no mask.
        colors: RGB of every class [K, 3], as the mask's palette has them; None without a palette.
        error: why there is no mask; empty if there is one.
    """

    seconds: float
    labels: np.ndarray | None = None
    colors: np.ndarray | None = None
    error: str = ""


class Deployment:
    """A model behind a URL. It keeps one connection and never asks twice.

    Args:
        role: what to call it in messages.
        headers: sent with every request; a gateway's key, or options such as X-MPM-Schedule.

    Raises:
        CompareError: the URL is not one of a model.
    """

    def __init__(self, role: str, url: str, headers: Mapping[str, str], timeout_seconds: float) -> None:
        parts = urllib.parse.urlsplit(url.removesuffix("/infer"))
        try:
            port = parts.port
        except ValueError:
            port = -1
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or port == -1
            or not _MODEL_PATH.fullmatch(parts.path)
            or parts.query
        ):
            raise CompareError(
                f"{role}: expected http(s)://HOST:PORT/predictions/NAME or .../v2/models/NAME, got {url!r}"
            )
        self.url = url
        self._is_triton = "/v2/models/" in parts.path
        self._path = parts.path + ("/infer" if self._is_triton else "")
        self._headers = {"Content-Type": "application/octet-stream", "Accept": "image/png", **headers}
        if self._is_triton:
            self._headers |= {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": "MASK_PNG"}
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._timeout_seconds = timeout_seconds
        self._connection = make(parts.hostname, port, timeout=timeout_seconds)

    def ask(self, picture: bytes) -> Answer:
        """The picture's mask, or why there is none; never raises for what a server does."""
        if self._connection.sock is not None and select.select([self._connection.sock], [], [], 0)[0]:
            self._connection.close()  # the server ended it meanwhile
        start = time.monotonic()
        try:
            self._connection.request("POST", self._path, picture, self._headers)
            response = self._connection.getresponse()
            body = response.read()
        except TimeoutError:
            self._connection.close()
            return Answer(time.monotonic() - start, error=f"no answer within {self._timeout_seconds:g} s")
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Answer(time.monotonic() - start, error=f"no answer: {error or type(error).__name__}")
        seconds = time.monotonic() - start
        if response.status != 200:
            said = " ".join(body.decode(errors="replace").split())[:_MOST_MESSAGE]
            return Answer(seconds, error=f"status {response.status}: {said}")
        if self._is_triton:
            described = response.headers.get("Inference-Header-Content-Length", "0")
            body = body[int(described) + 4 if described.isdecimal() else 0 :]  # 4 bytes are the value's length
        return _answer_with(body, seconds)

    def close(self) -> None:
        self._connection.close()


def _answer_with(body: bytes, seconds: float) -> Answer:
    try:
        return Answer(seconds, *decode_mask(body))
    except OtherImageError as other:
        got = str(other)
    except OSError:
        got = repr(body[:20])
    return Answer(seconds, error=f"expected a PNG of class ids, got {got}")
