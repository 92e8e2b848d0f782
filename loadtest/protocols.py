"""How a served model is asked: TorchServe over HTTP, Triton over HTTP and over gRPC."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from handlers.client import Answer, connect

from .pictures import Item


class Protocol(NamedTuple):
    """Where a server of this machine listens by default, the path of a model, and what a host looks like."""

    host: str
    path: str
    expected: str = "http://HOST:PORT"
    pattern: str = r"https?://[^/]+/?"


PROTOCOLS = {
    "torchserve": Protocol("http://127.0.0.1:8080", "/predictions/{}"),
    "triton": Protocol("http://127.0.0.1:8000", "/v2/models/{}"),
    "triton-grpc": Protocol("127.0.0.1:8001", "/{}", "HOST:PORT of gRPC", r"(grpc://)?[^/]+:\d+/?"),
}


def model_urls(protocol: str, hosts: Sequence[str], model: str) -> list[str]:
    """URLs as `handlers.client.connect` takes them; a ValueError if a host is not one of the protocol."""
    chosen = PROTOCOLS[protocol]
    for host in hosts:
        if not re.fullmatch(chosen.pattern, host):
            raise ValueError(f"host: expected {chosen.expected}, got {host!r}")
    hosts = [host if "://" in host else f"grpc://{host}" for host in hosts]
    return [host.rstrip("/") + chosen.path.format(model) for host in hosts]


class Servers:
    """Clients of the same model on one or several servers, which are asked in turn."""

    def __init__(self, protocol: str, hosts: Sequence[str], model: str, connection_seconds: float = math.inf) -> None:
        self.hosts = list(hosts)
        urls = model_urls(protocol, hosts, model)
        self._clients = [connect(url, connection_seconds=connection_seconds) for url in urls]

    def ask(self, item: Item, number: int, timeout_seconds: float) -> Answer:
        """Send an item to the server whose turn it is by the number of the request; raises as `Transport.ask`."""
        return self._clients[number % len(self._clients)].ask(
            item.body,
            accept="application/json" if item.kind == "json" else "image/png",
            content_type=item.content_type,
            timeout_seconds=timeout_seconds,
        )
