"""Connections: kept, or ended in time, so that what balances them spreads a load."""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_server import FakeServer, Service, serve_grpc

from loadtest.client.masks import OK
from loadtest.client.pictures import load_mix
from loadtest.client.shapes import steady
from loadtest.client.ways import WAYS
from loadtest.report.summary import Limits, summarize
from loadtest.running import run_load
from loadtest.settings import LoadSettings
from loadtest.slo import Slo

pytest_plugins = ("load_fixtures",)

NUM_REQUESTS = 6


@pytest.mark.parametrize(
    ("connection_seconds", "pause", "connections"),
    [(float("inf"), 0.0, 1), (0.0, 0.0, NUM_REQUESTS), (0.1, 0.06, NUM_REQUESTS // 2)],
)
def test_a_connection_ends_in_time(
    fake: FakeServer, pictures: Path, connection_seconds: float, pause: float, connections: int
) -> None:
    item = load_mix(pictures, shares={}, weights={}, seed=0).pictures[0]
    client = WAYS["torchserve"]([fake.url], "fake", connection_seconds)
    for number in range(NUM_REQUESTS):
        assert client.ask(item, number, 10).status == 200
        time.sleep(pause)
    client.close()
    assert connections <= fake.num_connections <= connections + (pause > 0) * 2  # a pause may be longer than asked for


def test_a_channel_of_grpc_ends_in_time(fake: FakeServer, pictures: Path) -> None:
    item = load_mix(pictures, shares={}, weights={}, seed=0).pictures[0]
    peers: set[str] = set()
    with serve_grpc(fake, peers.add) as address:
        for connection_seconds, channels in ((float("inf"), 1), (0.0, NUM_REQUESTS)):
            client = WAYS["triton-grpc"]([address], "fake", connection_seconds)
            peers.clear()
            for number in range(NUM_REQUESTS):
                assert client.ask(item, number, 10).status == 200
            client.close()
            assert len(peers) == channels


@pytest.mark.parametrize(("connection_seconds", "shares"), [(None, [1.0, 0.0]), (0.0, [0.5, 0.5])])
def test_a_load_through_a_service_reaches_every_replica(
    pictures: Path, connection_seconds: float | None, shares: list[float]
) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(FakeServer()) for _ in range(2)]
        settings = LoadSettings(
            urls=(stack.enter_context(Service(replicas)).url,),
            model="fake",
            pictures=str(pictures),
            phases=steady(10, 2.0),
            process="even",
            connection_seconds=connection_seconds,
        )
        result = run_load(settings, metrics=[f"{replica.url}/metrics" for replica in replicas])
        assert {record.outcome for record in result.records} == {OK}
        found = summarize(settings, result, Limits(slo=Slo.parse("errors=0")))["replicas"]
        names = [replica.url.removeprefix("http://") for replica in replicas]
    assert [next(row["share"] for row in found if row["name"] == name) for name in names] == pytest.approx(
        shares, abs=0.1
    )


def test_who_answered_where_a_proxy_tells(pictures: Path) -> None:
    with FakeServer() as first, FakeServer() as second:
        first.name, second.name = "replica-1", "replica-2"
        settings = LoadSettings(
            urls=(first.url, second.url), model="fake", pictures=str(pictures), phases=steady(20, 1.0), process="even"
        )
        result = run_load(settings)
    found = summarize(settings, result, Limits(slo=Slo.parse("errors=0")))["replicas"]
    assert found == [
        {"name": "replica-1", "requests": 10, "share": 0.5},
        {"name": "replica-2", "requests": 10, "share": 0.5},
    ]
