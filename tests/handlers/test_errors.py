"""How a failure is told."""

import json

import pytest

from handlers.errors import ErrorKind, ServingError


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ErrorKind.BAD_REQUEST, 400),
        (ErrorKind.NOT_ACCEPTABLE, 406),
        (ErrorKind.TOO_LARGE, 413),
        (ErrorKind.INTERNAL, 500),
        (ErrorKind.OVERLOADED, 503),
        (ErrorKind.DEADLINE, 504),
    ],
)
def test_status(kind: ErrorKind, status: int) -> None:
    assert kind.http_status == status


@pytest.mark.parametrize(
    "message", ["plain", "two\nlines", "\x00\x1b[31m", 'quote " and \\', "é \U0001f600 \ud800", ""]
)
def test_body_is_one_line_of_json(message: str) -> None:
    body = ServingError(ErrorKind.TOO_LARGE, message).body("the-id")
    assert body.endswith(b"\n")
    assert body.count(b"\n") == 1
    assert body.isascii()
    assert json.loads(body) == {"code": 413, "error": message, "request_id": "the-id"}
