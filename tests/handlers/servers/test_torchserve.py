"""A real TorchServe from outside: what clients send, by mistake and on purpose, and what they get."""

import http.client
import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from pycocotools import mask as coco

from handlers.api.decode import decode_image
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.launch.torchserve import TorchServe
from mpm_ops import Segmenter
from mpm_ops.classes import Classes, load_classes

pytest_plugins = ("tiny_server",)

Expect = Callable[[bytes], bytes]
TIMEOUT = 60


@pytest.fixture(autouse=True)
def _same_worker(server: TorchServe) -> Iterator[None]:
    """Nothing that a client sends may end the worker."""
    before = workers(server)
    yield
    assert workers(server) == before


def workers(server: TorchServe) -> list[int]:
    found = psutil.Process(server.pid).children(recursive=True)  # but for those that decode, which come and go
    return sorted(child.pid for child in found if "handlers.api.other_formats" not in child.cmdline())


@pytest.fixture
def url(server: TorchServe) -> str:
    return f"{server.url}/predictions/tiny"


@pytest.fixture
def jpeg(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(0), "image/jpeg")


@pytest.fixture(scope="module")
def expected_mask(model: Segmenter, classes: Classes) -> Expect:
    """The mask that the library gives for an encoded picture, alone and without a server."""

    def expect(data: bytes) -> bytes:
        image = decode_image(data, max_bytes=len(data), max_pixels=10**6)
        return encode_mask_png(model.segment(image), classes)

    return expect


def post(url: str, data: Any = None, **options: Any) -> requests.Response:
    return requests.post(url, data=data, timeout=TIMEOUT, **options)


def error_of(response: requests.Response) -> dict[str, Any]:
    """The fields of an error, which is one line of JSON."""
    assert response.headers["Content-Type"] == "application/json"
    assert response.content.count(b"\n") == 1
    told: dict[str, Any] = response.json()
    assert told["code"] == response.status_code
    assert told["request_id"] == response.headers["X-MPM-Request-Id"]
    return told


class TestAnswers:
    def test_mask(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        response = post(url, jpeg, headers={"Content-Type": "image/jpeg"})
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "image/png"
        assert response.content == expected_mask(jpeg)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (128, 128), (61, 67), (90, 300), (401, 99)])
    def test_mask_of_any_size(
        self, url: str, photo: Callable[..., np.ndarray], expected_mask: Expect, height: int, width: int
    ) -> None:
        picture = encode_picture(photo(1, height, width), "image/png")
        mask = post(url, picture).content
        assert Image.open(io.BytesIO(mask)).size == (width, height)
        assert mask == expected_mask(picture)

    @pytest.mark.parametrize("file_format", ["AVIF", "BMP", "GIF", "JPEG2000", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("content_type", ["image/jpeg", "text/plain", "application/json", "nonsense", None])
    def test_the_content_decides_not_its_label(
        self,
        url: str,
        photo: Callable[..., np.ndarray],
        expected_mask: Expect,
        file_format: str,
        content_type: str | None,
    ) -> None:
        buffer = io.BytesIO()
        Image.fromarray(photo(2, 40, 40)).save(buffer, file_format)
        response = post(url, buffer.getvalue(), headers={"Content-Type": content_type})
        assert response.content == expected_mask(buffer.getvalue())

    def test_npy(self, url: str, jpeg: bytes, model: Segmenter) -> None:
        response = post(url, jpeg, headers={"Accept": "application/x-npy"})
        assert response.headers["Content-Type"] == "application/x-npy"
        image = decode_image(jpeg, max_bytes=len(jpeg), max_pixels=10**6)
        np.testing.assert_array_equal(np.load(io.BytesIO(response.content)), model.segment(image))

    def test_json(self, url: str, jpeg: bytes, model: Segmenter, classes: Classes) -> None:
        response = post(url, jpeg, headers={"Accept": "application/json", "X-Request-Id": "json-1"})
        assert response.headers["Content-Type"] == "application/json"
        told = response.json()
        assert (told["height"], told["width"], told["request_id"]) == (96, 128, "json-1")
        assert all(milliseconds >= 0 for milliseconds in told["timings_ms"].values())
        labels = np.full((96, 128), 255, np.uint8)
        for described in told["classes"]:
            assert described["name"] == classes.names[described["id"]]
            labels[coco.decode(described["rle"]).astype(bool)] = described["id"]
        np.testing.assert_array_equal(labels, model.segment(decode_image(jpeg, max_bytes=10**6, max_pixels=10**6)))
        for steps in told["tokens_per_window"]:
            assert steps[0] == 64
            assert steps == sorted(steps, reverse=True)

    @pytest.mark.parametrize("media_type", ["image/png", "image/jpeg"])
    @pytest.mark.parametrize("view", ["overlay", "tokens", "confidence"])
    def test_views(
        self, url: str, photo: Callable[..., np.ndarray], model: Segmenter, view: str, media_type: str
    ) -> None:
        picture = encode_picture(photo(3, 230, 310), "image/png")
        response = post(url, picture, headers={"X-MPM-View": view, "Accept": media_type})
        assert response.headers["Content-Type"] == media_type
        image = Image.open(io.BytesIO(response.content))
        assert (image.format, image.mode, image.size) == (media_type[6:].upper(), "RGB", (310, 230))

    def test_headers(self, url: str, jpeg: bytes) -> None:
        headers = post(url, jpeg).headers
        timings = {}
        for metric in headers["Server-Timing"].split(", "):
            found = re.fullmatch(r"([a-z]+);dur=(\d+\.\d+)", metric)
            assert found, metric
            timings[found[1]] = float(found[2])
        assert {"decode", "queue", "merge", "compute", "encode", "total"} <= timings.keys()
        assert timings["total"] >= timings["compute"]
        counts = re.fullmatch(r"in=(\d+), out=(\d+)", headers["X-MPM-Tokens"])
        assert counts
        assert int(counts[1]) % 64 == 0
        assert 0 < int(counts[2]) < int(counts[1])

    def test_request_id_is_echoed_and_logged(self, url: str, jpeg: bytes, server: TorchServe) -> None:
        assert post(url, jpeg, headers={"X-Request-Id": "find-me:1"}).headers["X-MPM-Request-Id"] == "find-me:1"
        refused = post(url, b"junk", headers={"X-Request-Id": "find-me:2"})
        assert error_of(refused)["request_id"] == "find-me:2"
        assert [(line["code"], "error" in line) for line in logged(server, "find-me:1")] == [(200, False)]
        assert [(line["code"], "error" in line) for line in logged(server, "find-me:2")] == [(400, True)]

    def test_unsafe_request_id_is_replaced(self, url: str, jpeg: bytes) -> None:
        given = post(url, jpeg, headers={"X-Request-Id": "a b"}).headers["X-MPM-Request-Id"]
        assert re.fullmatch(r"[0-9a-f-]{36}", given)

    def test_one_connection_for_good_and_bad(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        with requests.Session() as session:
            for data, status in ((jpeg, 200), (b"junk", 400), (jpeg, 200), (b"", 400), (jpeg, 200)):
                response = session.post(url, data=data, timeout=TIMEOUT)
                assert response.status_code == status
                assert (response.content == expected_mask(jpeg)) == (status == 200)

    def test_chunked_upload(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        pieces = (jpeg[i : i + 1000] for i in range(0, len(jpeg), 1000))
        assert post(url, pieces).content == expected_mask(jpeg)

    def test_demo_model_beside_it(
        self, server: TorchServe, demo_checkpoint: Path, demo_model: Segmenter, photo: Callable[..., np.ndarray]
    ) -> None:
        picture = encode_picture(photo(4, 180, 240), "image/png")
        classes = load_classes(demo_checkpoint.parent, demo_model.config.n_cls)
        image = decode_image(picture, max_bytes=len(picture), max_pixels=10**6)
        answer = post(f"{server.url}/predictions/demo", picture).content
        assert answer == encode_mask_png(demo_model.segment(image), classes)


class TestMultipart:
    @pytest.mark.parametrize("name", ["image", "data", "body"])
    def test_picture_part(self, url: str, jpeg: bytes, expected_mask: Expect, name: str) -> None:
        assert post(url, files={name: ("photo.jpg", jpeg, "image/jpeg")}).content == expected_mask(jpeg)

    def test_without_a_file_name(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        assert post(url, files={"image": (None, jpeg)}).content == expected_mask(jpeg)

    def test_without_a_picture(self, url: str, jpeg: bytes) -> None:
        told = error_of(post(url, files={"picture": jpeg, "photo": jpeg}))
        assert told["code"] == 400
        assert "form part 'image', got 'photo', 'picture'" in told["error"]

    def test_without_any_part(self, url: str) -> None:
        response = post(url, b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert "got no part" in error_of(response)["error"]

    def test_cut_off(self, url: str, jpeg: bytes) -> None:
        form = part("image", jpeg) + b"--x--\r\n"
        response = post(url, form[:-40], headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert error_of(response)["code"] == 400

    def test_last_of_duplicate_parts_counts(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        assert post(url, files=[("image", b"first"), ("image", jpeg)]).content == expected_mask(jpeg)
        assert post(url, files=[("image", jpeg), ("image", b"last")]).status_code == 400

    @pytest.mark.parametrize("name", ["Accept", "accept", "X-MPM-View", "X-Request-Id", "content-type"])
    def test_part_named_like_a_header(self, url: str, jpeg: bytes, expected_mask: Expect, name: str) -> None:
        response = post(url, files={name: ("a", b"application/json", "application/json"), "image": jpeg})
        assert response.content == expected_mask(jpeg)

    @pytest.mark.parametrize(
        "file_name",
        [
            b"../../etc/passwd",
            b"a\nX-Evil: 1",
            b"a\0b",
            b"\xe9\xff",
            "é".encode(),
            b"a" * 20_000,
            b"a; name=body",
            b"",
        ],
        ids=lambda name: repr(name[:12]),
    )
    def test_hostile_file_name(self, url: str, jpeg: bytes, expected_mask: Expect, file_name: bytes) -> None:
        form = part("image", jpeg, file_name) + b"--x--\r\n"
        response = post(url, form, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert response.content == expected_mask(jpeg)
        assert "X-Evil" not in response.headers

    @pytest.mark.parametrize("name", ["é", "n" * 3000, " ", "a\tb", "__proto__"], ids=lambda name: repr(name[:9]))
    def test_odd_part_names(self, url: str, jpeg: bytes, expected_mask: Expect, name: str) -> None:
        form = part(name, b"x") + part("image", jpeg) + b"--x--\r\n"
        response = post(url, form, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert response.status_code in (200, 500)  # TorchServe's own parser refuses some
        if response.status_code == 200:
            assert response.content == expected_mask(jpeg)

    def test_many_parts(self, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        parts = [(f"part{i}", b"x") for i in range(500)]
        assert post(url, files=[*parts, ("image", jpeg)]).content == expected_mask(jpeg)


def part(name: str, data: bytes, file_name: bytes = b"photo.jpg") -> bytes:
    head = b'Content-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n' % (name.encode(), file_name)
    return b"--x\r\n" + head + data + b"\r\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "content_type"),
        [
            (b"hello", "text/plain"),
            (b"\xff\xfe\x00", "text/plain"),
            (b"<!doctype html><html></html>", "text/html"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
            (b'{"image": "aGVsbG8="}', "application/json"),
            (b'"\\ud800"', "application/json"),
            (b"[" * 100_000, "application/json"),
            (b"null", "application/json"),
            (b"{", "application/json"),
            (b"PK\x03\x04" + bytes(200), "application/zip"),
            (b"", "image/jpeg"),
            (b"\xff\xd8\xff", "image/jpeg"),
            (b"RIFF\x04\0\0\0WEBP", "image/webp"),
        ],
        ids=lambda value: repr(value[:12]),
    )
    def test_no_picture(self, url: str, data: bytes, content_type: str) -> None:
        told = error_of(post(url, data, headers={"Content-Type": content_type}))
        assert told["code"] == 400
        assert told["error"].startswith("image: ")

    def test_truncated_pictures(self, url: str, photo: Callable[..., np.ndarray]) -> None:
        for media_type in ("image/jpeg", "image/png"):
            picture = encode_picture(photo(5), media_type)
            for length in (20, 200, len(picture) // 2):
                assert error_of(post(url, picture[:length]))["code"] == 400

    def test_huge_picture_in_a_few_bytes(self, url: str) -> None:
        header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        told = error_of(post(url, bomb + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))))
        assert told["code"] == 413
        assert "50000x50000" in told["error"]

    def test_elongated_picture_that_needs_too_many_windows(self, url: str) -> None:
        told = error_of(post(url, encode_picture(np.zeros((1, 20_000, 3), np.uint8), "image/png")))
        assert told["code"] == 413
        assert "windows" in told["error"]

    def test_large_junk(self, url: str) -> None:
        assert error_of(post(url, b"j" * 20_000_000))["code"] == 400

    def test_over_the_limit_of_the_model(self, url: str, max_image_bytes: int) -> None:
        told = error_of(post(url, bytes(max_image_bytes + 1)))
        assert told["code"] == 413
        assert str(max_image_bytes) in told["error"]

    def test_over_the_limit_of_torchserve(self, server: TorchServe) -> None:
        """Refused by the announced length, before any body; TorchServe says nothing more."""
        status, body = send(server, request(b"", headers=[b"Content-Length: 90000000"], length=False))
        assert (status, body) == (413, b"")

    @pytest.mark.parametrize("accept", ["text/html", "image/webp", "*/*;q=0", ";;;q=x", "x" * 4000])
    def test_unacceptable(self, url: str, jpeg: bytes, accept: str) -> None:
        told = error_of(post(url, jpeg, headers={"Accept": accept}))
        assert told["code"] == 406
        assert "application/x-npy" in told["error"]

    @pytest.mark.parametrize("view", ["Overlay", "mask", "../x", "é".encode()])
    def test_unknown_view(self, url: str, jpeg: bytes, view: str | bytes) -> None:
        told = error_of(post(url, jpeg, headers={"X-MPM-View": view}))
        assert told["code"] == 400
        assert "overlay, tokens, confidence" in told["error"]

    def test_unknown_model(self, server: TorchServe, jpeg: bytes) -> None:
        for name in ("nope", "tiny2", "tin", "%2e%2e%2ftiny"):
            assert post(f"{server.url}/predictions/{name}", jpeg).status_code == 404

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "BREW"])
    def test_other_methods_want_a_picture_too(self, url: str, method: str) -> None:
        """TorchServe hands over every method but OPTIONS."""
        assert error_of(requests.request(method, url, timeout=TIMEOUT))["code"] == 400

    def test_form_encoding_that_curl_sends_by_default(self, url: str, jpeg: bytes) -> None:
        """TorchServe parses the picture as a form and fails itself; the picture needs another content type."""
        response = post(url, jpeg, headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert response.status_code == 500

    def test_models_cannot_be_managed_where_pictures_are_posted(self, server: TorchServe) -> None:
        response = requests.post(f"{server.url}/models", params={"url": "http://x/y.mar"}, timeout=TIMEOUT)
        assert response.status_code in (404, 405)
        management = f"http://127.0.0.1:{server.management_port}/models"
        assert requests.post(management, params={"url": "http://x/y.mar"}, timeout=TIMEOUT).status_code == 405


class TestRawHeaders:
    @pytest.mark.parametrize(
        "lines",
        [
            [b"X-Request-Id: caf\xe9"],
            [b"X-Anything: " + bytes(range(128, 256))],
            [b"Accept: \xff\xfe"],
            [b"X-MPM-View: \xc3\x28"],
            [b"Content-Type: image/\xe9"],
            [b"X-Anything: a\0b"],
            [b"X-Request-Id: a\rX-Evil: 1"],
            [b"X-Request-Id: a\r\n X-Evil: 1"],
            [b"X-Anything: " + b"a" * 7000],
            [b"X-Anything: " + b"a" * 70_000],
            [b"X-%d: 1" % i for i in range(300)],
            [b"Accept: application/json", b"Accept: application/x-npy"],
            [b"Accept:"],
            [b": empty"],
            [b"X-F\xe9: 1"],
            [b"no colon"],
            [b"Content-Encoding: gzip"],
            [b"Expect: 100-continue"],
            [b"explain: True"],
        ],
        ids=lambda lines: repr(lines[0][:24]),
    )
    def test_served_or_refused(self, server: TorchServe, jpeg: bytes, lines: list[bytes]) -> None:
        status, body = send(server, request(jpeg, headers=lines))
        assert status in (200, 400, 406)
        assert body

    def test_header_in_latin_1_is_no_hindrance(self, server: TorchServe, jpeg: bytes, expected_mask: Expect) -> None:
        headers = [b"X-Request-Id: caf\xe9", b"User-Agent: " + bytes(range(160, 256))]
        assert send(server, request(jpeg, headers=headers)) == (200, expected_mask(jpeg))

    @pytest.mark.parametrize("data", [b"\0\1\2 junk\r\n\r\n", b"GET /ping\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"])
    def test_no_http(self, server: TorchServe, data: bytes) -> None:
        assert send(server, data)[0] in (400, 404, 405)


class TestMany:
    @pytest.mark.parametrize("name", ["tiny"])
    def test_good_and_bad_at_once(
        self, server: TorchServe, name: str, photo: Callable[..., np.ndarray], expected_mask: Expect
    ) -> None:
        url = f"{server.url}/predictions/{name}"
        good = {}
        for i in range(18):
            height, width = [(96, 128), (40, 40), (60, 150), (150, 50), (128, 128), (1, 1)][i % 6]
            good[f"good-{i}"] = encode_picture(photo(i, height, width), ("image/png", "image/jpeg")[i % 2])
        bad = {f"bad-{i}": [b"junk", b"", good["good-0"][:300], b"\xff\xd8\xff"][i % 4] for i in range(12)}
        order = [name for pair in zip(good, [*bad, *[None] * 6], strict=True) for name in pair if name]

        with ThreadPoolExecutor(len(order)) as clients:
            pictures = good | bad
            responses = dict(
                zip(
                    order,
                    clients.map(lambda name: post(url, pictures[name], headers={"X-Request-Id": name}), order),
                    strict=True,
                )
            )
        assert {name: response.headers["X-MPM-Request-Id"] for name, response in responses.items()} == {
            name: name for name in order
        }
        for name, picture in good.items():
            assert responses[name].status_code == 200, name
            assert responses[name].content == expected_mask(picture), name
        for name, data in bad.items():
            told = error_of(responses[name])
            assert told["code"] == 400
            assert ("empty body" in told["error"]) == (data == b"")

    def test_more_than_it_can_take(
        self, server: TorchServe, photo: Callable[..., np.ndarray], expected_mask: Expect
    ) -> None:
        """The engine refuses before TorchServe's own queue does, which would not say when to come back."""
        url = f"{server.url}/predictions/tiny_busy"
        picture = encode_picture(photo(6, 90, 400), "image/png")
        with ThreadPoolExecutor(64) as clients:
            responses = list(clients.map(lambda _: post(url, picture), range(160)))
        served = [response for response in responses if response.status_code == 200]
        refused = [response for response in responses if response.status_code == 503]
        assert served
        assert refused
        assert len(served) + len(refused) == len(responses)
        assert {response.content for response in served} == {expected_mask(picture)}
        for response in refused:
            assert int(response.headers["Retry-After"]) >= 1
            assert "tokens are in flight" in error_of(response)["error"]

    def test_clients_that_leave(self, server: TorchServe, url: str, jpeg: bytes, expected_mask: Expect) -> None:
        sent = request(jpeg)
        for length, abruptly in ((60, False), (len(sent) // 2, False), (len(sent), False), (len(sent), True)):
            with connect(server) as connection:
                connection.sendall(sent[:length])
                if abruptly:  # a reset instead of an orderly end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert post(url, jpeg).content == expected_mask(jpeg)


def logged(server: TorchServe, request_id: str) -> list[dict[str, Any]]:
    """Log lines of a request; they may come after its answer."""
    assert server.log
    for _ in range(100):
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if f'"{request_id}"' in line]
        if lines:
            return lines
        time.sleep(0.1)
    return []


def request(data: bytes, *, headers: Sequence[bytes] = (), length: bool = True) -> bytes:
    lines = [b"POST /predictions/tiny HTTP/1.1", b"Host: x", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(data))
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def connect(server: TorchServe) -> socket.socket:
    return socket.create_connection((server.host, server.port), TIMEOUT)


def send(server: TorchServe, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to raw bytes."""
    with connect(server) as connection:
        connection.sendall(data)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            return response.status, response.read()
