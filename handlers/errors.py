"""What can go wrong with a request, and how each server says it."""

import json
from enum import Enum


class ErrorKind(Enum):
    """Kinds of failure, each with its HTTP status and its code in Triton, which knows fewer."""

    BAD_REQUEST = 400
    NOT_FOUND = 404
    METHOD = 405
    NOT_ACCEPTABLE = 406
    SLOW = 408
    TOO_LARGE = 413
    MEDIA_TYPE = 415
    HEADERS = 431
    INTERNAL = 500
    OVERLOADED = 503
    DEADLINE = 504

    @classmethod
    def of_status(cls, status: int) -> "ErrorKind":
        """The kind that a status of HTTP stands for, or the nearest."""
        try:
            return cls(status)
        except ValueError:
            if status == 507:  # TorchServe: bodies on their way in are too many
                return cls.OVERLOADED
            return cls.BAD_REQUEST if 400 <= status < 500 else cls.INTERNAL

    @property
    def http_status(self) -> int:
        return self.value

    @property
    def triton_code(self) -> str:
        """Name of the code in `TritonError`; Triton's HTTP makes it 400, 500 or 503."""
        if self.value < 500:
            return "INVALID_ARG"
        return "INTERNAL" if self is ErrorKind.INTERNAL else "UNAVAILABLE"


class ServingError(Exception):
    """A request's own failure, told to its client; never a reason to fail its neighbours.

    Attributes:
        kind: what went wrong.
        retry_after: seconds after which trying again is worth it, where that is known.
    """

    def __init__(self, kind: ErrorKind, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    def of_picture(self, index: int, num_pictures: int) -> "ServingError":
        """The error with the picture's place, where there are several."""
        if num_pictures == 1:
            return self
        return ServingError(self.kind, f"picture {index} of {num_pictures}: {self}", retry_after=self.retry_after)

    def body(self, request_id: str) -> bytes:
        """One line of JSON."""
        fields = {"code": self.kind.http_status, "error": str(self), "request_id": request_id}
        return json.dumps(fields).encode() + b"\n"
