"""The edge as a process: a launcher starts it with a socket that listens already, a container by `mpm edge`."""

import argparse
import asyncio
import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from yarl import URL

from .app import METRICS_TYPE, Edge
from .connection import Server
from .limits import Limits
from .metrics import render
from .page import Page

_PORTS = {"torchserve": 8080, "triton": 8000}


async def run(listening: socket.socket, edge: Edge, limits: Limits, metrics: socket.socket | None) -> None:
    """Answer requests until SIGTERM; then accept no more, and finish. Metrics are told to the end."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stopped.set)
    server = Server(edge, limits)
    accepting = await loop.create_server(server, sock=listening, backlog=1024)
    if metrics:
        await loop.create_server(web.Server(_tell, access_log=None), sock=metrics)
    await stopped.wait()
    edge.stopping = True
    accepting.close()
    await server.finish(limits.answer_seconds)
    await edge.close()


async def _tell(_: web.BaseRequest) -> web.Response:
    """On a port of its own, which has no limit of connections: probes get through when clients don't."""
    return web.Response(body=render(None), headers=METRICS_TYPE)


def _listen(host: str, port: int) -> socket.socket:
    from handlers.launch.processes import listen  # which an edge with --fd has no need of

    return listen(host, port)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mpm edge", description="Strict HTTP in front of a server that runs elsewhere."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8088, help="for clients (8088)")
    parser.add_argument("--fd", type=int, help="of a socket that listens already, instead")
    parser.add_argument("--metrics-port", type=int, help="for Prometheus and probes, on the same host (none)")
    parser.add_argument("--server", choices=list(_PORTS), required=True)
    parser.add_argument("--upstream", help="URL of the server behind (http://127.0.0.1, at the server's own port)")
    parser.add_argument("--cors-origin", action="append", default=[], help="whose pages may call; * for all")
    parser.add_argument("--max-body-bytes", type=int, default=Limits().body_bytes)
    parser.add_argument("--patience-seconds", type=float, default=Limits().header_seconds, help="with slow clients")
    parser.add_argument("--answer-seconds", type=float, default=Limits().answer_seconds)
    parser.add_argument("--restarts", type=Path, help="file with the launcher's count of restarts")
    parser.add_argument("--models", type=Path, help="file with the URL of each model's metrics: the launcher's")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=URL", help="a model's metrics (none)")
    parser.add_argument("--no-page", action="store_true", help="no page for people; nor is there one without models")
    parser.add_argument("--example", type=Path, action="append", default=[], help="picture that the page offers")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="edge: %(message)s")
    with suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limits = Limits(
        body_bytes=arguments.max_body_bytes,
        header_seconds=arguments.patience_seconds,
        idle_seconds=arguments.patience_seconds,
        answer_seconds=arguments.answer_seconds,
    )
    upstream = URL(arguments.upstream or "http://127.0.0.1")
    if upstream.explicit_port is None:
        upstream = upstream.with_port(_PORTS[arguments.server])
    host, metrics_port = arguments.host, arguments.metrics_port
    listening = _listen(host, arguments.port) if arguments.fd is None else socket.socket(fileno=arguments.fd)
    metrics = None if metrics_port is None else _listen(host, metrics_port)

    given = dict(each.partition("=")[::2] for each in arguments.model)
    has_page = not arguments.no_page and bool(arguments.models or given)

    def models() -> dict[str, str]:
        told: dict[str, str] = json.loads(arguments.models.read_text()) if arguments.models else given
        return told

    async def serve() -> None:
        edge = Edge(
            str(upstream).rstrip("/"),
            is_triton=arguments.server == "triton",
            limits=limits,
            origins=arguments.cors_origin,
            restarts=arguments.restarts,
            models=models,
            page=Page(arguments.example) if has_page else None,
        )
        await run(listening, edge, limits, metrics)

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
