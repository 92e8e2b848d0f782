"""The edge as a process; a launcher starts it with a socket that listens already."""

import argparse
import asyncio
import logging
import resource
import signal
import socket
from contextlib import suppress
from pathlib import Path

from .app import Edge
from .connection import Server
from .limits import Limits
from .page import Page


async def run(listening: socket.socket, edge: Edge, limits: Limits) -> None:
    """Answer requests until SIGTERM; then accept no more, and finish."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stopped.set)
    server = Server(edge, limits)
    accepting = await loop.create_server(server, sock=listening, backlog=1024)
    await stopped.wait()
    edge.stopping = True
    accepting.close()
    await server.finish(limits.answer_seconds)
    await edge.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m handlers.edge", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="of the socket that listens")
    parser.add_argument("--upstream", required=True, help="URL of the server behind")
    parser.add_argument("--server", choices=["torchserve", "triton"], required=True)
    parser.add_argument("--cors-origin", action="append", default=[], help="whose pages may call; * for all")
    parser.add_argument("--max-body-bytes", type=int, default=Limits().body_bytes)
    parser.add_argument("--patience-seconds", type=float, default=Limits().header_seconds, help="with slow clients")
    parser.add_argument("--answer-seconds", type=float, default=Limits().answer_seconds)
    parser.add_argument("--restarts", type=Path, help="file with the launcher's count of restarts")
    parser.add_argument("--models", type=Path, help="file with the URL of each model's metrics")
    parser.add_argument("--no-page", action="store_true", help="no page for people")
    parser.add_argument("--example", type=Path, action="append", default=[], help="picture that the page offers")
    arguments = parser.parse_args()
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

    async def serve() -> None:
        edge = Edge(
            arguments.upstream,
            is_triton=arguments.server == "triton",
            limits=limits,
            origins=arguments.cors_origin,
            restarts=arguments.restarts,
            models=arguments.models,
            page=None if arguments.no_page else Page(arguments.example),
        )
        await run(socket.socket(fileno=arguments.fd), edge, limits)

    asyncio.run(serve())


if __name__ == "__main__":
    main()
