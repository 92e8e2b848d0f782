"""What a client asks for beside its picture: headers in, typed options out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from handlers.errors import ErrorKind, ServingError
from handlers.observe.tracing import CONTEXT_HEADERS
from mpm_ops.stages import parse_schedule

MASK_TYPES = ("image/png", "application/json", "application/x-npy")
VIEW_TYPES = ("image/png", "image/jpeg")
VIEWS = ("overlay", "tokens", "confidence")
VIEWS_OF_PIXELS = ("overlay", "tokens")  # which show the picture itself
PRIORITIES = ("interactive", "bulk")
# All that Triton passes on of a request's headers, and takes as its parameters.
OPTION_HEADERS = (
    "x-mpm-outputs",
    "x-mpm-priority",
    "x-mpm-schedule",
    "x-mpm-view",
    "x-request-id",
    *CONTEXT_HEADERS,
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """One request's wishes.

    Attributes:
        request_id: names the request in replies and logs.
        media_type: of the reply; one of MASK_TYPES, or of VIEW_TYPES where a view is asked for.
        also: further forms of the mask, of MASK_TYPES, from the same computation.
        view: a picture for people instead of the mask, one of VIEWS, or None.
        schedule: encoder blocks before which tokens merge, or None for the server's default.
        bulk: the request gives way to interactive ones.
    """

    request_id: str
    media_type: str = "image/png"
    also: tuple[str, ...] = ()
    view: str | None = None
    schedule: tuple[int, ...] | None = None
    bulk: bool = False

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], request_id: str) -> "RequestOptions":
        """Read Accept, X-MPM-View, X-MPM-Schedule and X-MPM-Priority; names of headers are lower-case.

        Raises:
            ServingError: a header asks for what isn't there.
        """
        view = _one_of("X-MPM-View", headers.get("x-mpm-view"), VIEWS)
        priority = _one_of("X-MPM-Priority", headers.get("x-mpm-priority"), PRIORITIES)
        media_type = negotiate(headers.get("accept", "*/*"), MASK_TYPES if view is None else VIEW_TYPES)
        schedule = None
        if "x-mpm-schedule" in headers:
            try:
                schedule = parse_schedule(headers["x-mpm-schedule"][:100])
            except ValueError as error:
                raise ServingError(ErrorKind.BAD_REQUEST, f"X-MPM-Schedule: {error}") from None
        return cls(request_id=request_id, media_type=media_type, view=view, schedule=schedule, bulk=priority == "bulk")


def _one_of(header: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"{header}: expected one of {', '.join(allowed)}, got {value[:40]!r}"
        )
    return value


def request_id_from(headers: Mapping[str, str], default: str) -> str:
    """The client's X-Request-Id where it is safe to repeat in headers and logs, else the server's own."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else default


def negotiate(accept: str, offered: tuple[str, ...]) -> str:
    """Choose the media type an Accept header likes best; the order of `offered` decides between equals.

    Raises:
        ServingError: nothing on offer is acceptable.

    Source: RFC 9110, section 12.5.1.
    """
    weights = {}
    for entry in (accept.strip() or "*/*").split(","):
        media_range, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights[media_range] = float(quality) if _QUALITY.fullmatch(quality) else 0.0

    def weight(media_type: str) -> float:
        for media_range in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
            if media_range in weights:
                return weights[media_range]
        return 0.0

    best = max(offered, key=weight)
    if weight(best) <= 0:
        raise ServingError(
            ErrorKind.NOT_ACCEPTABLE, f"Accept: expected one of {', '.join(offered)}, got {accept[:80]!r}"
        )
    return best
