"""Where a model is, and how it is asked there: requests and answers as data, for whatever sends them."""

import re
import struct
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .answers import Answer, NoAnswerError

OUTPUTS = {"image/png": "MASK_PNG", "application/json": "RESULT_JSON"}  # of Triton, by what TorchServe accepts
GRPC_SERVICE = "/inference.GRPCInferenceService/"

_MODEL_PATH = re.compile(r"/(?:.*/)?(?:predictions/[^/]+|v2/models/[^/]+(?:/versions/[^/]+)?)")
_GRPC_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}
_MAX_MESSAGE_BYTES = 256 * 2**20
GRPC_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The model at a URL.

    Attributes:
        url: its parts.
        protocol: "torchserve", "triton" or "grpc".
    """

    url: urllib.parse.SplitResult
    protocol: str

    @property
    def target(self) -> str:
        """Where pictures are posted to."""
        return f"{self.url.path}/infer" if self.protocol == "triton" else self.url.path

    @property
    def ready_target(self) -> str:
        return f"{self.url.path}/ready" if self.protocol == "triton" else "/ping"

    @property
    def model(self) -> str:
        """Its name, for gRPC."""
        return self.url.path[1:]

    def headers(self, accept: str, content_type: str, options: Mapping[str, str]) -> dict[str, str]:
        """Of a picture that is posted.

        Raises:
            ValueError: Triton has no output of the type that is to be accepted.
        """
        wanted = {"Accept": accept}
        if self.protocol == "triton":  # a raw body in, and one binary output back
            wanted = {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": _output(accept)}
        return {"Content-Type": content_type, "Accept-Encoding": "identity", **wanted, **options}

    def value(self, answer: Answer) -> Answer:
        """An answer of HTTP as TorchServe would have given it: of Triton's, the only output."""
        described = answer.headers.get("inference-header-content-length", "")
        if self.protocol != "triton" or answer.status != 200 or not described.isdecimal():
            return answer
        return Answer(200, answer.body[int(described) + 4 :], answer.headers)  # 4 bytes are the value's length

    def message(self, messages: Any, picture: bytes, accept: str, options: Mapping[str, str]) -> Any:
        """A request of gRPC, without the tensors of tritonclient.

        Raises:
            ValueError: as `headers`.
        """
        request = messages.ModelInferRequest(
            model_name=self.model,
            inputs=[messages.ModelInferRequest.InferInputTensor(name="IMAGE", datatype="BYTES", shape=[1, 1])],
            outputs=[messages.ModelInferRequest.InferRequestedOutputTensor(name=_output(accept))],
            raw_input_contents=[struct.pack("<I", len(picture)) + picture],
        )
        for name, value in options.items():
            request.parameters[name.lower()].string_param = value
        return request


def parse_url(url: str) -> Endpoint:
    """Find out how the model at a URL is asked, see `connect`.

    Raises:
        ValueError: the URL is none of a model.
    """
    parts = urllib.parse.urlsplit(url.removesuffix("/infer"))
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme == "grpc" and parts.hostname and port and port > 0 and re.fullmatch(r"/[^/]+", parts.path):
        return Endpoint(parts, "grpc")
    http = parts.scheme in ("http", "https") and parts.hostname and port != -1 and not parts.query
    if http and _MODEL_PATH.fullmatch(parts.path):
        return Endpoint(parts, "triton" if "/v2/models/" in parts.path else "torchserve")
    raise ValueError(
        "url: expected http(s)://HOST:PORT/predictions/NAME or .../v2/models/NAME, or grpc://HOST:PORT/NAME, "
        f"got {url!r}"
    )


def grpc_value(reply: Any) -> Answer:
    return Answer(200, bytes(reply.raw_output_contents[0][4:]))


def grpc_failure(error: Any) -> Answer:
    """What an error of gRPC says, as an answer.

    Raises:
        NoAnswerError: the connection failed.
        TimeoutError: no answer in time.
    """
    code, details = error.code().name, error.details() or ""
    if code == "DEADLINE_EXCEEDED":
        raise TimeoutError from None
    if code == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
        raise NoAnswerError(details[:200]) from None
    return Answer(_GRPC_STATUS.get(code, 500), details.encode())


def _output(accept: str) -> str:
    if accept not in OUTPUTS:
        raise ValueError(f"accept: expected one of {', '.join(OUTPUTS)} on Triton, got {accept!r}")
    return OUTPUTS[accept]
