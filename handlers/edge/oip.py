"""The Open Inference Protocol (KServe v2), for pictures in JSON, and for servers that do not speak it.

`IMAGE` holds pictures, in base64 or behind the JSON as the binary extension has it; answers are made from the plain
answers of single pictures.
"""

import ast
import base64
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.api.headers import OPTION_HEADERS
from handlers.errors import ErrorKind, ServingError

from .bodies import check_json, check_picture, decode_base64, too_many
from .limits import Limits
from .triton import LENGTH_HEADER, NPY_TYPES, OUTPUTS, check_is_json, header_length

PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(/infer|/ready)?")
HEALTH = ("/v2/health/live", "/v2/health/ready")
ACCEPTED = {output: media_type for media_type, output in OUTPUTS.items()}

_DATATYPES = {npy_type: datatype for datatype, npy_type in NPY_TYPES.items()}
_BINARY = "binary_data_output"


@dataclass(frozen=True, slots=True)
class Inference:
    """What a request asks for.

    Attributes:
        id: that the reply repeats; empty for none.
        pictures: encoded.
        outputs: their names, and whether they come behind the JSON.
        options: headers that the parameters of the request stand for.
    """

    id: str
    pictures: list[bytes]
    outputs: dict[str, bool]
    options: dict[str, str]


def is_native(headers: Mapping[str, str]) -> bool:
    """Whether a Triton answers it as it is: it comes as the binary extension says."""
    return LENGTH_HEADER in headers


def read_inference(data: bytes, headers: Mapping[str, str], limits: Limits) -> Inference:
    """Read the body of a request.

    Raises:
        ServingError: with the field, what was expected and what came.
    """
    length = header_length(headers, data)
    if length == 0:
        names = [name.strip() for name in headers.get("X-MPM-Outputs", ",".join(ACCEPTED)).split(",")]
        return Inference("", [check_picture(data)], _outputs([{"name": name} for name in names], True), {})
    document = data[:length]
    check_is_json(document)
    check_json(document, limits)
    try:
        fields: Any = json.loads(document)
        inputs = fields["inputs"]
        if not isinstance(inputs, list) or len(inputs) != 1:
            raise ValueError("another number of inputs")
        (image,) = inputs
        name, datatype, shape = image["name"], image["datatype"], image["shape"]
        given = fields.get("parameters", {})
        size = image.get("parameters", {}).get("binary_data_size")
        chosen = fields.get("outputs")
        request_id = str(fields.get("id", ""))
        values = image.get("data") if size is None else None
        options = {key.lower(): value for key, value in given.items() if key != _BINARY}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"[:120]
        raise _wrong("JSON: expected one input with name, datatype, shape and data", told) from None
    if (name, datatype) != ("IMAGE", "BYTES"):
        raise _wrong("inputs: expected IMAGE of BYTES", f"{str(name)[:40]} of {str(datatype)[:40]}")
    if not isinstance(shape, list) or shape[1:] not in ([], [1]) or [type(n) for n in shape[:1]] != [int]:
        raise _wrong("IMAGE: expected a shape of [pictures, 1]", repr(shape)[:40])
    count = shape[0]
    too_many("IMAGE", count)
    for key, value in options.items():
        if key not in OPTION_HEADERS or not isinstance(value, str):
            raise _wrong(f"parameters: expected text for some of {', '.join(OPTION_HEADERS)}", repr(key[:40]))
    if size is None:
        values = values if isinstance(values, list) else [values]
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        pictures = [decode_base64("IMAGE", each) for each in flat]
    else:
        pictures = _binary_values(data[len(document) :], size)
    if len(pictures) != count:
        raise _wrong(f"IMAGE: expected {count} pictures, as its shape says", str(len(pictures)))
    binary = given.get(_BINARY) is True
    default = list(ACCEPTED) if binary else [name for name in ACCEPTED if name != "MASK"]
    outputs = _outputs([{"name": name} for name in default] if chosen is None else chosen, binary)
    return Inference(request_id, pictures, outputs, options)


def write_reply(
    inference: Inference, model: str, version: str | None, answers: Mapping[str, Sequence[bytes]]
) -> tuple[bytes, dict[str, str]]:
    """A reply and its headers.

    Args:
        answers: of each output, the plain answer for each picture.

    Raises:
        ServingError: masks differ in size.
    """
    described: list[dict[str, Any]] = []
    behind = b""
    for name, binary in inference.outputs.items():
        bodies = answers[name]
        output: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [len(bodies), 1]}
        if name == "MASK":
            raw, output["datatype"], shapes = _arrays(bodies)
            if len(set(shapes)) > 1:
                raise _wrong("MASK: expected pictures of one size in a batch", f"{shapes[0]} and others")
            output["shape"] = [len(bodies), *shapes[0]]
        else:
            raw = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
        if binary:
            output["parameters"] = {"binary_data_size": len(raw)}
            behind += raw
        elif name == "RESULT_JSON":
            output["data"] = [body.decode() for body in bodies]
        else:
            output |= {
                "parameters": {"content_type": "base64"},
                "data": [base64.b64encode(body).decode() for body in bodies],
            }
        described.append(output)
    fields = {"model_name": model, "model_version": version or "1", "outputs": described}
    document = json.dumps(fields | ({"id": inference.id} if inference.id else {}), separators=(",", ":")).encode()
    if not any(inference.outputs.values()):
        return document, {"Content-Type": "application/json"}
    return document + behind, {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(document))}


def describe(model: str) -> dict[str, Any]:
    """A model's metadata."""
    outputs = [{"name": name, "datatype": "BYTES", "shape": [-1, 1]} for name in ACCEPTED if name != "MASK"]
    outputs.append({"name": "MASK", "datatype": "UINT8", "shape": [-1, -1, -1]})
    image = {"name": "IMAGE", "datatype": "BYTES", "shape": [-1, 1]}
    return {"name": model, "versions": ["1"], "platform": "torchserve", "inputs": [image], "outputs": outputs}


def _outputs(chosen: Any, binary: bool) -> dict[str, bool]:
    try:
        found = {each["name"]: each.get("parameters", {}).get("binary_data", binary) is True for each in chosen}
    except (KeyError, TypeError, AttributeError):
        raise _wrong("outputs: expected a list of objects with a name", repr(chosen)[:40]) from None
    if not found or not found.keys() <= ACCEPTED.keys():
        raise _wrong(f"outputs: expected some of {', '.join(ACCEPTED)}", ", ".join(map(str, found))[:40] or "none")
    if found.get("MASK") is False:
        raise _wrong("MASK: expected binary_data true, or MASK_PNG in its place", "it as JSON")
    return found


def _binary_values(behind: bytes, size: Any) -> list[bytes]:
    if size != len(behind):
        raise _wrong(f"binary_data_size: expected {len(behind)}, as follow the JSON", repr(size)[:40])
    found, position = [], 0
    while position < size:
        start = position + 4
        (length,) = struct.unpack("<I", behind[position:start]) if start <= size else (size,)
        position = start + length
        if position > size:
            raise _wrong("IMAGE: expected each picture behind its length, 4 bytes", "less than a length says")
        found.append(check_picture(behind[start:position]))
        too_many("IMAGE", len(found))
    return found


def _arrays(bodies: Sequence[bytes]) -> tuple[bytes, str, list[tuple[int, ...]]]:
    """The values, datatype and shapes of NumPy files that a server of ours wrote."""
    raw, shapes, datatype = [], [], ""
    for body in bodies:
        end = 10 + struct.unpack("<H", body[8:10])[0]
        described = ast.literal_eval(body[10:end].decode())
        datatype = _DATATYPES[described["descr"]]
        shapes.append(described["shape"])
        raw.append(body[end:])
    return b"".join(raw), datatype, shapes


def _wrong(expected: str, got: str) -> ServingError:
    return ServingError(ErrorKind.BAD_REQUEST, f"{expected}, got {got}")
