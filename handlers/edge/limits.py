"""What a client may use of the edge."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one request, one connection, and all together.

    Attributes:
        body_bytes: of a picture, or of a binary request; a form or base64 of it may be longer accordingly.
        held_bytes: of all bodies that are on their way.
        json_bytes: of JSON that a server behind parses.
        json_depth, json_values: nesting, and commas and brackets, of any JSON.
        connections: open at once; more are refused.
        header_seconds: from a request's first byte, or from connecting, to the end of its headers.
        idle_seconds: between two pieces of a body.
        body_seconds: for a whole body, and for a client to take its answer.
        keepalive_seconds: that a connection may be idle between two requests.
        answer_seconds: that the server behind has for its answer.
    """

    body_bytes: int = 33 * 2**20
    held_bytes: int = 256 * 2**20
    json_bytes: int = 2**20
    json_depth: int = 64
    json_values: int = 100_000
    connections: int = 1000
    header_seconds: float = 10.0
    idle_seconds: float = 10.0
    body_seconds: float = 60.0
    keepalive_seconds: float = 75.0
    answer_seconds: float = 120.0
