"""The client of a served model: TorchServe over HTTP, Triton over HTTP and over gRPC.

    with connect("http://127.0.0.1:8080/predictions/segmenter") as client:
        answer = client.segment(picture, timeout_seconds=10)  # answer.status, answer.body

A client may be shared by threads or greenlets. It keeps idle connections, uses no proxy, and sends a request once:
what a server dropped is reported, not repeated. gRPC needs `tritonclient[grpc]`, everything else the standard library.
"""

import http.client
import io
import json
import math
import re
import select
import struct
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np

OUTPUTS = {"image/png": "MASK_PNG", "application/json": "RESULT_JSON"}  # of Triton, by what TorchServe accepts

_MODEL_PATH = re.compile(r"/(?:.*/)?(?:predictions/[^/]+|v2/models/[^/]+(?:/versions/[^/]+)?)")
_TOKENS = re.compile(r"in=(\d+), out=(\d+)")
_MAX_MESSAGE_BYTES = 256 * 2**20
_GRPC_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}


class NoAnswerError(ConnectionError):
    """The server could not be reached, or closed the connection before it had answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes:
        status: of HTTP; for gRPC the status that Triton's HTTP would have had.
        body: mask or description; the message of an error.
        headers: of HTTP, names in lower case; empty for gRPC.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of the picture before and after merging (`X-MPM-Tokens`)."""
        counts = _TOKENS.fullmatch(self.headers.get("x-mpm-tokens", ""))
        return (int(counts[1]), int(counts[2])) if counts else None

    @property
    def error(self) -> str:
        """What the server says is wrong, which is a field of JSON where it is one."""
        text = self.body[:2000].decode(errors="replace").strip()
        try:
            return str(json.loads(text)["error"])
        except (ValueError, KeyError, TypeError):
            return text or f"status {self.status}"

    @property
    def replica(self) -> str | None:
        """The server behind a proxy that names it (`X-Served-By`, as docker/haproxy.cfg sets it)."""
        return self.headers.get("x-served-by")


class Client(ABC):
    """Sends requests to one served model; a context manager that closes its connections."""

    @abstractmethod
    def segment(
        self,
        picture: bytes,
        *,
        accept: str = "image/png",
        content_type: str = "application/octet-stream",
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 60.0,
    ) -> Answer:
        """Send one picture.

        Args:
            picture: JPEG, PNG, WebP, or an uncompressed frame as .npy.
            accept: one of `OUTPUTS`.
            headers: options, such as {"X-MPM-Schedule": "off"}; gRPC sends them as parameters of the request.
            timeout_seconds: of connecting, and of each read.

        Raises:
            NoAnswerError: the connection failed.
            TimeoutError: no answer in time.
        """

    @abstractmethod
    def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        """Whether the server says that it takes requests for the model."""

    @abstractmethod
    def close(self) -> None:
        """Close all idle connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(url: str, *, connection_seconds: float = math.inf) -> Client:
    """A client of the model at a URL; nothing is sent yet.

    Args:
        url: http(s)://HOST:PORT/predictions/NAME (TorchServe), http(s)://HOST:PORT/v2/models/NAME (Triton; versions
            too), or grpc://HOST:PORT/NAME (Triton).
        connection_seconds: age from which a connection is not used again. A Service of Kubernetes balances
            connections, not requests: 0 opens one for each request.

    Raises:
        ValueError: the URL is none of these.
    """
    parts = urllib.parse.urlsplit(url.removesuffix("/infer"))
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme == "grpc" and parts.hostname and port and port > 0 and re.fullmatch(r"/[^/]+", parts.path):
        return _GrpcClient(parts.netloc, parts.path[1:], connection_seconds)
    http = parts.scheme in ("http", "https") and parts.hostname and port != -1 and not parts.query
    if http and _MODEL_PATH.fullmatch(parts.path):
        triton = "/v2/models/" in parts.path
        return (_TritonHttpClient if triton else _HttpClient)(parts, connection_seconds)
    raise ValueError(
        "url: expected http(s)://HOST:PORT/predictions/NAME or .../v2/models/NAME, or grpc://HOST:PORT/NAME, "
        f"got {url!r}"
    )


def fetch(
    url: str,
    body: bytes | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 5.0,
) -> Answer:
    """Send one request over a connection of its own: POST with a body, GET without.

    Args:
        url: of HTTP; its host is asked itself, whatever proxy the environment names.
        timeout_seconds: of connecting, and of each read.

    Raises:
        NoAnswerError: the connection failed.
        TimeoutError: no answer in time.
        ValueError: the URL is not one of HTTP.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url: expected http(s)://HOST:PORT/PATH, got {url!r}")
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    with closing(_open(parts, timeout_seconds)) as connection:
        return _exchange(connection, "GET" if body is None else "POST", target, body, headers or {})[0]


def _open(url: urllib.parse.SplitResult, timeout_seconds: float) -> http.client.HTTPConnection:
    make = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return make(url.hostname or "", url.port, timeout=timeout_seconds)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> tuple[Answer, bool]:
    """The answer, and whether the server closes the connection after it."""
    try:
        connection.request(method, target, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(f"{type(error).__name__}: {error}") from None
    named = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, content, named), response.will_close


class _HttpClient(Client):
    """TorchServe: HTTP/1.1 over connections that are kept; one is opened where none is idle."""

    def __init__(self, url: urllib.parse.SplitResult, connection_seconds: float) -> None:
        self._url = url
        self._connection_seconds = connection_seconds
        self._idle: list[_Connection] = []

    def segment(
        self,
        picture: bytes,
        *,
        accept: str = "image/png",
        content_type: str = "application/octet-stream",
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 60.0,
    ) -> Answer:
        sent = {"Content-Type": content_type, **self._headers(accept), **(headers or {})}
        return self._request("POST", self._target(), picture, sent, timeout_seconds)

    def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        try:
            return self._request("GET", self._ready_target(), None, {}, timeout_seconds).status == 200
        except OSError:
            return False

    def close(self) -> None:
        while self._idle:
            self._idle.pop().http.close()

    def _target(self) -> str:
        return self._url.path

    def _ready_target(self) -> str:
        return "/ping"

    def _headers(self, accept: str) -> dict[str, str]:
        return {"Accept": accept}

    def _value(self, answer: Answer) -> Answer:
        return answer

    def _request(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], timeout_seconds: float
    ) -> Answer:
        kept = self._connection(timeout_seconds)
        try:
            answer, will_close = _exchange(kept.http, method, target, body, headers)
        except BaseException:  # a greenlet that is killed would leave half an answer in the connection
            kept.http.close()
            raise
        if will_close or kept.age >= self._connection_seconds:
            kept.http.close()
        else:
            self._idle.append(kept)
        return self._value(answer)

    def _connection(self, timeout_seconds: float) -> "_Connection":
        while True:
            try:
                kept = self._idle.pop()
            except IndexError:
                return _Connection(_open(self._url, timeout_seconds), time.monotonic())
            sock = kept.http.sock
            closed = sock is None or select.select([sock], [], [], 0)[0]  # by the server, while it was idle
            if not closed and kept.age < self._connection_seconds:
                sock.settimeout(timeout_seconds)
                return kept
            kept.http.close()


@dataclass(frozen=True, slots=True)
class _Connection:
    http: http.client.HTTPConnection
    opened: float

    @property
    def age(self) -> float:
        return time.monotonic() - self.opened


def _output(accept: str) -> str:
    if accept not in OUTPUTS:
        raise ValueError(f"accept: expected one of {', '.join(OUTPUTS)} on Triton, got {accept!r}")
    return OUTPUTS[accept]


class _TritonHttpClient(_HttpClient):
    """Triton: a raw body in, and one binary output back."""

    def _target(self) -> str:
        return f"{self._url.path}/infer"

    def _ready_target(self) -> str:
        return f"{self._url.path}/ready"

    def _headers(self, accept: str) -> dict[str, str]:
        return {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": _output(accept)}

    def _value(self, answer: Answer) -> Answer:
        described = answer.headers.get("inference-header-content-length", "")
        if answer.status != 200 or not described.isdecimal():
            return answer
        return Answer(200, answer.body[int(described) + 4 :], answer.headers)  # 4 bytes are the value's length


class _GrpcClient(Client):
    """Triton over gRPC, without the tensors and retries of tritonclient; one channel at a time."""

    def __init__(self, address: str, model: str, connection_seconds: float) -> None:
        import grpc
        from tritonclient.grpc import service_pb2

        self._grpc, self._messages = grpc, service_pb2
        self._address, self._model, self._connection_seconds = address, model, connection_seconds
        self._channel = self._open()

    def segment(
        self,
        picture: bytes,
        *,
        accept: str = "image/png",
        content_type: str = "application/octet-stream",
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 60.0,
    ) -> Answer:
        messages = self._messages
        request = messages.ModelInferRequest(
            model_name=self._model,
            inputs=[messages.ModelInferRequest.InferInputTensor(name="IMAGE", datatype="BYTES", shape=[1, 1])],
            outputs=[messages.ModelInferRequest.InferRequestedOutputTensor(name=_output(accept))],
            raw_input_contents=[struct.pack("<I", len(picture)) + picture],
        )
        for name, value in (headers or {}).items():
            request.parameters[name.lower()].string_param = value
        if self._channel.used and self._channel.age >= self._connection_seconds:
            self._channel.retire()
            self._channel = self._open()
        try:
            reply: Any = self._channel.call("ModelInfer", request, messages.ModelInferResponse, timeout_seconds)
        except self._grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            if code == "DEADLINE_EXCEEDED":
                raise TimeoutError from None
            if code == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
                raise NoAnswerError(details[:200]) from None
            return Answer(_GRPC_STATUS.get(code, 500), details.encode())
        return Answer(200, bytes(reply.raw_output_contents[0][4:]))

    def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        messages = self._messages
        request = messages.ModelReadyRequest(name=self._model)
        try:
            reply: Any = self._channel.call("ModelReady", request, messages.ModelReadyResponse, timeout_seconds)
        except self._grpc.RpcError:
            return False
        return bool(reply.ready)

    def close(self) -> None:
        self._channel.retire()

    def _open(self) -> "_Channel":
        options = [
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return _Channel(self._grpc.insecure_channel(self._address, options))


class _Channel:
    """A channel that closes once it is retired and none of its calls is open."""

    def __init__(self, channel: Any) -> None:
        self.used = False
        self._channel = channel
        self._opened = time.monotonic()
        self._calls = 0
        self._retired = False

    @property
    def age(self) -> float:
        return time.monotonic() - self._opened

    def call(self, method: str, request: Any, reply: Any, timeout_seconds: float) -> Any:
        self.used = True
        self._calls += 1
        try:
            return self._channel.unary_unary(
                f"/inference.GRPCInferenceService/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply.FromString,
            )(request, timeout=timeout_seconds)
        finally:
            self._calls -= 1
            self._close_if_done()

    def retire(self) -> None:
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._calls:
            self._channel.close()


def segment_shared(address: str, model: str, frame: "np.ndarray", secret: str) -> "np.ndarray":
    """Pass an uncompressed frame to a Triton on this machine, and its class ids back, through shared memory.

    Args:
        address: HOST:PORT of gRPC.
        frame: uint8 RGB [H, W, 3].
        secret: the server's, because who may register memory may read what others registered.

    Returns:
        [H, W] class ids of a model with 256 classes at most, a copy of the shared memory.

    Raises:
        tritonclient.utils.InferenceServerException: the server refused.
    """
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import serialize_byte_tensor, shared_memory

    admin = {"triton-grpc-protocol-x-admin": secret}
    file = io.BytesIO()
    np.save(file, frame)
    image_bytes = serialize_byte_tensor(np.array([[file.getvalue()]], dtype=np.object_)).item()
    mask_bytes = frame.shape[0] * frame.shape[1]  # one a pixel
    name, size = f"mpm-{uuid4()}", len(image_bytes) + mask_bytes
    with triton.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        memory = shared_memory.create_shared_memory_region(name, f"/{name}", size)
        try:
            shared_memory.set_shared_memory_region(memory, [np.frombuffer(image_bytes, np.uint8)])
            client.register_system_shared_memory(name, f"/{name}", size, headers=admin)
            try:
                image = triton.InferInput("IMAGE", [1, 1], "BYTES")
                image.set_shared_memory(name, len(image_bytes))
                mask = triton.InferRequestedOutput("MASK")
                mask.set_shared_memory(name, mask_bytes, offset=len(image_bytes))
                client.infer(model, [image], outputs=[mask])
            finally:
                client.unregister_system_shared_memory(name, headers=admin)
            labels = shared_memory.get_contents_as_numpy(memory, np.uint8, list(frame.shape[:2]), len(image_bytes))
            return np.array(labels)
        finally:
            shared_memory.destroy_shared_memory_region(memory)


Key = tuple[str, tuple[tuple[str, str], ...]]
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{((?:[^\"}]|\"(?:[^\"\\]|\\.)*\")*)\})? +([^ ]+)(?: .*)?")
_LABEL = re.compile(r"(\w+)=\"((?:[^\"\\]|\\.)*)\"")


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of a metrics page in Prometheus' text format, by name and sorted labels."""

    values: Mapping[Key, float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a page; buckets of histograms are left out.

        Raises:
            ValueError: a line is no sample.
        """
        values: dict[Key, float] = {}
        for line in text.splitlines():
            if not line or line.startswith("#") or "_bucket{" in line:
                continue
            sample = _SAMPLE.fullmatch(line)
            if not sample:
                raise ValueError(f"metrics: expected a sample in Prometheus' text format, got {line[:80]!r}")
            values[sample[1], tuple(sorted(_LABEL.findall(sample[2] or "")))] = float(sample[3])
        return cls(values)

    @classmethod
    def sum(cls, pages: Iterable["Metrics"]) -> Self:
        """Add the pages of several servers up."""
        values: dict[Key, float] = {}
        for page in pages:
            for key, value in page.values.items():
                values[key] = values.get(key, 0.0) + value
        return cls(values)

    def total(self, name: str, **labels: str) -> float:
        """Sum of all series of a name that have these labels; 0 if there is none."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.values.items() if found == name and wanted <= set(has))

    def labels(self, name: str, label: str) -> list[str]:
        """Values of a label, sorted."""
        return sorted({dict(has)[label] for found, has in self.values if found == name and label in dict(has)})


def read_metrics(url: str, timeout_seconds: float = 5.0) -> Metrics:
    """Read a metrics page once, over a connection of its own and without proxies.

    Raises:
        OSError: no answer, or another status than 200.
        ValueError: the URL is not one of HTTP, or its page not in Prometheus' text format.
    """
    answer = fetch(url, timeout_seconds=timeout_seconds)
    if answer.status != 200:
        raise OSError(f"{url}: status {answer.status}")
    return Metrics.parse(answer.body.decode())
