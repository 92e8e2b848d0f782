"""Coverage-guided fuzzing of what reads clients' bytes: `python fuzzing.py TARGET SEEDS -max_total_time=SECONDS`.

Only the errors that clients are told may come out; anything else ends with the input in a file `crash-…`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["handlers.api", "handlers.edge.bodies", "handlers.edge.oip", "handlers.edge.triton", "mpm_ops.models"]
):
    from handlers.api.decode import decode_image
    from handlers.api.options import RequestOptions, request_id_from
    from handlers.edge.bodies import check_json, pictures_of_json
    from handlers.edge.limits import Limits
    from handlers.edge.oip import read_inference
    from handlers.edge.triton import check_body
    from handlers.errors import ServingError
    from mpm_ops.models import segmenter as variants

HEADERS = ("accept", "x-mpm-view", "x-mpm-schedule", "x-mpm-merger", "x-mpm-priority", "x-request-id")
VARIANT = Path("/dev/shm") / f"variant-{os.getpid()}.yml"


def decoder(data: bytes) -> None:
    with contextlib.suppress(ServingError):
        pixels = decode_image(data, max_bytes=2**22, max_pixels=2**20)
        assert pixels.dtype.name == "uint8"
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= 2**20


def frames(data: bytes) -> None:
    decoder(b"\x93NUMPY" + data)


def options(data: bytes) -> None:
    values = data.decode("latin-1").split("\n")
    headers = dict(zip(HEADERS, values, strict=False))
    with contextlib.suppress(ServingError):
        RequestOptions.from_headers(headers, request_id_from(headers, default="1"))


def documents(data: bytes) -> None:
    """What passes the check nests no deeper than it says, as a parser sees it."""
    limits = Limits()
    with contextlib.suppress(ServingError):
        pictures_of_json(data, limits)
    with contextlib.suppress(ServingError):
        read_inference(data, {"Inference-Header-Content-Length": str(len(data) // 2)}, limits)
    with contextlib.suppress(ServingError):
        check_body("/v2/models/a/infer", {"Inference-Header-Content-Length": str(len(data) // 2)}, data, limits)
    try:
        check_json(data, limits)
    except ServingError:
        return
    try:
        value = json.loads(data)
    except (ValueError, UnicodeDecodeError):  # a RecursionError would be a hole
        return
    assert depth(value) <= limits.json_depth


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def variant(data: bytes) -> None:
    VARIANT.write_bytes(data)
    with contextlib.suppress(ValueError):
        found = variants.read_variant(VARIANT)
        variants._segmenter_config(found)
        variants._inference_config(found, {})
        variants.trained_on(found)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (decoder, frames, options, documents, variant)
}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
