"""Every request of a client, from its headers to the last byte of its answer."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from yarl import URL

from handlers.api.headers import REQUEST_ID
from handlers.client import error_of
from handlers.errors import ErrorKind, ServingError

from . import triton
from .bodies import Body, Budget, picture_of_form, picture_of_json
from .connection import JSON_TYPE
from .info import Service
from .limits import Limits
from .metrics import HELD_BYTES, REFUSALS, REQUESTS, render
from .page import Page

_METHODS = ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE")
_TARGET = re.compile(r"/[!\"$-~]*")  # what a URL may hold, without a fragment
_PREDICT = re.compile(r"/predictions/([^/]+)(?:/([^/]+))?")
_KSERVE = re.compile(r"/v1/models/([^/:]+):predict")
# Of a connection, not of a request (RFC 9110, section 7.6.1); and what is made anew.
_OWN = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *(
        "transfer-encoding",
        "upgrade",
        "http2-settings",
        "expect",
        "content-length",
        "content-encoding",
        "x-request-id",
    ),
}
_ONCE = ("Host", "Content-Type", "Content-Encoding", "Expect", "X-Request-Id", triton.LENGTH_HEADER)
_EXPOSED = f"X-MPM-Request-Id, X-MPM-Tokens, X-Request-Id, Server-Timing, Retry-After, {triton.LENGTH_HEADER}"
METRICS_TYPE = {"Content-Type": "text/plain; version=0.0.4"}
_WHOLE_BYTES = 2**20  # up to here bodies go out in one piece
_PIECE_BYTES = 2**18
_FORM_BYTES = 2**16  # around a picture in a form or in JSON


class Edge:
    """Answers requests, most of them by asking the server behind.

    Args:
        upstream: URL of the server behind.
        is_triton: it is Triton, else TorchServe.
        limits: of clients.
        origins: whose pages may call from a browser; "*" for all.
        restarts: file in which the launcher counts processes that it started again.
        models: tells the URL of each model's metrics, by name.
        page: for people, if there is to be one.
    """

    def __init__(
        self,
        upstream: str,
        *,
        is_triton: bool,
        limits: Limits,
        origins: Sequence[str] = (),
        restarts: Path | None = None,
        models: Callable[[], Mapping[str, str]] = dict,
        page: Page | None = None,
    ) -> None:
        self.stopping = False
        self._upstream, self._is_triton, self._limits = upstream, is_triton, limits
        self._origins, self._restarts = origins, restarts
        self._budget = Budget(max(limits.held_bytes, 4 * limits.body_bytes))
        HELD_BYTES.set_function(lambda: self._budget.held)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=10),
            timeout=aiohttp.ClientTimeout(total=limits.answer_seconds, sock_connect=5),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=2**20,
        )
        self._service = Service(self._session, models, is_triton=is_triton, page=page)

    async def close(self) -> None:
        await self._session.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else str(uuid4())
        added = {"X-Request-Id": request_id, "Server": "mpm", **self._cors(request)}
        status = 499  # the client left
        try:
            try:
                with Body(request, self._limits, self._budget) as body:
                    response = await self._answer(request, body, added)
            except ServingError as error:
                REFUSALS.labels(error.kind.name.lower()).inc()
                response = _error(error, request_id)
                if error.kind.http_status < 500:
                    response.force_close()  # what follows on this connection may be anything
            status = response.status
            if not response.prepared:
                response.headers.update(added)
                if self.stopping:
                    response.force_close()
            async with asyncio.timeout(self._limits.body_seconds):
                await response.prepare(request)
                await response.write_eof()
            return response
        except TimeoutError:  # it doesn't take its answer
            raise _hang_up(request) from None
        finally:
            REQUESTS.labels(str(status)).inc()

    async def _answer(self, request: web.BaseRequest, body: Body, added: Mapping[str, str]) -> web.StreamResponse:
        _check_head(request)
        path = request.raw_path.partition("?")[0]
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204)
        if path == "/metrics" and request.method in ("GET", "HEAD"):
            return web.Response(body=render(self._restarts), headers=METRICS_TYPE)
        if request.method in ("GET", "HEAD") and (told := await self._service.answer(path)):
            return told
        found = _PREDICT.fullmatch(path) or _KSERVE.fullmatch(path)
        if found and request.method in ("POST", "PUT"):
            return await self._segment(request, body, found, added)
        data = await body.read(self._limits.body_bytes) if request.body_exists else b""
        if self._is_triton and data:
            triton.check_body(path, request.headers, data, self._limits)
        return await self._pass_on(request, request.raw_path, data, {}, added)

    async def _segment(
        self, request: web.BaseRequest, body: Body, path: re.Match[str], added: Mapping[str, str]
    ) -> web.StreamResponse:
        """Answer a picture, in whatever form it comes, by the one binary call of the server behind."""
        picture, content_type = await self._picture(request, body)
        is_kserve = path.re is _KSERVE
        name, version = path[1], None if is_kserve else path[2]
        accept = JSON_TYPE if is_kserve else request.headers.get("Accept", "*/*")
        if self._is_triton:
            media_type, asked = triton.infer_headers(request.headers, accept)
            upstream = await self._ask(request, triton.infer_path(name, version), picture, asked, added)
        elif is_kserve:
            asked = {"Content-Type": content_type, "Accept": accept, "Accept-Encoding": "identity"}
            media_type, upstream = accept, await self._ask(request, f"/predictions/{name}", picture, asked, added)
        else:
            return await self._pass_on(request, request.raw_path, picture, {"Content-Type": content_type}, added)
        async with upstream:
            reply = await _read(upstream)
            if upstream.status != 200 and self._is_triton:
                status, told = triton.status_of(upstream.status, error_of(reply, "the server gave no reason"))
                fields = {"code": status, "error": told, "request_id": added["X-Request-Id"]}
                return web.json_response(fields, status=status)
            if upstream.status != 200:
                return web.Response(body=reply, status=upstream.status, headers=_headers_of(upstream))
            headers = {} if self._is_triton else _headers_of(upstream)
        if self._is_triton:
            reply = triton.unpack(reply, upstream.headers.get(triton.LENGTH_HEADER, "0"), media_type)
        if is_kserve:
            reply = b'{"predictions":[' + reply.strip() + b"]}\n"
        return web.Response(body=reply, headers={**headers, "Content-Type": media_type})

    async def _picture(self, request: web.BaseRequest, body: Body) -> tuple[bytes, str]:
        """The bytes of the only picture in a request, and the type that they claim to be."""
        content_type = request.headers.get("Content-Type", "application/octet-stream")
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type == JSON_TYPE:
            data = await body.read(self._limits.body_bytes * 4 // 3 + _FORM_BYTES)
            return picture_of_json(data, self._limits), "application/octet-stream"
        if media_type == "multipart/form-data":
            data = await body.read(self._limits.body_bytes + _FORM_BYTES)
            return await picture_of_form(request, data), "application/octet-stream"
        data = await body.read(self._limits.body_bytes)
        if data[:8].lower().startswith((b"http://", b"https://")):
            raise ServingError(
                ErrorKind.BAD_REQUEST, "picture: expected its bytes, got a URL; nothing is fetched, send the picture"
            )
        # curl's default, whatever the body is.
        return data, "application/octet-stream" if media_type == "application/x-www-form-urlencoded" else content_type

    async def _pass_on(
        self, request: web.BaseRequest, target: str, data: bytes, changed: Mapping[str, str], added: Mapping[str, str]
    ) -> web.StreamResponse:
        async with await self._ask(request, target, data, changed, added) as upstream:
            headers = _headers_of(upstream)
            length = upstream.content_length
            if self._is_triton and upstream.status == 500:
                status, told = triton.status_of(500, error_of(await _read(upstream), "the server gave no reason"))
                return web.json_response({"error": told}, status=status)
            if (length is not None and length <= _WHOLE_BYTES) or request.method == "HEAD":
                return web.Response(
                    body=await _read(upstream), status=upstream.status, reason=upstream.reason, headers=headers
                )
            response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
            response.headers.update(added)
            response.content_length = length
            if self.stopping:
                response.force_close()
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    await response.prepare(request)
                    async for chunk in upstream.content.iter_any():
                        await response.write(chunk)
            except (aiohttp.ClientError, TimeoutError):  # its length would be a lie
                raise _hang_up(request) from None
            return response

    async def _ask(
        self, request: web.BaseRequest, target: str, data: bytes, changed: Mapping[str, str], added: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request on, with the headers that are not about the connection.

        Raises:
            ServingError: the server behind is not there, ended, or is late.
        """
        named = {name.strip().lower() for name in request.headers.get("Connection", "").split(",")}
        dropped = _OWN | named | {name.lower() for name in changed}
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in dropped)
        headers.update(changed)
        headers["X-Request-Id"] = added["X-Request-Id"]
        content: Any = None
        if data or request.method in ("POST", "PUT"):
            headers["Content-Length"] = str(len(data))
            content = data if len(data) <= _WHOLE_BYTES else _pieces(data)
        url = URL(self._upstream + target, encoded=True)
        method = "POST" if triton.LENGTH_HEADER in changed else request.method  # Triton infers on POST alone
        try:
            return await self._session.request(method, url, data=content, headers=headers, allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unanswered(error) from None

    def _cors(self, request: web.BaseRequest) -> dict[str, str]:
        """What lets a page of another origin read the answer, if it may."""
        origin = request.headers.get("Origin")
        if not self._origins or origin is None:
            return {}
        if "*" not in self._origins and origin not in self._origins:
            return {"Vary": "Origin"}
        allowed = {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": "*" if "*" in self._origins else origin,
            "Access-Control-Expose-Headers": _EXPOSED,
        }
        if request.method == "OPTIONS":
            allowed["Access-Control-Allow-Methods"] = "GET, POST, PUT"
            allowed["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
            allowed["Access-Control-Max-Age"] = "600"
        return allowed


def _check_head(request: web.BaseRequest) -> None:
    """Raise a ServingError where two servers in a row might understand a request differently."""
    if request.method not in _METHODS:
        raise ServingError(
            ErrorKind.METHOD, f"method: expected one of {', '.join(_METHODS)}, got {request.method[:40]!r}"
        )
    if request.version > HttpVersion11:
        raise ServingError(ErrorKind.BAD_REQUEST, f"request: expected HTTP/1.1, got {request.version}")
    if not _TARGET.fullmatch(request.raw_path):
        raise ServingError(ErrorKind.BAD_REQUEST, f"path: expected one like /ping, got {request.raw_path[:80]!r}")
    for name in _ONCE:
        if len(request.headers.getall(name, ())) > 1:
            raise ServingError(ErrorKind.BAD_REQUEST, f"{name}: expected it once, got it several times")
    coding = request.headers.getall("Transfer-Encoding", ())
    if coding and [value.strip().lower() for value in coding] != ["chunked"]:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"Transfer-Encoding: expected chunked or none, got {', '.join(coding)[:40]!r}"
        )
    given = request.headers.get("X-Request-Id", "")
    if not given.isascii():
        raise ServingError(ErrorKind.BAD_REQUEST, "X-Request-Id: expected letters, digits and '._:-', got other bytes")


async def _pieces(data: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(data), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]


async def _read(upstream: aiohttp.ClientResponse) -> bytes:
    try:
        return await upstream.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _unanswered(error) from None


def _unanswered(error: Exception) -> ServingError:
    if isinstance(error, aiohttp.ClientConnectorError):
        return ServingError(ErrorKind.OVERLOADED, "the server is being started; ask again", retry_after=2)
    if isinstance(error, TimeoutError):
        return ServingError(ErrorKind.DEADLINE, "the server did not answer in time")
    return ServingError(ErrorKind.OVERLOADED, "the server ended before it had answered; ask again", retry_after=2)


def _headers_of(upstream: aiohttp.ClientResponse) -> CIMultiDict[str]:
    dropped = _OWN - {"content-encoding"}
    return CIMultiDict((name, value) for name, value in upstream.headers.items() if name.lower() not in dropped)


def _error(error: ServingError, request_id: str) -> web.Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return web.Response(
        status=error.kind.http_status, body=error.body(request_id), content_type=JSON_TYPE, headers=headers
    )


def _hang_up(request: web.BaseRequest) -> ConnectionError:
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("the answer could not be finished")
