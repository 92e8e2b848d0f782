"""A port that says whether requests should be sent here."""

import argparse
import socket

import pytest
import requests

from handlers.launch.processes import add_ending_options, free_port
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
    ("options", "message"),
    [
        (["--ready-port", "http"], "expected a port within 0..65535, got 'http'"),
        (["--ready-port", "65536"], "expected a port within 0..65535, got '65536'"),
        (["--lame-duck-seconds", "soon"], "expected seconds >= 0, got 'soon'"),
        (["--lame-duck-seconds", "-1"], "expected seconds >= 0, got '-1'"),
        (["--lame-duck-seconds", "inf"], "expected seconds >= 0, got 'inf'"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_ending_options(parser)
    assert parser.parse_args([]) == argparse.Namespace(ready_port=0, lame_duck_seconds=0.0)
    with pytest.raises(SystemExit):
        parser.parse_args(["=".join(options)])
    assert message in capsys.readouterr().err
