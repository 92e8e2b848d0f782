"""Bodies: read within limits, unpacked, and what a form or JSON holds of a picture."""

import asyncio
import binascii
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from aiohttp import MultipartReader, StreamReader, web
from aiohttp.helpers import parse_mimetype
from aiohttp.http_exceptions import HttpProcessingError

from handlers.errors import ErrorKind, ServingError

from .limits import Limits

PICTURE_NAMES = ("image", "data", "body", "file")  # of a form's part, or a field of JSON

_MAX_PARTS = 16  # of a form, before it is refused for having more than one
_MAX_PICTURES = 16  # of a JSON request
_PIECE_BYTES = 2**22  # unpacked at once
_URL = re.compile(rb"\s*([A-Za-z][A-Za-z0-9+.-]{1,19})://")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,")
_OTHERS = bytes(set(range(256)) - set(b"[]{},"))  # than what structures JSON


class Budget:
    """Bytes of bodies that all requests together hold here."""

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        self._max_bytes = max_bytes

    def take(self, size: int) -> None:
        if self.held + size > self._max_bytes:
            raise ServingError(ErrorKind.OVERLOADED, "too many bodies are on their way in; ask again", retry_after=1)
        self.held += size


class Body:
    """A request's body; a context manager that gives back what it holds of the budget."""

    def __init__(self, request: web.BaseRequest, limits: Limits, budget: Budget) -> None:
        self._request, self._limits, self._budget = request, limits, budget
        self._taken = 0

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.held -= self._taken

    async def read(self, max_bytes: int) -> bytes:
        """All of it, without its content encoding.

        Raises:
            ServingError: it is too long, too slow, or encoded in a way that isn't taken.
        """
        encoding = self._request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", "x-gzip"):
            raise ServingError(
                ErrorKind.MEDIA_TYPE, f"Content-Encoding: expected gzip or none, got {encoding[:40]!r}; send it plain"
            )
        data = await self._receive(max_bytes)
        if encoding == "identity" or not data:
            return data
        return await self._inflate(data, max_bytes)

    async def _receive(self, max_bytes: int) -> bytes:
        length = self._request.content_length
        if length is not None and length > max_bytes:
            raise too_long("body", max_bytes, str(length))
        expected = self._request.headers.get("Expect", "").lower()
        if expected == "100-continue":
            await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._request.writer.output_size = 0
        elif expected:
            raise ServingError(ErrorKind.BAD_REQUEST, f"Expect: expected 100-continue or none, got {expected[:40]!r}")
        chunks: list[bytes] = []
        size, content, loop = 0, self._request.content, asyncio.get_running_loop()
        end = loop.time() + self._limits.body_seconds
        try:
            async with asyncio.timeout(None) as timeout:
                while not content.at_eof():
                    timeout.reschedule(min(end, loop.time() + self._limits.idle_seconds))
                    if chunk := await content.readany():
                        size += len(chunk)
                        if size > max_bytes:
                            raise too_long("body", max_bytes, "more")
                        self._take(len(chunk))
                        chunks.append(chunk)
        except TimeoutError:
            raise ServingError(
                ErrorKind.SLOW,
                f"body: expected more within {self._limits.idle_seconds:g} s and all within "
                f"{self._limits.body_seconds:g} s, got {size} of {length or 'unknown'} bytes; send it faster",
            ) from None
        except web.RequestPayloadError as error:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"body: expected well-formed HTTP/1.1, got {first_line(error)}"
            ) from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _inflate(self, data: bytes, max_bytes: int) -> bytes:
        """Unpack a piece at a time, so that only what comes out is held."""
        inflater = zlib.decompressobj(wbits=31)
        pieces: list[bytes] = []
        size = 0
        while not inflater.eof:
            try:
                piece = await asyncio.to_thread(inflater.decompress, data, _PIECE_BYTES)
            except zlib.error as error:
                raise ServingError(ErrorKind.BAD_REQUEST, f"Content-Encoding: expected gzip, got {error}") from None
            data = inflater.unconsumed_tail
            if not piece and not data:
                break
            size += len(piece)
            if size > max_bytes:
                raise too_long("body", max_bytes, "more, unpacked")
            self._take(len(piece))
            pieces.append(piece)
        if not inflater.eof or inflater.unused_data:
            raise ServingError(
                ErrorKind.BAD_REQUEST, "Content-Encoding: expected one whole gzip stream, got a part or more"
            )
        return b"".join(pieces)

    def _take(self, size: int) -> None:
        self._budget.take(size)
        self._taken += size


def first_line(error: BaseException) -> str:
    """What a parser complains of, without the bytes that it points at."""
    text = getattr(error, "message", "") or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return "".join(character for character in line if character.isprintable()).rstrip(":")[:120]


def too_long(field: str, max_bytes: int, got: str) -> ServingError:
    return ServingError(ErrorKind.TOO_LARGE, f"{field}: expected at most {max_bytes} bytes, got {got}")


def check_json(data: bytes, limits: Limits) -> None:
    """Refuse JSON that a parser might fall over, before any parser sees it: one linear scan, no recursion.

    Raises:
        ServingError: it nests deeper, or holds more values, than the limits say.
    """
    # Without escapes every second piece between quotes is a string. Invalid JSON may be seen otherwise after its first
    # error, where parsers stop.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    if plain.count(b'"') > 2 * limits.json_values:
        raise ServingError(ErrorKind.TOO_LARGE, f"JSON: expected at most {limits.json_values} strings, got more")
    structure = b"".join(plain.split(b'"')[::2]).translate(None, delete=_OTHERS)
    depth = 0
    for character in structure[: limits.json_values]:
        depth += (character in b"[{") - (character in b"]}")
        if depth > limits.json_depth:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"JSON: expected nesting of at most {limits.json_depth}, got deeper"
            )
    if len(structure) > limits.json_values:
        raise ServingError(
            ErrorKind.TOO_LARGE, f"JSON: expected at most {limits.json_values} values, got {len(structure)}"
        )


def pictures_of_json(data: bytes, limits: Limits) -> list[bytes]:
    """The picture in `{"data": base64}`, or those in `{"instances": [{"b64": base64}, ...]}`.

    Raises:
        ServingError: there is no picture, or too many are there.
    """
    check_json(data, limits)
    try:
        fields: Any = json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise ServingError(ErrorKind.BAD_REQUEST, f"JSON: expected a document, got an error: {error}"[:200]) from None
    if not isinstance(fields, Mapping) or "instances" not in fields:
        return [_picture_of(fields, "JSON")]
    instances = fields["instances"]
    if not isinstance(instances, list):
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"instances: expected a list of pictures, got {type(instances).__name__}"
        )
    too_many("instances", len(instances))
    return [_picture_of(instance, "instances") for instance in instances]


def _picture_of(fields: Any, field: str) -> bytes:
    names = ("b64", *PICTURE_NAMES)
    while isinstance(fields, Mapping):
        found = [name for name in names if name in fields]
        if len(found) != 1:
            got = ", ".join(repr(str(name)[:40]) for name in list(fields)[:5]) or "no field"
            raise ServingError(
                ErrorKind.BAD_REQUEST,
                f"{field}: expected one picture in base64, as one of {', '.join(names)}, got {got}",
            )
        field, fields = found[0], fields[found[0]]
    return decode_base64(field, fields)


def decode_base64(field: str, text: Any) -> bytes:
    """The picture in a field.

    Raises:
        ServingError: it is no base64.
    """
    if not isinstance(text, str):
        raise ServingError(ErrorKind.BAD_REQUEST, f"{field}: expected base64, got {type(text).__name__}")
    check_picture(text[:100].encode(errors="replace"))
    try:
        return binascii.a2b_base64(_DATA_URL.sub("", text[:100], count=1) + text[100:], strict_mode=True)
    except ValueError as error:
        raise ServingError(ErrorKind.BAD_REQUEST, f"{field}: expected base64, got {text[:20]!r}: {error}") from None


def check_picture(data: bytes) -> bytes:
    """Refuse the address of a picture in its place; gives back what it is given."""
    if found := _URL.match(data[:100]):
        scheme = found[1].decode().lower()
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"picture: expected its bytes, got a URL ({scheme}); nothing is fetched, send the picture",
        )
    return data


def too_many(field: str, number: int) -> None:
    """Refuse a request of no picture, or of more than go into one."""
    if not 1 <= number <= _MAX_PICTURES:
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"{field}: expected 1 to {_MAX_PICTURES} pictures, got {number}; send several requests",
        )


async def picture_of_form(request: web.BaseRequest, data: bytes) -> bytes:
    """The only part of a multipart form.

    Raises:
        ServingError: it has no picture, or more than one part.
    """
    content = StreamReader(request.protocol, 2**62, loop=asyncio.get_running_loop())
    content.feed_data(data)
    content.feed_eof()
    names: list[str] = []
    picture = b""
    try:
        _check_start(request.headers["Content-Type"], data)
        async for part in MultipartReader(request.headers, content):
            if part is None or isinstance(part, MultipartReader):
                raise ValueError("a form in a form")
            names.append(part.name or "")
            if len(names) == 1:
                picture = bytes(await part.read(decode=True))
            elif len(names) == _MAX_PARTS:
                break
    except (ValueError, RuntimeError, AssertionError, HttpProcessingError, web.HTTPException) as error:
        raise ServingError(ErrorKind.BAD_REQUEST, f"form: expected one picture, got {first_line(error)}") from None
    if len(names) != 1 or names[0] not in PICTURE_NAMES:
        got = ", ".join(repr(name[:40]) for name in names) or "no part"
        raise ServingError(
            ErrorKind.BAD_REQUEST,
            f"form: expected one part with the picture, named {', '.join(PICTURE_NAMES[:-1])} or {PICTURE_NAMES[-1]}, "
            f"got {got}; send pictures one by one, and options as headers or in the URL",
        )
    return check_picture(picture)


def _check_start(content_type: str, data: bytes) -> None:
    """Refuse a preamble: the reader would look for the first boundary in it line by line, and hold up everybody."""
    boundary = b"--" + parse_mimetype(content_type).parameters.get("boundary", "").encode()
    if not data.removeprefix(b"\r\n").startswith((boundary + b"\r\n", boundary + b"--")):
        raise ValueError("a body that does not start with the boundary of its Content-Type")
