"""Clients that each wait for their answer before they ask again. No torch here: a process of its own asks servers."""

import http.client
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import count

Ask = Callable[[bytes], bytes]


@contextmanager
def ask_torchserve(url: str, model: str) -> Iterator[Ask]:
    """Masks as PNG over one connection that is kept."""

    def ask(picture: bytes) -> bytes:
        connection.request("POST", f"/predictions/{model}", picture, {"Content-Type": "image/jpeg"})
        return _body(connection.getresponse())

    with closing(_connect(url)) as connection:
        yield ask


@contextmanager
def ask_triton(url: str, model: str) -> Iterator[Ask]:
    """The same from Triton, as a raw body, the way curl would."""
    headers = {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": "MASK_PNG"}

    def ask(picture: bytes) -> bytes:
        connection.request("POST", f"/v2/models/{model}/infer", picture, headers)
        response = connection.getresponse()
        described = int(response.headers.get("Inference-Header-Content-Length", "0"))
        return _body(response)[described + 4 :]  # the length of the only value takes 4 bytes

    with closing(_connect(url)) as connection:
        yield ask


@contextmanager
def ask_triton_grpc(url: str, model: str) -> Iterator[Ask]:
    """The same through tritonclient."""
    import numpy as np
    import tritonclient.grpc

    wanted = [tritonclient.grpc.InferRequestedOutput("MASK_PNG")]

    def ask(picture: bytes) -> bytes:
        image = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
        return bytes(client.infer(model, [image], outputs=wanted).as_numpy("MASK_PNG")[0, 0])

    with tritonclient.grpc.InferenceServerClient(url) as client:
        yield ask


WAYS = {"torchserve": ask_torchserve, "triton": ask_triton, "triton grpc": ask_triton_grpc}


def run_clients(
    way: str, url: str, model: str, pictures: Sequence[bytes], num_clients: int, seconds: float
) -> tuple[list[float], float]:
    """Ask a server, each client over its own connection; see `closed_loop`."""

    @contextmanager
    def connect() -> Iterator[Callable[[int], bytes]]:
        with WAYS[way](url, model) as ask:
            yield lambda i: ask(pictures[i % len(pictures)])

    try:
        return closed_loop(connect, num_clients, seconds)
    except RuntimeError as error:
        raise RuntimeError(f"{way}: {error}") from error


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


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)


def _body(response: http.client.HTTPResponse) -> bytes:
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {body[:200]!r}")
    return body
