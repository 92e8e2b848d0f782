"""The client for an event loop."""

import asyncio
import urllib.parse
from collections.abc import Mapping
from typing import Any, Self, cast

from .answers import Answer, NoAnswerError
from .asking import Asking, Send, Wait
from .endpoints import GRPC_OPTIONS, GRPC_SERVICE, Endpoint, grpc_failure, grpc_value
from .results import Result, encode_source


class AsyncClient(Asking):
    """As `Client`, for one event loop; a request whose task is cancelled ends on the server too. Needs `aiohttp`."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._transport = _Transport(self._endpoint)

    async def segment(self, picture: Any, *, timeout_seconds: float | None = None, **options: Any) -> Result:
        """As `Client.segment`."""
        data = await asyncio.to_thread(encode_source, picture)
        answer = await self.ask(data, "application/json", timeout_seconds=timeout_seconds, **options)
        return await asyncio.to_thread(Result.of, answer, data)

    async def ask(
        self,
        picture: bytes,
        accept: str = "image/png",
        *,
        timeout_seconds: float | None = None,
        **options: Any,
    ) -> Answer:
        """As `Client.ask`."""
        conversation = self.converse(picture, accept, options, timeout_seconds)
        try:
            step = next(conversation)
            while True:
                try:
                    answer = await self._do(step)
                except (NoAnswerError, TimeoutError) as error:
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as end:
            return cast(Answer, end.value)

    async def is_ready(self) -> bool:
        """As `Client.is_ready`."""
        return await self._transport.is_ready()

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _do(self, step: Send | Wait) -> Answer | None:
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return None
        return await self._transport.ask(step.picture, step.accept, step.headers, step.timeout_seconds)


class _Transport:
    """Sends requests to one served model; connections are opened in the loop that first asks."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._session: Any = None
        self._channel: Any = None

    async def ask(self, picture: bytes, accept: str, headers: Mapping[str, str], timeout_seconds: float) -> Answer:
        """Send one picture; raises as `Transport.ask`, and takes `timeout_seconds` for everything."""
        if self._endpoint.protocol == "grpc":
            from tritonclient.grpc import service_pb2 as messages

            request = self._endpoint.message(messages, picture, accept, headers)
            answer = await self._call("ModelInfer", request, messages.ModelInferResponse, timeout_seconds)
            return answer if isinstance(answer, Answer) else grpc_value(answer)
        sent = self._endpoint.headers(accept, "application/octet-stream", headers)
        return self._endpoint.value(await self._request("POST", self._endpoint.target, picture, sent, timeout_seconds))

    async def is_ready(self, timeout_seconds: float = 5.0) -> bool:
        """Whether the server says that it takes requests for the model."""
        try:
            if self._endpoint.protocol == "grpc":
                from tritonclient.grpc import service_pb2 as messages

                request = messages.ModelReadyRequest(name=self._endpoint.model)
                reply = await self._call("ModelReady", request, messages.ModelReadyResponse, timeout_seconds)
                return bool(getattr(reply, "ready", False))
            return (await self._request("GET", self._endpoint.ready_target, None, {}, timeout_seconds)).status == 200
        except OSError:
            return False

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._channel is not None:
            await self._channel.close()
        self._session = self._channel = None

    async def _request(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], timeout_seconds: float
    ) -> Answer:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        url = urllib.parse.urlunsplit((self._endpoint.url.scheme, self._endpoint.url.netloc, target, "", ""))
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                named = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status, await response.read(), named)
        except TimeoutError:
            raise
        except (OSError, aiohttp.ClientError) as error:
            raise NoAnswerError(f"{type(error).__name__}: {error}") from None

    async def _call(self, method: str, request: Any, reply: Any, timeout_seconds: float) -> Any:
        """The reply, or an error as an answer."""
        import grpc

        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._endpoint.url.netloc, GRPC_OPTIONS)
        try:
            return await self._channel.unary_unary(
                GRPC_SERVICE + method,
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply.FromString,
            )(request, timeout=timeout_seconds)
        except grpc.RpcError as error:
            return grpc_failure(error)
