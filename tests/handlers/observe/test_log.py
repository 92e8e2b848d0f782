import json

from handlers.engine.request import Reply
from handlers.observe.log import describe_request


def reply(tokens: tuple[int, ...], num_windows: int, **seconds: float) -> Reply:
    return Reply({"png": b""}, "image/png", tokens, seconds, num_windows)


def test_an_answer() -> None:
    line = describe_request("mine", 200, 0.5, trace_id="abc", replies=[reply((64, 40), 1, decode=0.0012345)])
    assert json.loads(line) == {
        "request_id": "mine",
        "code": 200,
        "trace_id": "abc",
        "windows": 1,
        "tokens": [64, 40],
        "ms": {"decode": 1.23, "total": 500.0},
    }


def test_several_pictures_tell_all_windows_and_the_slowest_steps() -> None:
    fast, slow = reply((64, 40), 1, decode=0.3, merge=0.1), reply((128, 70), 2, decode=0.1, merge=0.9)
    told = json.loads(describe_request("mine", 200, 1, replies=[fast, slow]))
    assert (told["windows"], told["tokens"]) == (3, [192, 110])
    assert told["ms"] == {"decode": 100, "merge": 900, "total": 1000}


def test_a_failure_is_one_line_whatever_it_says() -> None:
    line = describe_request("mine", 400, 0.001, error="two\nlines")
    assert "\n" not in line
    assert json.loads(line) == {"request_id": "mine", "code": 400, "error": "two\nlines", "ms": {"total": 1.0}}
