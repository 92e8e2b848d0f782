"""Connections of clients: how many, and how long one may take to say what it wants."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from handlers.errors import ErrorKind, ServingError

from .bodies import first_line
from .limits import Limits
from .metrics import CONNECTIONS, REFUSALS

logger = logging.getLogger(__name__)

JSON_TYPE = "application/json"


class Server(web.Server):
    """Makes a `Connection` for every client."""

    def __init__(self, handler: Any, limits: Limits) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,  # a client that left ends its request, and with it the one to the server behind
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=limits.keepalive_seconds,
            lingering_time=2.0,
        )
        self.limits = limits
        CONNECTIONS.set_function(lambda: len(self._connections))

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def finish(self, seconds: float) -> None:
        """Close connections as their requests are answered; what takes longer is cut off."""
        end = self._loop.time() + seconds
        while self._connections and self._loop.time() < end:
            for connection in self.connections:
                if isinstance(connection, Connection) and connection.is_idle:
                    connection.force_close()
            await asyncio.sleep(0.02)
        await self.shutdown(0.1)


class Connection(web.RequestHandler):
    """Bounds the time for headers, and tells errors in the project's form."""

    __slots__ = ("_limits", "_said_something", "_timer")

    def __init__(self, manager: Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._limits = manager.limits
        self._timer: asyncio.TimerHandle | None = None
        self._said_something = False

    @property
    def is_idle(self) -> bool:
        """No request is being answered or waits for it."""
        return self._waiter is not None and not self._waiter.done() and not self._messages

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start_timer()
        if self._manager is not None and len(self._manager.connections) > self._limits.connections:
            self._refuse(ErrorKind.OVERLOADED, "too many connections are open; ask again")

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        num_before = self._request_count
        waits = self._timer is not None or self.is_idle
        super().data_received(data)
        self._said_something = True
        if self._request_count != num_before:
            self._stop_timer()
            self._said_something = False
        elif waits and self._timer is None:
            self._start_timer()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What a request that could not be parsed is answered with, or one that an error of ours ended."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        if status == 500:
            logger.error("a request failed", exc_info=exc)
            error = ServingError(ErrorKind.INTERNAL, "internal error; the edge's log says more")
        elif isinstance(exc, LineTooLong):
            error = ServingError(ErrorKind.HEADERS, f"request: expected headers within limits, got {first_line(exc)}")
        else:
            got = first_line(exc) if exc is not None else message
            error = ServingError(ErrorKind.BAD_REQUEST, f"request: expected well-formed HTTP/1.1, got {got}")
        REFUSALS.labels(error.kind.name.lower()).inc()
        response = web.Response(status=error.kind.http_status, body=error.body(str(uuid4())), content_type=JSON_TYPE)
        response.force_close()
        return response

    def _start_timer(self) -> None:
        self._timer = self._loop.call_later(self._limits.header_seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._said_something:
            seconds = f"{self._limits.header_seconds:g} s"
            self._refuse(ErrorKind.SLOW, f"headers: expected all within {seconds}, got a part; send them faster")
        else:
            self.force_close()

    def _refuse(self, kind: ErrorKind, message: str) -> None:
        """Answer in place of a handler, and close."""
        REFUSALS.labels("slow_headers" if kind is ErrorKind.SLOW else "connections").inc()
        body = ServingError(kind, message).body(str(uuid4()))
        head = f"HTTP/1.1 {kind.http_status} Refused\r\nContent-Type: {JSON_TYPE}\r\nContent-Length: {len(body)}\r\n"
        if self.transport is not None:
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.force_close()
