"""Clients that each wait for their answer before they ask again. No torch here: a process of its own asks servers."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count

from handlers.client import Transport, connect


def run_clients(
    url: str, pictures: Sequence[bytes], num_clients: int, seconds: float, merger: str
) -> tuple[list[float], float]:
    """Ask a served model for masks, each client over its own connection; see `closed_loop`."""

    @contextmanager
    def client() -> Iterator[Callable[[int], bytes]]:
        with connect(url) as connection:
            yield lambda i: ask(connection, pictures[i % len(pictures)], merger)

    try:
        return closed_loop(client, num_clients, seconds)
    except RuntimeError as error:
        raise RuntimeError(f"{url}: {error}") from error


def ask(client: Transport, picture: bytes, merger: str) -> bytes:
    """The mask of a picture, with a merger that the server allows.

    Raises:
        RuntimeError: it was refused.
    """
    answer = client.ask(picture, headers={"X-MPM-Merger": merger}, timeout_seconds=300)
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.error}")
    return answer.body


def closed_loop(
    connect: Callable[[], AbstractContextManager[Callable[[int], object]]], num_clients: int, seconds: float
) -> tuple[list[float], float]:
    """Keep clients asking for so long; every client finishes its last request.

    Args:
        connect: entered once by each client, gives what sends the request of a number and waits for its answer. The
            numbers count all clients' requests from 0.

    Returns:
        Seconds of each answer, and of everything.

    Raises:
        RuntimeError: something was refused; figures would leave it out.
    """
    latencies: list[float] = []
    failures: list[Exception] = []
    numbers = count()
    start = time.monotonic()

    def client() -> None:
        try:
            with connect() as ask:
                while time.monotonic() - start < seconds:
                    sent = time.monotonic()
                    ask(next(numbers))
                    latencies.append(time.monotonic() - sent)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {num_clients} clients failed: {failures[0]}")
    return latencies, time.monotonic() - start
