"""What a client asks for beside its picture: headers in, typed options out."""

from collections.abc import Mapping
from dataclasses import dataclass

from handlers.errors import ErrorKind, ServingError
from mpm_ops.stages import parse_schedule
from mpm_ops.windows import FITS

from .formats import FORMATS, MASKS, VIEWS
from .headers import GREY_TYPE, REQUEST_ID, negotiate

PRIORITIES = ("interactive", "bulk")

_MASK_TYPES = {FORMATS[name].media_types[0]: name for name in MASKS} | {GREY_TYPE: "grey"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What one request asks for.

    Attributes:
        request_id: names the request in replies and logs.
        format: of the body, a key of FORMATS.
        media_type: of the body; by default the format's first.
        also: further formats from the same computation.
        arrays: give the array of a format that has one, instead of its bytes.
        schedule: encoder blocks before which tokens merge, or None for the server's default.
        merger: how they merge, instead of a schedule, as `mpm_ops.merging.make_merger` reads it; or None.
        fit: which side of a long picture decides, one of `mpm_ops.windows.FITS`, or None for the server's default.
        bulk: the request gives way to interactive ones.
    """

    request_id: str
    format: str = "png"
    media_type: str = ""
    also: tuple[str, ...] = ()
    arrays: bool = False
    schedule: tuple[int, ...] | None = None
    merger: str | None = None
    fit: str | None = None
    bulk: bool = False

    def __post_init__(self) -> None:
        if not self.media_type:
            object.__setattr__(self, "media_type", FORMATS[self.format].media_types[0])

    @property
    def formats(self) -> tuple[str, ...]:
        """All that are asked for, the body's first."""
        return (self.format, *self.also)

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], request_id: str) -> "RequestOptions":
        """Read Accept and X-MPM-View, -Schedule, -Merger, -Fit and -Priority; names of headers are lower-case.

        Raises:
            ServingError: a header asks for what isn't there.
        """
        view = _one_of("X-MPM-View", headers.get("x-mpm-view"), VIEWS)
        priority = _one_of("X-MPM-Priority", headers.get("x-mpm-priority"), PRIORITIES)
        accept = headers.get("accept", "*/*")
        if view is None:
            chosen = _MASK_TYPES[negotiate(accept, tuple(_MASK_TYPES))]
            media_type = FORMATS[chosen].media_types[0]
        else:
            media_type = negotiate(accept, FORMATS[view].media_types)
            chosen = view
        schedule = None
        if "x-mpm-schedule" in headers:
            try:
                schedule = parse_schedule(headers["x-mpm-schedule"][:100])
            except ValueError as error:
                raise ServingError(ErrorKind.BAD_REQUEST, f"X-MPM-Schedule: {error}") from None
        merger = headers.get("x-mpm-merger")
        if merger is not None and schedule is not None:
            raise ServingError(ErrorKind.BAD_REQUEST, "X-MPM-Merger: expected without X-MPM-Schedule, got both")
        return cls(
            request_id=request_id,
            format=chosen,
            media_type=media_type,
            schedule=schedule,
            merger=None if merger is None else merger[:200],
            fit=_one_of("X-MPM-Fit", headers.get("x-mpm-fit"), FITS),
            bulk=priority == "bulk",
        )


def _one_of(header: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    if value is not None and value not in allowed:
        raise ServingError(
            ErrorKind.BAD_REQUEST, f"{header}: expected one of {', '.join(allowed)}, got {value[:40]!r}"
        )
    return value


def request_id_from(headers: Mapping[str, str], default: str) -> str:
    """The client's X-Request-Id where it is safe to repeat in headers and logs, else the server's own."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else default
