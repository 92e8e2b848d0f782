"""The client: connections kept or closed in time, tries, errors, URLs, and metrics."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "loadtest"))

from fake_server import FakeServer, serve_grpc

from handlers.client import (
    Answer,
    AnswerError,
    AsyncClient,
    BusyError,
    Client,
    FailedError,
    LateError,
    Metrics,
    NoAnswerError,
    RefusedError,
    connect,
    read_metrics,
)
from handlers.client.results import encode_source

pytest_plugins = ("load_fixtures",)

NUM_REQUESTS = 6


@pytest.mark.parametrize(
    ("connection_seconds", "pause", "connections"),
    [(float("inf"), 0.01, 1), (1000.0, 0.01, 1), (0.0, 0.0, NUM_REQUESTS), (0.01, 0.02, NUM_REQUESTS)],
)
def test_a_connection_ends_in_time(
    fake: FakeServer, pictures: Path, connection_seconds: float, pause: float, connections: int
) -> None:
    picture = (pictures / "0.png").read_bytes()
    with connect(f"{fake.url}/predictions/fake", connection_seconds=connection_seconds) as client:
        for _ in range(NUM_REQUESTS):
            assert client.ask(picture).status == 200
            time.sleep(pause)
    assert fake.num_connections == connections


def test_a_channel_of_grpc_ends_in_time(fake: FakeServer, pictures: Path) -> None:
    picture = (pictures / "0.png").read_bytes()
    peers: set[str] = set()
    with serve_grpc(fake, peers.add) as address:
        for connection_seconds, channels in ((float("inf"), 1), (0.0, NUM_REQUESTS)):
            peers.clear()
            with connect(f"grpc://{address}/fake", connection_seconds=connection_seconds) as client:
                for _ in range(NUM_REQUESTS):
                    assert client.ask(picture).status == 200
            assert len(peers) == channels


def test_all_protocols_give_the_same_answer(fake: FakeServer, pictures: Path) -> None:
    picture = (pictures / "0.png").read_bytes()
    with serve_grpc(fake) as address:
        urls = [f"{fake.url}/predictions/fake", f"{fake.url}/v2/models/fake/versions/1", f"grpc://{address}/fake"]
        clients = [connect(url) for url in urls]
        for accept in ("image/png", "application/json"):
            answers = [client.ask(picture, accept=accept) for client in clients]
            assert {answer.status for answer in answers} == {200}
            assert len({answer.body for answer in answers}) == 1
        assert [client.ask(b"no picture").status for client in clients] == [400, 400, 400]
        assert clients[0].ask(picture).tokens == (1000, 600)
        assert clients[0].is_ready()
        for client in clients:
            client.close()


def test_no_proxy_is_asked(fake: FakeServer, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(f"{fake.url}/predictions/fake") as client:
        assert client.ask((pictures / "0.png").read_bytes()).status == 200
    assert read_metrics(f"{fake.url}/metrics").labels("mpm_model_info", "schedule") == ["2,5"]


def test_who_does_not_answer(fake: FakeServer, pictures: Path) -> None:
    picture = (pictures / "0.png").read_bytes()
    fake.delay = 60.0
    with connect(f"{fake.url}/predictions/fake") as client, pytest.raises(TimeoutError):
        client.ask(picture, timeout_seconds=0.2)
    with connect("http://127.0.0.1:1/predictions/fake") as client:
        assert not client.is_ready()
        with pytest.raises(NoAnswerError, match="ConnectionRefusedError"):
            client.ask(picture)
    with pytest.raises(OSError, match="refused"):
        read_metrics("http://127.0.0.1:1/metrics")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080",
        "ftp://127.0.0.1/predictions/a",
        "grpc://127.0.0.1/a",
        "grpc://127.0.0.1:1",
        "http:///v2/models/a",
    ],
)
def test_urls(url: str) -> None:
    with pytest.raises(ValueError, match="url: expected http"):
        connect(url)


def test_metrics_are_read_as_they_are_written() -> None:
    page = Metrics.parse(
        "# TYPE a counter\n"
        'a_total{name="x\\"}y",other="1"} 3.0 # {trace_id="t"} 1.0\n'
        'a_total{name="z"} 1e3\n'
        'a_bucket{le="+Inf"} 9\n'
        "b 2\n"
    )
    assert page.total("a_total") == 1003
    assert page.total("a_total", other="1") == 3
    assert page.labels("a_total", "name") == ['x\\"}y', "z"]
    assert Metrics.sum([page, page]).total("b") == 4
    assert len(page.values) == 3
    with pytest.raises(ValueError, match="expected a sample in Prometheus' text format, got '<html>'"):
        Metrics.parse("<html>")


def ask(url: str, picture: bytes, **options: Any) -> Answer:
    with Client(url, **options) as client:
        return client.ask(picture, "application/json")


def ask_async(url: str, picture: bytes, **options: Any) -> Answer:
    async def asking() -> Answer:
        async with AsyncClient(url, **options) as client:
            return await client.ask(picture, "application/json")

    return asyncio.run(asking())


Asking = Callable[..., Answer]


@pytest.mark.parametrize("ask", [ask, ask_async])
class TestTries:
    @pytest.fixture
    def picture(self, pictures: Path) -> bytes:
        return (pictures / "0.png").read_bytes()

    def test_as_often_as_the_server_is_busy(self, fake: FakeServer, picture: bytes, ask: Asking) -> None:
        with serve_grpc(fake) as address:
            for url in (f"{fake.url}/predictions/fake", f"{fake.url}/v2/models/fake", f"grpc://{address}/fake"):
                fake.seen.clear()
                fake.refusals = 1
                assert ask(url, picture).status == 200
                assert fake.seen == 2 * ["application/json"]

    def test_after_as_many_it_says_why(self, fake: FakeServer, picture: bytes, ask: Asking) -> None:
        fake.refusals = 10
        with pytest.raises(BusyError, match="no room") as told:
            ask(f"{fake.url}/predictions/fake", picture, retries=2)
        assert (told.value.status, told.value.retry_after, len(fake.seen)) == (503, 0, 3)

    def test_no_longer_than_there_is_time(self, fake: FakeServer, picture: bytes, ask: Asking) -> None:
        fake.status = 503  # it does not say for how long
        start = time.monotonic()
        with pytest.raises(BusyError):
            ask(f"{fake.url}/predictions/fake", picture, timeout_seconds=0.2)
        fake.delay = 60.0
        with pytest.raises(LateError, match=r"not answered within 0\.2 s") as told:
            ask(f"{fake.url}/predictions/fake", picture, timeout_seconds=0.2)
        assert isinstance(told.value, TimeoutError)
        assert len(told.value.request_id) == 36
        assert time.monotonic() - start < 2

    @pytest.mark.parametrize(("status", "error"), [(400, RefusedError), (504, LateError), (500, FailedError)])
    def test_no_more_where_it_is_no_use(
        self, fake: FakeServer, picture: bytes, ask: Asking, status: int, error: type[AnswerError]
    ) -> None:
        fake.status = status
        with pytest.raises(error, match="no room"):
            ask(f"{fake.url}/predictions/fake", picture)
        assert len(fake.seen) == 1

    def test_a_server_that_is_not_there(self, picture: bytes, ask: Asking) -> None:
        url = "http://127.0.0.1:1/predictions/fake"
        with pytest.raises(NoAnswerError, match=f"{url}: .*refused|{url}: .*Cannot connect"):
            ask(url, picture, retries=1, timeout_seconds=5)


def test_what_is_no_picture_is_not_sent() -> None:
    for source, error, told in (
        (5, TypeError, "picture: expected a path, bytes, an array or a Pillow image, got int"),
        (np.zeros((2, 2)), ValueError, r"picture: expected uint8 RGB \[H, W, 3\], got float64 \[2, 2\]"),
        ("none.jpg", FileNotFoundError, "none.jpg"),
    ):
        with pytest.raises(error, match=told):
            encode_source(source)
    with Client("http://127.0.0.1:1/predictions/x") as client, pytest.raises(TypeError, match="expected some of view"):
        client.ask(b"", shedule="off")
