"""What a server does meanwhile: its metrics, and the memory of all its processes."""

import socket
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

import gevent
import psutil

from handlers.client import Metrics, read_metrics

Reading = TypeVar("Reading")


class MetricsSample(NamedTuple):
    """All servers' metrics at one time.

    Attributes:
        at: seconds since the epoch.
        metrics: added up.
        images: that each server has segmented, by its address.
    """

    at: float
    metrics: Metrics
    images: Mapping[str, float]


def sample_metrics(urls: Sequence[str]) -> MetricsSample:
    """Read the metrics of all servers once; a host's name may stand for several, as that of a headless Service.

    Raises:
        OSError: one gives no answer.
        ValueError: a page is not one of metrics.
    """
    at, pages = time.time(), {}
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 80
        found = socket.getaddrinfo(parts.hostname, port, socket.AF_INET, socket.SOCK_STREAM)
        for address in sorted({f"{socket_address[0]}:{port}" for *_, socket_address in found}):
            pages[address] = read_metrics(urllib.parse.urlunsplit(parts._replace(netloc=address)))
    images = {address: page.total("mpm_images_total") for address, page in pages.items()}
    return MetricsSample(at, Metrics.sum(pages.values()), images)


class MemorySample(NamedTuple):
    """Resident memory of a process and all its descendants; pages that they share count once for each.

    Attributes:
        at: seconds since the epoch.
        mib: of all of them.
    """

    at: float
    mib: float


def sample_memory(pid: int) -> MemorySample:
    """Read the memory of a process and its descendants; a ProcessLookupError if there is no such process."""
    at, mib = time.time(), 0.0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"process {pid} is not there") from None
    for process in processes:
        with suppress(psutil.Error):  # ended since
            mib += process.memory_info().rss / 2**20
    return MemorySample(at, mib)


def find_server(port: int) -> int | None:
    """The process that listens on a port of this machine, as far as this user may see; None if there is none."""
    found = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    return next((each.pid for each in found if each.laddr.port == port and each.pid), None)  # type: ignore[union-attr]


class Sampler(Generic[Reading]):
    """Reads once a second, in a greenlet; what can't be read is left out and counted.

    Args:
        read: raises OSError or ValueError where it can't; None to read nothing.
    """

    def __init__(self, read: Callable[[], Reading] | None) -> None:
        self.samples: list[Reading] = []
        self.num_missed = 0
        self._read = read
        self._greenlet = gevent.spawn(self._run) if read else None

    def stop(self) -> None:
        """Read once more, and no longer."""
        if self._greenlet:
            self._greenlet.kill()
            self._greenlet = None
            self._sample()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            self._sample()
            gevent.sleep(max(0.0, began + 1 - time.monotonic()))

    def _sample(self) -> None:
        assert self._read
        try:
            self.samples.append(self._read())
        except (OSError, ValueError):
            self.num_missed += 1
