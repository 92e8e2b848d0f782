"""Servers behind the edge at four times what they hold, and while their processes are killed or stopped.

LOAD_SECONDS (20) is how long the overload lasts; `-s` prints figures.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
from launched import Launched, launched

from handlers.api.formats.views import encode_picture
from model_store.torchserve import build_archive
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

SECONDS = float(os.environ.get("LOAD_SECONDS", "20"))
SERVING = {"schedule": [0, 1], "precision": "fp32", "deadline_seconds": 10, "max_inflight_tokens": 4000}
WORKERS = {"torchserve": "model_service_worker", "triton": "triton_python_backend_stub"}
SERVERS = {"torchserve": "ModelServer", "triton": "bin/tritonserver"}
ALLOWED = {200, 503, 504}


@pytest.fixture(scope="module", params=["torchserve", "triton"])
def served(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Launched]]:
    folder = tmp_path_factory.mktemp(request.param)
    build = build_archive if request.param == "torchserve" else build_model
    build(checkpoint, name="tiny", out=folder / "models", serving=SERVING)
    with launched(request.param, folder / "models", folder / "log", edge=True) as running:
        yield request.param, running


@pytest.fixture(scope="module")
def pictures(photo: Callable[..., np.ndarray]) -> list[bytes]:
    return [encode_picture(photo(i, 300 + 60 * i, 700 - 40 * i), "image/jpeg") for i in range(8)]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_four_times_what_it_holds(served: tuple[str, Launched], pictures: list[bytes]) -> None:
    name, running = served
    asyncio.run(_overload(name, running, pictures))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_that_are_killed_or_stopped(served: tuple[str, Launched], pictures: list[bytes]) -> None:
    name, running = served
    asyncio.run(_hurt(name, running, pictures))


async def _overload(name: str, running: Launched, pictures: list[bytes]) -> None:
    async with Load(running.url, pictures) as load:
        await load.at(clients=8, seconds=8)
        rate = load.seen[200] / 8
        alone = await load.lone()
        before = memory(running)
        load.seen.clear()
        await load.arriving(rate=4 * rate, seconds=SECONDS)
        recovered = await load.until_as_fast_as(3 * alone + 0.2)
        seen, after = load.seen, memory(running)
    held = f"{rate:.0f}/s held, {4 * rate:.0f}/s for {SECONDS:g} s: {dict(seen)}"
    print(f"\n{name}: {held}; {recovered:.1f} s to recover; MiB {before} -> {after}")
    assert set(seen) <= ALLOWED
    assert seen[200] > rate * SECONDS / 4
    assert seen[503]
    assert recovered < 5
    assert "Traceback" not in running.told


async def _hurt(name: str, running: Launched, pictures: list[bytes]) -> None:
    """Who is connected to an edge that is killed is cut off; all else is answered."""
    async with Load(running.url, pictures) as load:
        for kind, text, signals in (
            ("worker stopped for 3 s", WORKERS[name], (signal.SIGSTOP, signal.SIGCONT)),
            ("worker killed", WORKERS[name], (signal.SIGKILL,)),
            ("server killed", SERVERS[name], (signal.SIGKILL,)),
            ("edge killed", "handlers.edge", (signal.SIGKILL,)),
        ):
            load.seen.clear()
            asking = asyncio.create_task(load.at(clients=4, seconds=6))
            await asyncio.sleep(1)
            (process,) = running.children(text)
            for number in signals:
                process.send_signal(number)
                await asyncio.sleep(3)
            await asking
            seen = load.seen.copy()
            recovered = await load.until_as_fast_as(5, patience=120)
            print(f"\n{name}, {kind}: {dict(seen)} in 6 s; answers again {recovered:.0f} s later")
            lost = {"worker": {500}, "server": set[int](), "edge": {0}}[kind.partition(" ")[0]]
            assert set(seen) <= ALLOWED | lost, (kind, seen)
        load.seen.clear()
        asking = asyncio.create_task(load.at(clients=4, seconds=6))
        await asyncio.sleep(1)
        running.process.terminate()
        await asking
    print(f"\n{name}, SIGTERM: {dict(load.seen)}")
    assert set(load.seen) <= {200, 503, 0}  # 0: nobody listens any more
    assert running.process.wait(60) == 0


def memory(running: Launched) -> int:
    return sum(each.memory_info().rss for each in psutil.Process(running.process.pid).children(recursive=True)) >> 20


class Load:
    """Requests of many clients; a context manager.

    Attributes:
        seen: answers by status; 0 where the connection was lost or refused.
    """

    def __init__(self, url: str, pictures: list[bytes]) -> None:
        self._url, self._pictures, self._number = f"{url}/predictions/tiny", pictures, 0
        self.seen: Counter[int] = Counter()

    async def __aenter__(self) -> "Load":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=900), timeout=aiohttp.ClientTimeout(total=90)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def lone(self) -> float:
        start = time.monotonic()
        self._number += 1
        status = 0
        with suppress(aiohttp.ClientError):
            async with self._session.post(
                self._url, data=self._pictures[self._number % len(self._pictures)]
            ) as answer:
                await answer.read()
                status = answer.status
        self.seen[status] += 1
        return time.monotonic() - start

    async def at(self, clients: int, seconds: float) -> None:
        """Clients that ask again when they are answered."""
        end = time.monotonic() + seconds

        async def ask() -> None:
            while time.monotonic() < end:
                await self.lone()
                await asyncio.sleep(0.01)

        await asyncio.gather(*(ask() for _ in range(clients)))

    async def arriving(self, rate: float, seconds: float) -> None:
        """Requests that don't wait for answers."""
        start = time.monotonic()
        tasks: list[asyncio.Task[float]] = []
        while (now := time.monotonic() - start) < seconds:
            while len(tasks) < now * rate:
                tasks.append(asyncio.create_task(self.lone()))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)

    async def until_as_fast_as(self, seconds: float, patience: float = 30) -> float:
        """How long it takes until a lone request is answered within so long."""
        start, before = time.monotonic(), self.seen[200]
        while time.monotonic() - start < patience:
            took = await self.lone()
            if self.seen[200] > before and took < seconds:
                return time.monotonic() - start
            before = self.seen[200]
            await asyncio.sleep(0.1)
        raise AssertionError(f"not as before within {patience} s: {self.seen}")
