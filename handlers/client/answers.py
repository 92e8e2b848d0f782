"""What servers answer, and what is raised where it isn't the answer that was asked for."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_TOKENS = re.compile(r"in=(\d+), out=(\d+)")


class AnswerError(Exception):
    """A picture was not segmented; the message says why.

    Attributes:
        status: of HTTP; 0 where no answer came.
        request_id: by which the server's log names the request.
        retry_after: seconds after which the server wants to be asked again, where it says so.
    """

    def __init__(self, message: str, status: int = 0, request_id: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.request_id, self.retry_after = status, request_id, retry_after


class RefusedError(AnswerError):
    """4xx: the picture, an option or the model's name is wrong; the same request fails again."""


class BusyError(AnswerError):
    """503: the server has no room, or is being started."""


class LateError(AnswerError, TimeoutError):
    """504, or no answer in time."""


class FailedError(AnswerError):
    """Any other status: the server's own fault, or no answer of a model."""


class NoAnswerError(AnswerError, ConnectionError):
    """The server could not be reached, or closed the connection before it had answered."""


def error_of(body: bytes, default: str) -> str:
    """What a server says is wrong: a field of JSON where the body is that, else its text, else the default."""
    text = body[:2000].decode(errors="replace").strip()
    try:
        fields = json.loads(text)
        return str(fields.get("error") or fields["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text or default


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
        """What the server says is wrong."""
        return error_of(self.body, f"status {self.status}")

    @property
    def replica(self) -> str | None:
        """The server behind a proxy that names it (`X-Served-By`, as docker/haproxy.cfg sets it)."""
        return self.headers.get("x-served-by")

    def failure(self, request_id: str) -> AnswerError:
        """What to raise of an answer that isn't 200."""
        told = self.headers.get("retry-after", "")
        kinds = {503: BusyError, 504: LateError}
        kind = kinds.get(self.status, RefusedError if 400 <= self.status < 500 else FailedError)
        return kind(self.error, self.status, request_id, float(told) if told.isdecimal() else None)
