"""The server's own view: its metrics."""

import http.client
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_PREFIXES = ("mpm_", "process_")
_TIMEOUT_SECONDS = 5.0

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """All servers' metrics at one time, added up.

    Attributes:
        at: seconds since the epoch.
        values: by name and sorted labels.
        images: that each server has segmented, by its address.
    """

    at: float
    values: Mapping[Key, float]
    images: Mapping[str, float] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Sum of all series of a name that have these labels; 0 if there is none."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.values.items() if found == name and wanted <= set(has))

    def labels(self, name: str, label: str) -> list[str]:
        """Values of a label, sorted."""
        return sorted({dict(has)[label] for found, has in self.values if found == name and label in dict(has)})


def read_metrics(urls: Sequence[str]) -> Sample:
    """Read the metrics of all servers once.

    Raises:
        OSError: one does not answer.
        ValueError: what it says are not metrics.
    """
    at = time.time()
    values: dict[Key, float] = {}
    images: dict[str, float] = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # only the hosts that are given are asked
    for address in (address for url in urls for address in _addresses(url)):
        host = urllib.parse.urlsplit(address).netloc
        try:
            with opener.open(address, timeout=_TIMEOUT_SECONDS) as response:
                text = response.read().decode()
        except http.client.HTTPException as error:  # it ended while it spoke
            raise OSError(f"{address}: {error or type(error).__name__}") from None
        for family in text_string_to_metric_families(text):
            if not family.name.startswith(_PREFIXES):
                continue
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                values[key] = values.get(key, 0.0) + sample.value
                if sample.name == "mpm_images_total":
                    images[host] = images.get(host, 0.0) + sample.value
    return Sample(at, values, images)


def _addresses(url: str) -> list[str]:
    """The URL once for every address of its host: a name may stand for all pods of a service."""
    parts = urllib.parse.urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, socket.AF_INET, socket.SOCK_STREAM)
    hosts = sorted({str(address[0]) for *_, address in found})
    return [urllib.parse.urlunsplit(parts._replace(netloc=f"{host}:{parts.port or 80}")) for host in hosts]


def check_metrics_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"metrics: expected http://HOST:PORT/metrics, got {url!r}")
