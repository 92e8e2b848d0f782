"""Three ways to ask for a mask: TorchServe over HTTP, Triton over HTTP and over gRPC.

A client is shared by many threads or greenlets, keeps idle connections and never asks again by itself: what a server
dropped is reported, not repeated. Nothing here knows gevent; under its monkey patches the same code is cooperative.

What stands between may balance connections instead of requests, as a Service of Kubernetes does: then few connections
that are kept reach few replicas. `connection_seconds` ends them after a while; 0 gives every request its own.
"""

import http.client
import math
import re
import select
import struct
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .pictures import Item

_TOKENS = re.compile(r"in=(\d+), out=(\d+)")
_REPLICA = "X-Served-By"  # docker/haproxy.cfg says so
_MAX_MESSAGE_BYTES = 256 * 2**20
_OUTPUTS = {"png": "MASK_PNG", "raw": "MASK_PNG", "bad": "MASK_PNG", "json": "RESULT_JSON"}
_GRPC_STATUS = {"OK": 200, "INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}


class NoAnswerError(Exception):
    """The server could not be reached, or ended the connection."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP, or what Triton's HTTP would have said.
        body: of the answer, or the message of an error.
        tokens: of the picture before and after merging, where the server tells.
        replica: who answered, where a proxy tells.
    """

    status: int
    body: bytes
    tokens: tuple[int, int] | None = None
    replica: str | None = None


class Client(ABC):
    """Asks one model on one or several servers, in turn."""

    @abstractmethod
    def ask(self, item: Item, number: int, timeout_seconds: float) -> Answer:
        """Send an item; its number chooses the server.

        Raises:
            NoAnswerError: the connection failed.
            TimeoutError: no answer in time.
        """

    @abstractmethod
    def close(self) -> None:
        """End all idle connections."""


class HttpClient(Client):
    """HTTP/1.1 over connections that are kept; one is opened wherever none is idle."""

    def __init__(
        self,
        urls: Sequence[str],
        path: str,
        headers: Callable[[Item], Mapping[str, str]],
        connection_seconds: float = math.inf,
    ) -> None:
        self._hosts = [_host_of(url) for url in urls]
        self._path = path
        self._headers = headers
        self._connection_seconds = connection_seconds
        self._idle: list[list[_Connection]] = [[] for _ in urls]

    def ask(self, item: Item, number: int, timeout_seconds: float) -> Answer:
        server = number % len(self._hosts)
        kept = self._connection(server, timeout_seconds)
        connection = kept.http
        try:
            connection.request("POST", self._path, item.body, dict(self._headers(item)))
            response = connection.getresponse()
            body = response.read()
        except TimeoutError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoAnswerError(f"{type(error).__name__}: {error}") from None
        except BaseException:  # a greenlet that is ended in the middle would leave half an answer behind
            connection.close()
            raise
        if response.will_close or kept.age >= self._connection_seconds:
            connection.close()
        else:
            self._idle[server].append(kept)
        return self._answer(response, body)

    def close(self) -> None:
        for idle in self._idle:
            while idle:
                idle.pop().http.close()

    def _connection(self, server: int, timeout_seconds: float) -> "_Connection":
        idle = self._idle[server]
        while idle:
            kept = idle.pop()
            sock = kept.http.sock
            ended = sock is None or select.select([sock], [], [], 0)[0]  # by the server, meanwhile
            if not ended and kept.age < self._connection_seconds:
                sock.settimeout(timeout_seconds)
                return kept
            kept.http.close()
        host, port = self._hosts[server]
        return _Connection(http.client.HTTPConnection(host, port, timeout=timeout_seconds), time.monotonic())

    def _answer(self, response: http.client.HTTPResponse, body: bytes) -> Answer:
        tokens = _TOKENS.fullmatch(response.headers.get("X-MPM-Tokens", ""))
        counts = (int(tokens[1]), int(tokens[2])) if tokens else None
        return Answer(response.status, body, counts, response.headers.get(_REPLICA))


@dataclass(frozen=True, slots=True)
class _Connection:
    """A connection, and when it was opened."""

    http: http.client.HTTPConnection
    opened: float

    @property
    def age(self) -> float:
        return time.monotonic() - self.opened


class TritonHttpClient(HttpClient):
    """The same; of a good answer only its one output."""

    def _answer(self, response: http.client.HTTPResponse, body: bytes) -> Answer:
        if response.status == 200:
            described = int(response.headers.get("Inference-Header-Content-Length", "0"))
            body = body[described + 4 :]  # the length of the only value takes 4 bytes
        return Answer(response.status, body, replica=response.headers.get(_REPLICA))


class TritonGrpcClient(Client):
    """gRPC without the client library's own retries or tensors; one channel a server, or one after the other."""

    def __init__(self, urls: Sequence[str], model: str, connection_seconds: float = math.inf) -> None:
        import grpc
        from tritonclient.grpc import service_pb2

        self._grpc, self._messages, self._model = grpc, service_pb2, model
        self._connection_seconds = connection_seconds
        self._targets = [_target_of(url) for url in urls]
        self._channels = [self._open(target) for target in self._targets]

    def ask(self, item: Item, number: int, timeout_seconds: float) -> Answer:
        messages = self._messages
        image = messages.ModelInferRequest.InferInputTensor(name="IMAGE", datatype="BYTES", shape=[1, 1])
        output = messages.ModelInferRequest.InferRequestedOutputTensor(name=_OUTPUTS[item.kind])
        request = messages.ModelInferRequest(
            model_name=self._model,
            inputs=[image],
            outputs=[output],
            raw_input_contents=[struct.pack("<I", len(item.body)) + item.body],
        )
        channel = self._channel(number % len(self._channels))
        try:
            reply: Any = channel.infer(request, timeout_seconds)
        except self._grpc.RpcError as error:
            code = error.code().name
            if code == "DEADLINE_EXCEEDED":
                raise TimeoutError from None
            details = error.details() or ""
            if code == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
                raise NoAnswerError(details[:200]) from None
            return Answer(_GRPC_STATUS.get(code, 500), details.encode())
        return Answer(200, bytes(reply.raw_output_contents[0][4:]))

    def close(self) -> None:
        for channel in self._channels:
            channel.retire()

    def _open(self, target: str) -> "_Channel":
        options = [
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return _Channel(self._grpc.insecure_channel(target, options), self._messages)

    def _channel(self, server: int) -> "_Channel":
        channel = self._channels[server]
        if channel.used and channel.age >= self._connection_seconds:
            channel.retire()
            channel = self._channels[server] = self._open(self._targets[server])
        return channel


class _Channel:
    """A channel that ends once it is retired and all its calls are answered."""

    def __init__(self, channel: Any, messages: Any) -> None:
        self.used = False
        self._channel = channel
        self._call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=messages.ModelInferRequest.SerializeToString,
            response_deserializer=messages.ModelInferResponse.FromString,
        )
        self._opened = time.monotonic()
        self._calls = 0
        self._retired = False

    @property
    def age(self) -> float:
        return time.monotonic() - self._opened

    def infer(self, request: Any, timeout_seconds: float) -> Any:
        self.used = True
        self._calls += 1
        try:
            return self._call(request, timeout=timeout_seconds)
        finally:
            self._calls -= 1
            self._end()

    def retire(self) -> None:
        self._retired = True
        self._end()

    def _end(self) -> None:
        if self._retired and not self._calls:
            self._channel.close()


def _torchserve(urls: Sequence[str], model: str, connection_seconds: float = math.inf) -> Client:
    accepted = {"json": "application/json"}

    def headers(item: Item) -> dict[str, str]:
        return {"Content-Type": item.content_type, "Accept": accepted.get(item.kind, "image/png")}

    return HttpClient(urls, f"/predictions/{model}", headers, connection_seconds)


def _triton(urls: Sequence[str], model: str, connection_seconds: float = math.inf) -> Client:
    def headers(item: Item) -> dict[str, str]:
        return {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": _OUTPUTS[item.kind]}

    return TritonHttpClient(urls, f"/v2/models/{model}/infer", headers, connection_seconds)


WAYS: Mapping[str, Callable[..., Client]] = {
    "torchserve": _torchserve,
    "triton": _triton,
    "triton-grpc": TritonGrpcClient,
}


def check_url(way: str, url: str) -> None:
    """Raise a ValueError unless a client of that way could ask there."""
    if way == "triton-grpc":
        _target_of(url)
    else:
        _host_of(url)


def _host_of(url: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme != "http" or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"url: expected http://HOST:PORT, got {url!r}")
    return host, port


def _target_of(url: str) -> str:
    target = url.removeprefix("grpc://").removesuffix("/")
    host, colon, port = target.rpartition(":")
    if not host or not colon or not port.isdecimal() or "/" in host:
        raise ValueError(f"url: expected HOST:PORT of gRPC, got {url!r}")
    return target
