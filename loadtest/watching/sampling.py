"""Readings on the time axis of a run, from a thread."""

import threading
import time
from collections.abc import Callable
from typing import Generic, Self, TypeVar

Reading = TypeVar("Reading")


class Sampler(Generic[Reading]):
    """Reads again and again; a context manager. What can't be read is left out and counted.

    Args:
        read: raises OSError or ValueError where it can't; None to read nothing.
        seconds: between two readings.
    """

    def __init__(self, read: Callable[[], Reading] | None, seconds: float = 1.0) -> None:
        self.samples: list[Reading] = []
        self.num_missed = 0
        self._read = read
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        if self._read:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._read:
            self._thread.join()

    def _run(self) -> None:
        assert self._read
        while True:
            began = time.monotonic()
            try:
                self.samples.append(self._read())
            except (OSError, ValueError):
                self.num_missed += 1
            if self._stopped.is_set():
                return
            self._stopped.wait(max(0.0, began + self._seconds - time.monotonic()))  # once more after the end
