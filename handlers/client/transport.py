"""Sends requests to a served model, once, and gives back what was answered, whatever that is."""

import http.client
import math
import select
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Self

from .answers import Answer, NoAnswerError
from .endpoints import GRPC_OPTIONS, GRPC_SERVICE, Endpoint, grpc_failure, grpc_value, parse_url


class Transport(ABC):
    """Sends requests to one served model; a context manager that closes its connections."""

    def ask(
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
            picture: encoded, or an uncompressed frame as .npy.
            accept: media type of the answer; on Triton one of `OUTPUTS`.
            headers: options, such as {"X-MPM-Schedule": "off"}; gRPC sends them as parameters of the request.
            timeout_seconds: of connecting, and of each read.

        Raises:
            NoAnswerError: the connection failed.
            TimeoutError: no answer in time.
        """
        return self._ask(picture, accept, content_type, headers or {}, timeout_seconds)

    @abstractmethod
    def _ask(
        self, picture: bytes, accept: str, content_type: str, headers: Mapping[str, str], timeout_seconds: float
    ) -> Answer:
        """See `ask`."""

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


def connect(url: str, *, connection_seconds: float = math.inf) -> Transport:
    """What sends requests to the model at a URL; nothing is sent yet.

    Args:
        url: http(s)://HOST:PORT/predictions/NAME (TorchServe, and the edge of either server),
            http(s)://HOST:PORT/v2/models/NAME (Triton; versions too), or grpc://HOST:PORT/NAME (Triton).
        connection_seconds: age from which a connection is not used again. A Service of Kubernetes balances
            connections, not requests: 0 opens one for each request.

    Raises:
        ValueError: the URL is none of these.
    """
    endpoint = parse_url(url)
    return (_Grpc if endpoint.protocol == "grpc" else _Http)(endpoint, connection_seconds)


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
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it had read everything
            connection.request(method, target, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(f"{type(error).__name__}: {error}") from None
    named = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, content, named), response.will_close


class _Http(Transport):
    """HTTP/1.1 over connections that are kept; one is opened where none is idle."""

    def __init__(self, endpoint: Endpoint, connection_seconds: float) -> None:
        self._endpoint = endpoint
        self._connection_seconds = connection_seconds
        self._idle: list[_Connection] = []

    def _ask(
        self, picture: bytes, accept: str, content_type: str, headers: Mapping[str, str], timeout_seconds: float
    ) -> Answer:
        sent = self._endpoint.headers(accept, content_type, headers)
        return self._endpoint.value(self._request("POST", self._endpoint.target, picture, sent, timeout_seconds))

    def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        try:
            return self._request("GET", self._endpoint.ready_target, None, {}, timeout_seconds).status == 200
        except OSError:
            return False

    def close(self) -> None:
        while self._idle:
            self._idle.pop().http.close()

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
        return answer

    def _connection(self, timeout_seconds: float) -> "_Connection":
        while True:
            try:
                kept = self._idle.pop()
            except IndexError:
                return _Connection(_open(self._endpoint.url, timeout_seconds), time.monotonic())
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


class _Grpc(Transport):
    """Triton over gRPC, without the retries of tritonclient; one channel at a time."""

    def __init__(self, endpoint: Endpoint, connection_seconds: float) -> None:
        import grpc
        from tritonclient.grpc import service_pb2

        self._grpc, self._messages = grpc, service_pb2
        self._endpoint, self._connection_seconds = endpoint, connection_seconds
        self._channel = self._open()

    def _ask(
        self, picture: bytes, accept: str, content_type: str, headers: Mapping[str, str], timeout_seconds: float
    ) -> Answer:
        request = self._endpoint.message(self._messages, picture, accept, headers)
        if self._channel.used and self._channel.age >= self._connection_seconds:
            self._channel.retire()
            self._channel = self._open()
        try:
            return grpc_value(
                self._channel.call("ModelInfer", request, self._messages.ModelInferResponse, timeout_seconds)
            )
        except self._grpc.RpcError as error:
            return grpc_failure(error)

    def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        messages = self._messages
        request = messages.ModelReadyRequest(name=self._endpoint.model)
        try:
            reply: Any = self._channel.call("ModelReady", request, messages.ModelReadyResponse, timeout_seconds)
        except self._grpc.RpcError:
            return False
        return bool(reply.ready)

    def close(self) -> None:
        self._channel.retire()

    def _open(self) -> "_Channel":
        return _Channel(self._grpc.insecure_channel(self._endpoint.url.netloc, GRPC_OPTIONS))


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
                GRPC_SERVICE + method,
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
