"""A port that says whether requests should be sent here."""

import socket

import pytest
import requests

from handlers.cli import main
from handlers.launch.processes import free_port
from handlers.launch.readiness import Readiness


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_it_says_what_is(method: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/ready"
    with Readiness("127.0.0.1", port) as readiness:
        for ready, status in ((False, 503), (True, 200), (False, 503)):
            readiness.ready = ready
            assert requests.request(method, url, timeout=10).status_code == status
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=10)


def test_a_silent_client_holds_up_nobody() -> None:
    port = free_port()
    with (
        Readiness("127.0.0.1", port) as readiness,
        socket.create_connection(("127.0.0.1", port)),
    ):
        readiness.ready = True
        assert requests.get(f"http://127.0.0.1:{port}", timeout=10).text == "ready\n"


def test_no_port() -> None:
    with Readiness() as readiness:
        readiness.ready = True


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ready-port=http", "'http' is not a valid integer range"),
        ("--ready-port=65536", "65536 is not in the range 0<=x<=65535"),
        ("--lame-duck-seconds=soon", "'soon' is not a valid float"),
        ("--lame-duck-seconds=-1", "expected seconds >= 0, got -1"),
        ("--lame-duck-seconds=inf", "expected seconds >= 0, got inf"),
        ("--lame-duck-seconds=nan", "expected seconds >= 0, got nan"),
    ],
)
def test_bad_options(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", ".", option]) == 2
    assert message in capsys.readouterr().err
