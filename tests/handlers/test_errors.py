"""How a failure is told."""

import json

import pytest

from handlers.errors import ErrorKind, ServingError


@pytest.mark.parametrize(
    ("kind", "status", "triton_code"),
    [
        (ErrorKind.BAD_REQUEST, 400, "INVALID_ARG"),
        (ErrorKind.NOT_FOUND, 404, "INVALID_ARG"),
        (ErrorKind.NOT_ACCEPTABLE, 406, "INVALID_ARG"),
        (ErrorKind.TOO_LARGE, 413, "INVALID_ARG"),
        (ErrorKind.INTERNAL, 500, "INTERNAL"),
        (ErrorKind.OVERLOADED, 503, "UNAVAILABLE"),
        (ErrorKind.DEADLINE, 504, "UNAVAILABLE"),
    ],
)
def test_status(kind: ErrorKind, status: int, triton_code: str) -> None:
    assert kind.http_status == status
    assert kind.triton_code == triton_code


@pytest.mark.parametrize(
    "message", ["plain", "two\nlines", "\x00\x1b[31m", 'quote " and \\', "é \U0001f600 \ud800", ""]
)
def test_body_is_one_line_of_json(message: str) -> None:
    body = ServingError(ErrorKind.TOO_LARGE, message).body("the-id")
    assert body.endswith(b"\n")
    assert body.count(b"\n") == 1
    assert body.isascii()
    assert json.loads(body) == {"code": 413, "error": message, "request_id": "the-id"}


def test_other_statuses_are_of_the_nearest_kind() -> None:
    of_status = ErrorKind.of_status
    assert [of_status(status).value for status in (404, 413, 418, 500, 502, 503, 507)] == [
        404,
        413,
        400,
        500,
        500,
        503,
        503,
    ]
