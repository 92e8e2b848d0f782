"""What a server does meanwhile: its metrics, and the memory of all its processes."""

import socket
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import gevent
import psutil

from handlers.client import Metrics, read_metrics

_MIB = 2**20
Reading = TypeVar("Reading")


@dataclass(frozen=True, slots=True)
class MetricsSample:
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
    at = time.time()
    pages = {}
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, socket.AF_INET, socket.SOCK_STREAM)
        for host in sorted({str(address[0]) for *_, address in found}):
            address = f"{host}:{parts.port or 80}"
            pages[address] = read_metrics(urllib.parse.urlunsplit(parts._replace(netloc=address)))
    images = {address: page.total("mpm_images_total") for address, page in pages.items()}
    return MetricsSample(at, Metrics.sum(pages.values()), images)


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Resident memory of a process and all its descendants; pages that they share count once for each.

    Attributes:
        at: seconds since the epoch.
        mib: by the names of the processes.
    """

    at: float
    mib: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.mib.values())


def sample_memory(pid: int) -> MemorySample:
    """Read the memory of a process and its descendants.

    Raises:
        ProcessLookupError: there is no such process.
    """
    at, mib = time.time(), defaultdict[str, float](float)
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"process {pid} is not there") from None
    for process in processes:
        try:
            mib[process.name()] += process.memory_info().rss / _MIB
        except psutil.Error:  # ended since
            continue
    return MemorySample(at, dict(mib))


def find_server(port: int) -> int | None:
    """The process that listens on a port of this machine, as far as this user may see; None if there is none."""
    listening = (
        found.pid
        for found in psutil.net_connections("tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port  # type: ignore[union-attr]
    )
    return next((pid for pid in listening if pid), None)


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
