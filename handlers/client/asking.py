"""Clients: pictures in, results out, however long the server is busy in between."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from random import uniform
from typing import Any, Self, cast
from uuid import uuid4

from handlers.api.headers import OPTIONS

from .answers import Answer, AnswerError, BusyError, LateError, NoAnswerError
from .endpoints import parse_url
from .results import Result, encode_source
from .transport import Transport, connect

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 20.0


@dataclass(frozen=True, slots=True)
class Send:
    """A request to be sent within so long."""

    picture: bytes
    accept: str
    headers: Mapping[str, str]
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """A pause."""

    seconds: float


# Yields what is to be done, is sent the answers of what was sent, and returns the last.
Conversation = Generator[Send | Wait, Answer | None, Answer]


class Asking:
    """A client's options, and the way of a request through tries and pauses; sends nothing itself.

    Args:
        url: http(s)://HOST:PORT/predictions/NAME (TorchServe, and `mpm serve` of either server),
            http(s)://HOST:PORT/v2/models/NAME (Triton), or grpc://HOST:PORT/NAME (Triton, with `tritonclient[grpc]`).
        timeout_seconds: for a picture, from the first try to the last.
        retries: of a request that found no room, no server, or a connection that broke. They wait as long as
            `Retry-After` says, else half a second, then twice as long each time.
        headers: of every request, such as an API key.

    Raises:
        ValueError: the URL is none of these.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 60.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._endpoint = parse_url(url)
        self._url, self._timeout_seconds, self._retries = url, timeout_seconds, retries
        self._fixed = dict(headers or {})

    def converse(
        self, picture: bytes, accept: str, options: Mapping[str, Any], timeout_seconds: float | None
    ) -> Conversation:
        request_id = str(uuid4())
        if unknown := sorted(options.keys() - OPTIONS.keys()):
            raise TypeError(f"options: expected some of {', '.join(OPTIONS)}, got {unknown[0]}")
        named = {OPTIONS[name]: value for name, value in options.items() if value is not None}
        headers = {"X-Request-Id": request_id, **self._fixed, **named}
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        end = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        for tries_left in range(self._retries, -1, -1):
            failure: AnswerError
            try:
                answer = yield Send(picture, accept, headers, max(0.001, end - time.monotonic()))
            except NoAnswerError as error:
                failure = NoAnswerError(f"{self._url}: {error}", request_id=request_id)
            except TimeoutError:
                raise LateError(f"not answered within {seconds:g} s", request_id=request_id) from None
            else:
                assert answer is not None
                if answer.status == 200:
                    return answer
                failure = answer.failure(request_id)
                if not isinstance(failure, BusyError):
                    raise failure
            wait = uniform(0.5, 1) * pause if failure.retry_after is None else failure.retry_after
            if not tries_left or time.monotonic() + wait >= end:
                raise failure
            yield Wait(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")


class Client(Asking):
    """Asks a served model, from any thread; a context manager that closes its connections."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._transport: Transport = connect(url)

    def segment(self, picture: Any, *, timeout_seconds: float | None = None, **options: Any) -> Result:
        """Segment a picture.

        Args:
            picture: a path, an encoded picture, uint8 RGB [H, W, 3], or a picture of Pillow's.
            timeout_seconds: in place of the client's.
            options: `schedule`, blocks before which tokens merge ("2,5") or "off"; `merger`, how they merge instead
                ("tome:r=46"), where the server allows it; `fit`, the side that decides of a long picture, "shorter" or
                "longer"; `priority`, "bulk" gives way to "interactive".

        Raises:
            RefusedError: the picture or an option is wrong.
            BusyError, NoAnswerError: no room, or no server, after all tries.
            LateError: no answer in time.
            FailedError: the server failed.
            OSError, TypeError, ValueError: the picture can't be read here.
        """
        data = encode_source(picture)
        return Result.of(self.ask(data, "application/json", timeout_seconds=timeout_seconds, **options), data)

    def ask(
        self,
        picture: bytes,
        accept: str = "image/png",
        *,
        timeout_seconds: float | None = None,
        **options: Any,
    ) -> Answer:
        """Have an encoded picture answered as another media type, see `segment`; `view` is an option too."""
        conversation = self.converse(picture, accept, options, timeout_seconds)
        try:
            step = next(conversation)
            while True:
                try:
                    answer = self._do(step)
                except (NoAnswerError, TimeoutError) as error:
                    step = conversation.throw(error)
                else:
                    step = conversation.send(answer)
        except StopIteration as end:
            return cast(Answer, end.value)

    def is_ready(self) -> bool:
        """Whether the server says that it takes requests for the model."""
        return self._transport.is_ready()

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, step: Send | Wait) -> Answer | None:
        if isinstance(step, Wait):
            time.sleep(step.seconds)
            return None
        return self._transport.ask(
            step.picture, accept=step.accept, headers=step.headers, timeout_seconds=step.timeout_seconds
        )
