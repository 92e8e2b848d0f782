"""The client of a served model: TorchServe and Triton over HTTP, Triton over gRPC, by the same calls.

    with Client("http://127.0.0.1:8080/predictions/segmenter") as client:
        result = client.segment("street.jpg")  # or bytes, an array, a Pillow image
    result.labels, result.classes, result.tokens, result.timings, result.overlay()

`AsyncClient` has the same methods to await. Both wait and ask again while a server is busy or being started; what is
not answered raises an `AnswerError`. `connect` sends requests once, and gives back whatever was answered.

Clients use no proxy of the environment. The sync client needs the standard library, gRPC needs `tritonclient[grpc]`,
`AsyncClient` over HTTP aiohttp, results numpy, and overlays Pillow; each is imported when it is needed.
"""

from typing import TYPE_CHECKING, Any

from .answers import Answer, AnswerError, BusyError, FailedError, LateError, NoAnswerError, RefusedError, error_of
from .asking import Client
from .endpoints import OUTPUTS
from .metrics import Key, Metrics, read_metrics
from .results import FoundClass, Result
from .shared_memory import segment_shared
from .transport import Transport, connect, fetch

if TYPE_CHECKING:
    from .asynchronous import AsyncClient

__all__ = [
    "OUTPUTS",
    "Answer",
    "AnswerError",
    "AsyncClient",
    "BusyError",
    "Client",
    "FailedError",
    "FoundClass",
    "Key",
    "LateError",
    "Metrics",
    "NoAnswerError",
    "RefusedError",
    "Result",
    "Transport",
    "connect",
    "error_of",
    "fetch",
    "read_metrics",
    "segment_shared",
]


def __getattr__(name: str) -> Any:
    """asyncio when it is needed: probes that ask every few seconds should start fast."""
    if name != "AsyncClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .asynchronous import AsyncClient

    return AsyncClient
