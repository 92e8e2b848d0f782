"""TorchServe's plain call made Triton's binary one, and what Triton must not be sent."""

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

from handlers.api.headers import GREY_TYPE, negotiate
from handlers.errors import ErrorKind, ServingError

from .bodies import check_json, too_long
from .limits import Limits

LENGTH_HEADER = "Inference-Header-Content-Length"
OUTPUTS = {"image/png": "MASK_PNG", "application/json": "RESULT_JSON", "application/x-npy": "MASK"}
NPY_TYPES = {"UINT8": "|u1", "UINT16": "<u2"}

_INFER = re.compile(r"/v2/models/[^/]+(/versions/[0-9]+)?/infer")
_BAD_JSON = ("failed to parse the request JSON buffer", "Unable to ")
_NO_ROOM = ("shared memory pool size", "single response, got 0")


def check_body(path: str, headers: Mapping[str, str], data: bytes, limits: Limits) -> None:
    """Refuse JSON that would end Triton, whose parser recurses; in binary requests it is what comes first.

    Raises:
        ServingError: with the field, what was expected and what came.
    """
    length = header_length(headers, data) if _INFER.fullmatch(path) else len(data)
    document = data[:length]
    check_is_json(document)
    if length > limits.json_bytes:
        raise too_long("JSON", limits.json_bytes, str(length))
    check_json(document, limits)
    if document and _INFER.fullmatch(path):
        _check_request(document)


def _check_request(document: bytes) -> None:
    """Refuse what is no JSON, and the extension that divides by zero in Triton where an output is of BYTES."""
    try:
        fields: Any = json.loads(document.decode(), object_pairs_hook=_without_twins)
    except ValueError as error:
        raise ServingError(ErrorKind.BAD_REQUEST, f"JSON: expected a document, got an error: {error}"[:200]) from None
    outputs = fields.get("outputs") if isinstance(fields, dict) else None
    for output in outputs if isinstance(outputs, list) else ():
        parameters = output.get("parameters") if isinstance(output, dict) else None
        if isinstance(parameters, dict) and "classification" in parameters:
            raise ServingError(ErrorKind.BAD_REQUEST, "outputs: expected no parameter classification, got one")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A parser may take the first of two equal names, and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that comes twice")
    return found


def check_is_json(document: bytes) -> None:
    """Refuse a picture where JSON belongs."""
    if document and document.lstrip()[:1] not in (b"{", b"["):
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"body: expected JSON, got {len(document)} other bytes; send a picture with '{LENGTH_HEADER}: 0'",
        )


def header_length(headers: Mapping[str, str], data: bytes) -> int:
    """How much of a body is JSON.

    Raises:
        ServingError: more than there is.
    """
    given = headers.get(LENGTH_HEADER)
    if given is None:
        return len(data)
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", given) or int(given) > len(data):
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"{LENGTH_HEADER}: expected a number within 0..{len(data)}, got {given[:40]!r}"
        )
    return int(given)


def infer_path(name: str, version: str | None) -> str:
    return f"/v2/models/{name}/versions/{version}/infer" if version else f"/v2/models/{name}/infer"


def infer_headers(headers: Mapping[str, str], accept: str) -> tuple[str, dict[str, str]]:
    """The media type of the answer, and headers that ask Triton for it.

    Raises:
        ServingError: nothing on offer is acceptable.
    """
    offered = (*OUTPUTS, GREY_TYPE) if "X-MPM-View" not in headers else ("image/png",)
    if headers.get("X-MPM-View") == "maps":
        offered = ("application/json",)
    media_type = negotiate(accept, offered)
    view = {}
    if media_type == GREY_TYPE:
        media_type, view = "image/png", {"X-MPM-View": "grey"}
    asked = {LENGTH_HEADER: "0", "X-MPM-Outputs": OUTPUTS[media_type], "Content-Type": "application/octet-stream"}
    return media_type, asked | view | {"Accept-Encoding": "identity"}  # Triton would compress what is to be unpacked


def unpack(reply: bytes, length: str, media_type: str) -> bytes:
    """The only output of a binary reply, whose JSON comes first; an array as a NumPy file."""
    body = reply[int(length) :]
    if media_type != "application/x-npy":
        return body[4:]  # the length of the only value
    output: dict[str, Any] = json.loads(reply[: int(length)])["outputs"][0]
    shape = tuple(output["shape"][1:])
    described = f"{{'descr': '{NPY_TYPES[output['datatype']]}', 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(10 + len(described) + 1) % 64
    head = f"{described}{' ' * padding}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


def status_of(status: int, error: str) -> tuple[int, str]:
    """Status and text of an error: for Triton bad JSON and a lack of shared memory are faults of its own."""
    if status == 500 and any(part in error for part in _NO_ROOM):
        return 503, "the server has no room in /dev/shm for this picture or its answer; ask again, or give it more"
    if status == 500 and error.startswith(_BAD_JSON):
        return 400, error
    return status, error
