"""Decoding in processes of their own, with a budget of memory and time, for formats that bound neither.

A decoder that hangs, crashes or wants too much ends its process, and its picture is refused. Processes are started
when they are needed, kept for the next picture, and end when nobody asked for a while, or with their parent.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe

import numpy as np

from handlers.errors import ErrorKind, ServingError

from .containers import Header

BASE_BYTES = 96 * 2**20  # of a picture of no pixels: libraries and their buffers
_SECONDS, _SECONDS_PER_MEGAPIXEL = 5.0, 0.3  # of processor time
_INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")  # of the environment: no secrets
_PATIENCE = 3  # times as long by the clock


class _Process:
    """A process that decodes, one picture at a time."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        environment = {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "handlers.api.other_formats", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        finally:
            theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def decode(self, header: Header, max_bytes: int, seconds: float) -> tuple[np.ndarray, int]:
        """Pixels as they are stored, uint8 RGB, and their orientation."""
        timer = threading.Timer(_PATIENCE * seconds, self._process.kill)
        timer.start()
        try:
            fields = {name: getattr(header, name) for name in ("format", "width", "height", "orientation", "detail")}
            send_json(self._connection, {**fields, "max_bytes": max_bytes, "seconds": seconds})
            self._connection.send_bytes(header.profile)
            self._connection.send_bytes(header.data)
            reply = json.loads(self._connection.recv_bytes(10_000))
            if "error" in reply:
                raise ServingError(ErrorKind(reply["kind"]), reply["error"])
            height, width = int(reply["height"]), int(reply["width"])
            if height * width > header.width * header.height:
                raise OSError("more pixels than asked for")
            pixels = np.empty((height, width, 3), np.uint8)
            left = pixels.reshape(-1).data
            with open(self._connection.fileno(), "rb", buffering=0, closefd=False) as stream:  # received in place
                while left:
                    left = left[stream.readinto(left) or _no_more() :]
            return pixels, int(reply["orientation"])
        finally:
            timer.cancel()

    def end(self) -> int:
        """End it, and say with which status."""
        self._connection.close()
        try:
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _no_more() -> int:
    raise EOFError("the process ended")


_idle: "queue.LifoQueue[_Process]" = queue.LifoQueue()


def decode_apart(header: Header) -> tuple[np.ndarray, int]:
    """Decode a picture in a process of its own.

    Returns:
        uint8 RGB [H, W, 3] as stored, and its EXIF orientation.

    Raises:
        ServingError: broken, or too much.
    """
    pixels = header.num_pixels
    max_bytes = BASE_BYTES + header.decoding_bytes * pixels + 2 * len(header.data)
    seconds = _SECONDS + _SECONDS_PER_MEGAPIXEL * pixels / 1e6
    process, is_fresh = _take()
    try:
        found = process.decode(header, max_bytes, seconds)
    except ServingError:
        _idle.put(process)
        raise
    except BaseException as error:
        status = process.end()
        if status == 0 and not is_fresh and isinstance(error, OSError | EOFError):
            return decode_apart(header)  # nobody had asked it for a while, and it was ending
        size = f"{header.format} picture of {header.width}x{header.height} pixels"
        if -status in (signal.SIGKILL, signal.SIGXCPU):
            told = f"took longer than the {seconds:.0f} s that its size allows"
        else:
            told = "could not be decoded: it is broken, or takes more memory than its size allows"
        raise ServingError(ErrorKind.BAD_REQUEST, f"image: the {size} {told}") from error
    _idle.put(process)
    return found


def _take() -> tuple[_Process, bool]:
    """A process that waits, or a new one, and whether it is new."""
    while True:
        try:
            process = _idle.get_nowait()
        except queue.Empty:
            return _Process(), True
        if process.is_alive:
            return process, False
        process.end()


@atexit.register
def end_all() -> None:
    """End the processes that wait for pictures."""
    with contextlib.suppress(queue.Empty):
        while True:
            _idle.get_nowait().end()


def send_json(connection: Connection, values: object) -> None:
    connection.send_bytes(json.dumps(values).encode())
