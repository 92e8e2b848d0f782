"""Raw frames in, pixels out, or a reason."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from handlers.api.decode import decode_image, read_picture
from handlers.errors import ErrorKind, ServingError

LIMITS = {"max_bytes": 10**6, "max_pixels": 10**5}


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version=version)
    return file.getvalue()


def header(text: str, pixels: int = 12) -> bytes:
    """A NumPy file with any text for a header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(pixels)


def refused(data: bytes, **limits: int) -> ServingError:
    errors = []
    for read in (read_picture, decode_image):
        with pytest.raises(ServingError) as caught:
            read(data, **(LIMITS | limits))
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert len(str(errors[0])) <= 200
    return errors[0]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (61, 67)])
def test_pixels_come_through(version: tuple[int, int], kind: type, height: int, width: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = kind(npy(frame, version))
    assert read_picture(data, **LIMITS).size == (height, width)
    np.testing.assert_array_equal(decode_image(data, **LIMITS), frame)


def test_a_buffer_that_its_owner_uses_again() -> None:
    data = bytearray(npy(np.full((2, 2, 3), 7, np.uint8)))
    image = decode_image(data, **LIMITS)
    data[:] = bytes(len(data))
    assert (image == 7).all()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((2, 2, 3), np.float32), "got '<f4' [2, 2, 3]"),
        (np.zeros((2, 2, 3), np.int8), "got '|i1' [2, 2, 3]"),
        (np.zeros((2, 2), np.uint8), "got '|u1' [2, 2]"),
        (np.zeros((2, 2, 4), np.uint8), "got '|u1' [2, 2, 4]"),
        (np.zeros((3, 2, 2), np.uint8), "got '|u1' [3, 2, 2]"),
        (np.zeros((1, 2, 2, 3), np.uint8), "got '|u1' [1, 2, 2, 3]"),
        (np.zeros((0, 2, 3), np.uint8), "got '|u1' [0, 2, 3]"),
        (np.asfortranarray(np.zeros((4, 5, 3), np.uint8)), "got '|u1' [4, 5, 3] in Fortran order"),
    ],
)
def test_other_arrays(array: np.ndarray, told: str) -> None:
    error = refused(npy(array))
    assert error.kind is ErrorKind.BAD_REQUEST
    assert str(error) == f"image: expected a .npy frame of uint8 [H, W, 3] in C order, {told}"


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"\x93NUMPY\x01\x00\xff\xff",
        header(""),
        header("{}"),
        header("(" * 5000),
        header("[" * 60_000),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, -3)}")[:-20],
        header("{'descr': '|O', 'fortran_order': False, 'shape': 7}"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (1e9, 1, 3)}"),
        header("__import__('os').getpid()"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 3), }"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 9999999999999, 3), }"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 9000 + ", 3), }"),
        npy(np.zeros((2, 2, 3), [("a", "u1")])),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_broken_headers(data: bytes) -> None:
    error = refused(data)
    assert error.kind is ErrorKind.BAD_REQUEST
    assert str(error) == "image: the header of the .npy frame is broken"


def test_pickles_stay_closed() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "expected a .npy frame of uint8" in str(refused(file.getvalue()))


def test_many_threads_at_once() -> None:
    """Python 3.11 parses Python in threads with occasional errors, so headers must not be parsed as such."""
    data = npy(np.zeros((2, 2, 3), np.uint8))
    with ThreadPoolExecutor(16) as threads:
        sizes = list(threads.map(lambda _: read_picture(data, **LIMITS).size, range(20_000)))
    assert set(sizes) == {(2, 2)}


@pytest.mark.parametrize("change", [-1, 1, -12])
def test_another_number_of_pixels(change: int) -> None:
    data = npy(np.zeros((2, 2, 3), np.uint8))
    data = data[:change] if change < 0 else data + b"x"
    assert str(refused(data)) == f"image: expected 12 bytes of pixels for a .npy frame of 2x2, got {12 + change}"


def test_limits() -> None:
    data = npy(np.zeros((20, 30, 3), np.uint8))
    error = refused(data, max_bytes=100)
    assert error.kind is ErrorKind.TOO_LARGE
    assert str(error) == f"image: expected at most 100 bytes, got {len(data)}"
    error = refused(data, max_pixels=599)
    assert error.kind is ErrorKind.TOO_LARGE
    assert str(error) == "image: expected at most 599 pixels, got 30x20 = 600"
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }"
    assert refused(header(text)).kind is ErrorKind.TOO_LARGE  # by its header
