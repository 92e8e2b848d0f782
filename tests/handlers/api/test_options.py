"""Headers in, typed options out."""

import pytest

from handlers.api.formats import FORMATS, MASKS
from handlers.api.options import RequestOptions, negotiate, request_id_from
from handlers.errors import ErrorKind, ServingError

MASK_TYPES = tuple(FORMATS[name].media_types[0] for name in MASKS)
PNG, JSON, NPY = MASK_TYPES
VIEW_TYPES = ("image/png", "image/jpeg")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", PNG),
        ("", PNG),
        ("  ", PNG),
        ("image/*", PNG),
        ("application/*", JSON),
        ("application/json", JSON),
        ("application/x-npy", NPY),
        ("APPLICATION/JSON", JSON),
        ("application/json; charset=utf-8", JSON),
        ("application/json,application/x-npy", JSON),
        ("application/json;q=0.5, application/x-npy", NPY),
        ("application/json;q=0.5, application/x-npy;q=0.501", NPY),
        ("application/json ; q=1.000 , */* ; q=0.1", JSON),
        ("application/json;Q=0.2, application/x-npy;q=0.1", JSON),
        ("text/html, */*;q=0.1", PNG),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", PNG),
        ("image/png;q=0, */*", JSON),
        ("image/*;q=0, application/x-npy;q=0.1", NPY),
        ("*/*;q=0, application/x-npy", NPY),
        ("application/*;q=0.9, application/json;q=0.1", NPY),
        (", ,application/json,", JSON),
        ("application/json;q=2, application/x-npy;q=0.1", NPY),
        ("application/json;q=1.5, application/x-npy;q=0.1", NPY),
        ("application/json;q=-1, application/x-npy;q=0.1", NPY),
        ("application/json;q=nan, application/x-npy;q=0.1", NPY),
        ("application/json;q=1e9, application/x-npy;q=0.1", NPY),
        ("application/json;q=\u0661, application/x-npy;q=0.1", NPY),
        ("application/json;q=, application/x-npy;q=0.1", NPY),
        ("application/json;q=0.1234, application/x-npy;q=0.1", NPY),
    ],
)
def test_best_offer_wins(accept: str, expected: str) -> None:
    assert negotiate(accept, MASK_TYPES) == expected


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/gif, image/webp",
        "*/*;q=0",
        "image/png;q=0, application/json;q=0.000",
        "image/png;q=banana",
        ";;;q=x",
        ";",
        "/",
        "*",
        "image",
        "image/pn",
        "image/png/x",
        "\x00\x1b[31m",
        "é",
        "q=1",
        "a" * 100_000,
        "a/b;q=0.1," * 10_000,
    ],
    ids=lambda accept: repr(accept[:20]),
)
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(ServingError, match=r"^Accept: expected one of image/png, application/json") as caught:
        negotiate(accept, MASK_TYPES)
    assert caught.value.kind is ErrorKind.NOT_ACCEPTABLE
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    assert RequestOptions.from_headers({}, "id") == RequestOptions(request_id="id", format="png", media_type=PNG)


@pytest.mark.parametrize("view", ["overlay", "tokens", "confidence"])
def test_views_are_pictures(view: str) -> None:
    headers = {"x-mpm-view": view}
    assert RequestOptions.from_headers(headers, "id").format == view
    assert RequestOptions.from_headers(headers, "id").media_type == "image/png"
    assert RequestOptions.from_headers(headers | {"accept": "image/jpeg"}, "id").media_type == "image/jpeg"
    with pytest.raises(ServingError, match=f"expected one of {', '.join(VIEW_TYPES)}") as caught:
        RequestOptions.from_headers(headers | {"accept": "application/json"}, "id")
    assert caught.value.kind is ErrorKind.NOT_ACCEPTABLE


@pytest.mark.parametrize(
    "accept", ["image/png; form=grey", 'image/png;q=0.9;form="GREY"', "a/b, image/png ;form=grey"]
)
def test_plain_ids_by_accept(accept: str) -> None:
    options = RequestOptions.from_headers({"accept": accept}, "id")
    assert (options.format, options.media_type) == ("grey", "image/png")


def test_only_who_asks_for_plain_ids_gets_them() -> None:
    for accept in ("*/*", "image/*", "image/png", "image/png;level=1", "image/png, image/png;form=grey;q=0.5"):
        assert RequestOptions.from_headers({"accept": accept}, "id").format == "png"
    with pytest.raises(ServingError, match=r"Accept: expected one of .*image/png;form=grey, got 'image/png;form=rgb'"):
        RequestOptions.from_headers({"accept": "image/png;form=rgb"}, "id")


def test_a_mask_is_no_jpeg() -> None:
    with pytest.raises(ServingError):
        RequestOptions.from_headers({"accept": "image/jpeg"}, "id")


@pytest.mark.parametrize("view", ["", "mask", "Overlay", "overlay ", "overlay,tokens", "\x1b[31m", "x" * 10_000])
def test_unknown_view(view: str) -> None:
    with pytest.raises(ServingError, match="X-MPM-View: expected one of overlay, tokens, confidence") as caught:
        RequestOptions.from_headers({"x-mpm-view": view}, "id")
    assert caught.value.kind is ErrorKind.BAD_REQUEST
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("given", ["1", "abc", "A.b_c-d:9", "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "x" * 128])
def test_safe_request_ids_are_kept(given: str) -> None:
    assert request_id_from({"x-request-id": given}, default="own") == given


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "a\n", "a\r\nX-Evil: 1", "a\0", "é", "\u0661", '"', "{}", "a/b", "a,b", "\x1b[31m", "x" * 129],
    ids=repr,
)
def test_unsafe_request_ids_are_replaced(given: str) -> None:
    assert request_id_from({"x-request-id": given}, default="own") == "own"


def test_no_request_id() -> None:
    assert request_id_from({}, default="own") == "own"
