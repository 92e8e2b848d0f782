"""What the edge counts, for Prometheus at its `/metrics`."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

REGISTRY = CollectorRegistry()
REQUESTS = Counter("mpm_edge_requests", "Requests by the status of their answer.", ["status"], registry=REGISTRY)
REFUSALS = Counter("mpm_edge_refusals", "What never reached the server, by reason.", ["reason"], registry=REGISTRY)
CONNECTIONS = Gauge("mpm_edge_connections", "Connections of clients.", registry=REGISTRY)
HELD_BYTES = Gauge("mpm_edge_held_bytes", "Bodies of requests that are on their way.", registry=REGISTRY)


def render(restarts: Path | None) -> bytes:
    """All metrics as text, with what the launcher wrote of processes that it started again."""
    return generate_latest(REGISTRY) + (restarts.read_bytes() if restarts and restarts.is_file() else b"")
