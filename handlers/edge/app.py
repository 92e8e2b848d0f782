"""Every request of a client, from its headers to the last byte of its answer."""

import asyncio
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict
from yarl import URL

from handlers.api.headers import OPTIONS, REQUEST_ID
from handlers.client import error_of
from handlers.errors import ErrorKind, ServingError

from . import oip, triton
from .bodies import Body, Budget, check_picture, picture_of_form, pictures_of_json
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
_QUERY = {**OPTIONS, "accept": "Accept"}


class _ToldError(ServingError):
    """What the server behind answered in place of what was asked for."""


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
            except _ToldError as error:
                response = _error(error, request_id)
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
        if (found := oip.PATH.fullmatch(path)) or path in oip.HEALTH:
            if found and found[3] == "/infer" and request.method == "POST":
                if not (self._is_triton and oip.is_native(request.headers)):
                    return await self._infer(request, body, found, added)
            elif not self._is_triton:
                return await self._describe(request, found, added)
        data = await body.read(self._limits.body_bytes) if request.body_exists else b""
        if self._is_triton and data:
            triton.check_body(path, request.headers, data, self._limits)
        return await self._pass_on(request, request.raw_path, data, {}, added)

    async def _segment(
        self, request: web.BaseRequest, body: Body, path: re.Match[str], added: Mapping[str, str]
    ) -> web.StreamResponse:
        """Answer pictures, in whatever form they come, by the one binary call of the server behind."""
        options = _options(request)
        pictures, content_type = await self._pictures(request, body)
        if path.re is _KSERVE:
            asked = {**options, "Accept": JSON_TYPE}
            replies = await self._ask_all(request, path[1], None, pictures, [asked], added)
            return web.Response(
                body=b'{"predictions":[' + b",".join(reply.strip() for reply in replies[0]) + b"]}\n",
                headers={"Content-Type": JSON_TYPE},
            )
        if len(pictures) > 1:
            raise ServingError(
                ErrorKind.BAD_REQUEST,
                f"instances: expected one picture, got {len(pictures)}; several go to /v1/models/{path[1]}:predict",
            )
        if self._is_triton:
            reply, media_type = await self._ask_one(request, path[1], path[2], pictures[0], options, added)
            return web.Response(body=reply, headers={"Content-Type": media_type})
        target = request.raw_path.partition("?")[0]
        return await self._pass_on(request, target, pictures[0], {"Content-Type": content_type, **options}, added)

    async def _infer(
        self, request: web.BaseRequest, body: Body, path: re.Match[str], added: Mapping[str, str]
    ) -> web.StreamResponse:
        """Speak the Open Inference Protocol where the server behind does not, or not with pictures in JSON."""
        data = await body.read(self._limits.body_bytes * 4 // 3 + _FORM_BYTES)
        inference = oip.read_inference(data, request.headers, self._limits)
        options = CIMultiDict(_options(request))
        options.update(inference.options)
        view = _merged(request, options).get("X-MPM-View", "")
        shown = "RESULT_JSON" if view == "maps" else "MASK_PNG"
        if view and shown not in inference.outputs:
            raise ServingError(ErrorKind.BAD_REQUEST, f"X-MPM-View: expected {shown} among the outputs")
        asked = []
        for name in inference.outputs:
            headers = options.copy()
            headers.update({"Accept": oip.ACCEPTED[name], "X-MPM-View": view if name == shown else ""})
            asked.append(headers)
        replies = await self._ask_all(request, path[1], path[2], inference.pictures, asked, added)
        answers = dict(zip(inference.outputs, replies, strict=True))
        reply, described = await asyncio.to_thread(oip.write_reply, inference, path[1], path[2], answers)
        return web.Response(body=reply, headers=described)

    async def _describe(
        self, request: web.BaseRequest, path: re.Match[str] | None, added: Mapping[str, str]
    ) -> web.StreamResponse:
        """Whether TorchServe and a model are ready, and what it takes, as the Open Inference Protocol asks."""
        if request.method not in ("GET", "HEAD"):
            raise ServingError(ErrorKind.METHOD, f"method: expected GET, or POST to infer, got {request.method}")
        if path:
            asking = await self._ask(request, f"/predictions/{path[1]}", b"", {}, added, method="OPTIONS")
            async with asking as upstream:
                if upstream.status != 200:
                    raise await _told(upstream)
            if path[3] is None:
                return web.json_response(oip.describe(path[1]))
        return await self._pass_on(request, "/ping", b"", {}, added)

    async def _ask_all(
        self,
        request: web.BaseRequest,
        name: str,
        version: str | None,
        pictures: Sequence[bytes],
        asked: Sequence[Mapping[str, str]],
        added: Mapping[str, str],
    ) -> list[list[bytes]]:
        """The answers of several pictures, all or none, once for each set of headers that are asked for."""

        async def ask(index: int, headers: Mapping[str, str]) -> bytes:
            try:
                return (await self._ask_one(request, name, version, pictures[index], headers, added))[0]
            except _ToldError as error:
                told = error.of_picture(index, len(pictures))
                raise _ToldError(told.kind, str(told), retry_after=told.retry_after) from None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [[group.create_task(ask(i, headers)) for i in range(len(pictures))] for headers in asked]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [[task.result() for task in each] for each in tasks]

    async def _ask_one(
        self,
        request: web.BaseRequest,
        name: str,
        version: str | None,
        picture: bytes,
        options: Mapping[str, str],
        added: Mapping[str, str],
    ) -> tuple[bytes, str]:
        """The plain answer of a picture and its media type.

        Args:
            options: headers beside those of the request, empty ones in their place.

        Raises:
            ServingError: what the server says, or that it says nothing.
        """
        if self._is_triton:
            headers = _merged(request, options)
            media_type, asked = triton.infer_headers(headers, headers.get("Accept", "*/*"))
            target = triton.infer_path(name, version)
        else:
            asked = {
                "Content-Type": "application/octet-stream",
                "Accept-Encoding": "identity",
                triton.LENGTH_HEADER: "",
            }
            target = f"/predictions/{name}/{version}" if version else f"/predictions/{name}"
        async with await self._ask(request, target, picture, {**options, **asked}, added, method="POST") as upstream:
            if upstream.status != 200:
                raise await _told(upstream)
            reply = await _read(upstream)
        if not self._is_triton:
            return reply, upstream.content_type
        return triton.unpack(reply, upstream.headers.get(triton.LENGTH_HEADER, "0"), media_type), media_type

    async def _pictures(self, request: web.BaseRequest, body: Body) -> tuple[list[bytes], str]:
        """The bytes of the pictures in a request, and the type that they claim to be."""
        content_type = request.headers.get("Content-Type", "application/octet-stream")
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type == JSON_TYPE:
            data = await body.read(self._limits.body_bytes * 4 // 3 + _FORM_BYTES)
            return pictures_of_json(data, self._limits), "application/octet-stream"
        if media_type == "multipart/form-data":
            data = await body.read(self._limits.body_bytes + _FORM_BYTES)
            return [await picture_of_form(request, data)], "application/octet-stream"
        data = check_picture(await body.read(self._limits.body_bytes))
        # curl's default, whatever the body is.
        is_default = media_type == "application/x-www-form-urlencoded"
        return [data], "application/octet-stream" if is_default else content_type

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
        self,
        request: web.BaseRequest,
        target: str,
        data: bytes,
        changed: Mapping[str, str],
        added: Mapping[str, str],
        *,
        method: str = "",
    ) -> aiohttp.ClientResponse:
        """Send a request on, with the headers that are not about the connection; empty ones of `changed` drop theirs.

        Raises:
            ServingError: the server behind is not there, ended, or is late.
        """
        named = {name.strip().lower() for name in request.headers.get("Connection", "").split(",")}
        dropped = _OWN | named | {name.lower() for name in changed}
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in dropped)
        headers.update({name: value for name, value in changed.items() if value})
        headers["X-Request-Id"] = added["X-Request-Id"]
        content: Any = None
        method = method or request.method
        if data or method in ("POST", "PUT"):
            headers["Content-Length"] = str(len(data))
            content = data if len(data) <= _WHOLE_BYTES else _pieces(data)
        url = URL(self._upstream + target, encoded=True)
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


def _options(request: web.BaseRequest) -> dict[str, str]:
    """Headers that the query of a URL stands for: `?view=overlay&schedule=off`.

    Raises:
        ServingError: it has something else, or what a header says otherwise.
    """
    query = request.raw_path.partition("?")[2]
    pairs = urllib.parse.parse_qsl(query[:2000], keep_blank_values=True)
    options: dict[str, str] = {}
    for name, value in pairs:
        header = _QUERY.get(name, "")
        if not header or header in options:
            got = f"{name[:40]!r} twice" if header else repr(name[:40])
            raise ServingError(ErrorKind.BAD_REQUEST, f"query: expected some of {', '.join(_QUERY)}, got {got}")
        if name != "accept" and request.headers.get(header, value) != value:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"{name}: expected it in the URL or as {header}, got both, which differ"
            )
        if not value.isprintable() or not value.isascii():
            raise ServingError(ErrorKind.BAD_REQUEST, f"{name}: expected plain text, got {value[:40]!r}")
        options[header] = value
    return options


def _merged(request: web.BaseRequest, options: Mapping[str, str]) -> CIMultiDict[str]:
    """Headers of a request under others that go before them; empty ones take them away."""
    headers = CIMultiDict(request.headers)
    headers.update(options)
    return CIMultiDict((name, value) for name, value in headers.items() if value)


async def _told(upstream: aiohttp.ClientResponse) -> _ToldError:
    """What the server behind says is wrong."""
    later = upstream.headers.get("Retry-After", "")
    status, told = triton.status_of(upstream.status, error_of(await _read(upstream), "the server gave no reason"))
    return _ToldError(ErrorKind.of_status(status), told, retry_after=int(later) if later.isdecimal() else None)


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
