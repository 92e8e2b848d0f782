"""Wrong answers are found out, each by its own name."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from handlers.client import Answer
from loadtest.masks import OK, MaskError, Reference, check_answer, read_mask
from loadtest.pictures import Item

LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
ITEM = Item("a", "png", b"", "image/png", (3, 4))


def encode(labels: np.ndarray, classes: int = 5) -> bytes:
    image = Image.fromarray(labels)
    image.putpalette([7] * 3 * classes)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def describe(labels: np.ndarray) -> bytes:
    ids, areas = np.unique(labels, return_counts=True)
    classes = [{"id": int(i), "area": int(area)} for i, area in zip(ids, areas, strict=True)]
    return json.dumps({"height": labels.shape[0], "width": labels.shape[1], "classes": classes}).encode()


REFERENCE = Reference(encode(LABELS))


def check(body: bytes, *, kind: str = "png", status: int = 200, least: float = 0.99) -> tuple[str, float | None]:
    return check_answer(replace(ITEM, kind=kind), Answer(status, body), REFERENCE, min_agreement=least)


def test_a_right_mask() -> None:
    assert check(encode(LABELS)) == (OK, 1.0)
    assert check(encode(LABELS, classes=6)) == (OK, 1.0)  # other bytes, same pixels
    assert check(describe(LABELS), kind="json") == (OK, 1.0)
    assert (read_mask(REFERENCE.png)[0] == LABELS).all()


def test_another_mask() -> None:
    other = LABELS.copy()
    other[0, :3] = 4
    assert check(encode(other)) == ("wrong: another mask", pytest.approx(0.75))
    assert check(encode(other), least=0.7) == (OK, pytest.approx(0.75))
    outcome, agreement = check(describe(other), kind="json")
    assert outcome == "wrong: another mask"
    assert agreement == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "not a PNG"),
        (encode(LABELS.T), "another size than the picture"),
        (encode(LABELS)[:-30], "a broken PNG"),
        (encode(LABELS, classes=3), "a class outside of the palette"),
    ],
)
def test_what_is_no_mask(body: bytes, told: str) -> None:
    assert check(body) == (f"wrong: {told}", None)


def test_a_picture_for_people_is_no_mask() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "PNG")
    with pytest.raises(MaskError, match="a PNG of mode RGB"):
        read_mask(buffer.getvalue())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not the JSON of a mask"),
        (b"[]", "not the JSON of a mask"),
        (describe(LABELS.T), "another size than the picture"),
        (describe(LABELS).replace(b'"area": 3', b'"area": 2'), "areas that do not fill the picture"),
    ],
)
def test_wrong_json(body: bytes, told: str) -> None:
    assert check(body, kind="json") == (f"wrong: {told}", None)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, b'{"error": "not a picture"}', OK),
        (413, b"", OK),
        (503, b"", "status 503"),
        (200, encode(LABELS), "wrong: status 200 for what is no picture"),
        (500, b"", "wrong: status 500 for what is no picture"),
        (400, b"Traceback (most recent call last)", "wrong: a traceback"),
    ],
)
def test_what_is_bad_has_to_be_refused(status: int, body: bytes, expected: str) -> None:
    assert check(body, kind="bad", status=status) == (expected, None)


def test_a_refused_picture_is_named_by_its_status() -> None:
    assert check(b"", status=503) == ("status 503", None)
