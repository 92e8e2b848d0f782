"""Request headers, for processes that need no more than that: names of those with options, and Accept."""

import re

from handlers.errors import ErrorKind, ServingError

CONTEXT_HEADERS = ("traceparent", "tracestate")
# What a request may ask for, as URLs and Python name it, and its headers.
OPTIONS = {name: f"X-MPM-{name.title()}" for name in ("view", "schedule", "merger", "fit", "priority")}
# All that Triton passes on of a request's headers, and takes as its parameters.
OPTION_HEADERS = (
    *sorted(header.lower() for header in (*OPTIONS.values(), "X-MPM-Outputs")),
    "x-request-id",
    *CONTEXT_HEADERS,
)
GREY_TYPE = "image/png;form=grey"  # the view `grey`, by Accept
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # safe to repeat in headers and logs

_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def negotiate(accept: str, offered: tuple[str, ...]) -> str:
    """Choose the media type an Accept header likes best; the order of `offered` decides between equals.

    A type with a parameter `form` is chosen by that alone; other parameters mean nothing.

    Raises:
        ServingError: nothing on offer is acceptable.

    Source: RFC 9110, section 12.5.1.
    """
    weights = {}
    for entry in (accept.strip() or "*/*").split(","):
        media_range, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        form = next((p.replace('"', "") for p in parameters if p.startswith("form=")), "")
        weights[f"{media_range};{form}" if form else media_range] = (
            float(quality) if _QUALITY.fullmatch(quality) else 0.0
        )

    def weight(media_type: str) -> float:
        if ";" in media_type:
            return weights.get(media_type, 0.0)
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
