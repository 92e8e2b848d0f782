"""How a served model is asked, and what is asked for: TorchServe over HTTP, Triton over HTTP and over gRPC."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from handlers.client import Answer, Transport, connect

from .pictures import Item


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol.

    Attributes:
        host: where a server of this machine listens by default.
        path: of a model behind its host.
    """

    host: str
    path: str

    def url(self, host: str, model: str) -> str:
        """The URL that `handlers.client.connect` takes; gRPC's hosts may be given without a scheme."""
        scheme = "" if "://" in host or not self.path.startswith("/{") else "grpc://"
        return f"{scheme}{host.rstrip('/')}{self.path.format(model)}"


PROTOCOLS = {
    "torchserve": Protocol("http://127.0.0.1:8080", "/predictions/{}"),
    "triton": Protocol("http://127.0.0.1:8000", "/v2/models/{}"),
    "triton-grpc": Protocol("127.0.0.1:8001", "/{}"),
}
_ACCEPTED = {"json": "application/json"}


class Servers:
    """Clients of the same model on one or several servers, which are asked in turn.

    Raises:
        ValueError: a host is not one of the protocol.
    """

    def __init__(self, protocol: str, hosts: Sequence[str], model: str, connection_seconds: float = math.inf) -> None:
        self.hosts = list(hosts)
        urls = [PROTOCOLS[protocol].url(host, model) for host in hosts]
        expected = "HOST:PORT of gRPC" if protocol == "triton-grpc" else "http://HOST:PORT"
        for host in hosts:
            if not re.fullmatch(r"(grpc://)?[^/]+:\d+/?" if protocol == "triton-grpc" else r"https?://[^/]+/?", host):
                raise ValueError(f"host: expected {expected}, got {host!r}")
        self._clients: list[Transport] = [connect(url, connection_seconds=connection_seconds) for url in urls]

    def ask(self, item: Item, number: int, timeout_seconds: float) -> Answer:
        """Send an item to the server whose turn it is by the number of the request; raises as `Transport.ask`."""
        return self._clients[number % len(self._clients)].ask(
            item.body,
            accept=_ACCEPTED.get(item.kind, "image/png"),
            content_type=item.content_type,
            timeout_seconds=timeout_seconds,
        )

    def close(self) -> None:
        """Close all idle connections."""
        for client in self._clients:
            client.close()
