"""A port that says whether requests should be sent here."""

import socket

import pytest
import requests

from handlers.launching import free_port
from handlers.readiness import Readiness


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
