"""Is the model behind a server alive? Asks it for the mask of a tiny picture; status 0 if that comes, else 1.

    python -m handlers.launch.health http://127.0.0.1:8080/predictions/NAME [--timeout 20]   # TorchServe
    python -m handlers.launch.health http://127.0.0.1:8000/v2/models/NAME                    # Triton

Both servers call themselves healthy while the process that holds the model is dead or stuck: a liveness
probe has to ask the model. An overloaded one may refuse, or answer late, and is alive all the same if it computed
something in the meantime. Its metrics tell that, so they have to be exported; without them a server that refuses is
asked again until the time is over, because it is alive if room comes.
"""

import argparse
import http.client
import sys
import time
import urllib.parse
import urllib.request
import zlib
from typing import NamedTuple

from handlers.png import png_file, png_size

_SIDE = 16
_PAUSE_SECONDS = 0.2
_METRICS_SECONDS = 5.0
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_NO_ROOM = (503, 504, 507)  # refused, late, or bodies on their way in are too many
_METRICS_PORT = 8090  # of the Makefile, the images and the manifests


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
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.path.startswith(("/predictions/", "/v2/models/")):
        raise ValueError(f"url: expected http://HOST:PORT/predictions/NAME or .../v2/models/NAME, got {url!r}")
    deadline = time.monotonic() + timeout_seconds
    before = read_progress(metrics_url, url)
    told = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            status, mask = _ask(parts, left)
        except TimeoutError:
            if _computes(before, metrics_url, url):
                return
            raise UnhealthyError(f"{url}: not answered within {timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnhealthyError(f"{url}: {error or type(error).__name__}") from None
        if status == 200:
            if not _is_mask(mask):
                raise UnhealthyError(f"{url}: expected the mask of the picture, got {mask[:40]!r}")
            return
        told = f"status {status}: {mask[:200].decode(errors='replace').strip()}"
        if status not in _NO_ROOM:
            raise UnhealthyError(f"{url}: {told}", status)
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
    model = f'model="{urllib.parse.urlsplit(model_url).path.split("/")[3 if "/v2/" in model_url else 2]}"'
    try:
        with _DIRECTLY.open(metrics_url, timeout=_METRICS_SECONDS) as response:
            lines = response.read().decode().splitlines()
        totals = [
            sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{") and model in line)
            for name in ("mpm_images_total", "mpm_tokens_total")
        ]
    except (OSError, http.client.HTTPException, ValueError):
        return None
    return Progress(*totals)


def _computes(before: Progress | None, metrics_url: str, model_url: str) -> bool:
    """Whether a model got something done since."""
    now = read_progress(metrics_url, model_url)
    return before is not None and now is not None and now.tokens > before.tokens


def tiny_picture() -> bytes:
    """A black PNG, made without a codec: a probe that runs every few seconds should start fast."""
    return png_file(_SIDE, _SIDE, 8, 0, (b"IDAT", zlib.compress(bytes(_SIDE * (1 + _SIDE)))))


def _ask(url: urllib.parse.SplitResult, timeout_seconds: float) -> tuple[int, bytes]:
    """Status, and the body; of Triton's good answers only the mask in it."""
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=timeout_seconds)
    triton = url.path.startswith("/v2/")
    headers = {"Content-Type": "image/png", "Accept": "image/png", "Connection": "close"}
    if triton:
        headers |= {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": "MASK_PNG"}
    try:
        connection.request("POST", url.path + ("/infer" if triton else ""), tiny_picture(), headers)
        response = connection.getresponse()
        body = response.read()
        if triton and response.status == 200:
            described = int(response.getheader("Inference-Header-Content-Length", "0"))
            body = body[described + 4 :]  # the length of the only value takes 4 bytes
        return response.status, body
    finally:
        connection.close()


def _is_mask(data: bytes) -> bool:
    return png_size(data) == (_SIDE, _SIDE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m handlers.launch.health", description=__doc__.split("\n")[0])
    parser.add_argument("url", help="of the model: .../predictions/NAME (TorchServe) or .../v2/models/NAME (Triton)")
    parser.add_argument("--timeout", type=float, default=20, metavar="SECONDS", help="for everything (20)")
    parser.add_argument("--metrics", metavar="URL", help="of the model's metrics (port 8090 of the server's host)")
    arguments = parser.parse_args()
    host = urllib.parse.urlsplit(arguments.url).hostname
    metrics_url = f"http://{host}:{_METRICS_PORT}/metrics" if arguments.metrics is None else arguments.metrics
    try:
        check_model(arguments.url, timeout_seconds=arguments.timeout, metrics_url=metrics_url if host else "")
    except (UnhealthyError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
