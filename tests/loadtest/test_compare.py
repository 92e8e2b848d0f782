"""Two deployments held against each other: small servers that misbehave on demand, and the real ones."""

import io
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.api.formats.views import encode_picture
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from loadtest.__main__ import main
from loadtest.compare import Deployment, judge, parse_limits

pytest_plugins = ("tiny_server",)

PALETTE = [200, 0, 0, 0, 200, 0, 0, 0, 200]
SIZE = (40, 60)  # of pictures: height, width

Reply = tuple[int, bytes]


class FakeServer:
    """Answers with what `reply` makes of the picture's number, as TorchServe or as Triton would; a context manager."""

    def __init__(self, reply: Callable[[int], Reply], *, delay_seconds: float = 0.0) -> None:
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.asked: list[tuple[float, int]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                picture = self.rfile.read(int(self.headers["Content-Length"]))
                number = int(np.asarray(Image.open(io.BytesIO(picture)))[0, 0, 0])
                fake.asked.append((time.monotonic(), number))
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                fake.paths.append(self.path)
                time.sleep(delay_seconds)
                status, body = reply(number)
                self.send_response(status)
                if self.path.startswith("/v2/") and status == 200:
                    described = b'{"outputs": []}'
                    body = described + struct.pack("<I", len(body)) + body
                    self.send_header("Inference-Header-Content-Length", str(len(described)))
                self.send_header("Content-Length", str(len(body)))
                with suppress(BrokenPipeError):  # who didn't wait
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pictures; the red of the first pixel is a picture's number."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        pixels[0, 0, 0] = number
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command; gives its exit status and what it wrote."""

    def run(old: str, new: str, *options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        arguments = ["--old", old, "--new", new, "--images", str(images), "--out", str(out), *options]
        status = main(["compare", *arguments])
        return status, json.loads(out.read_text()) if out.is_file() else {}

    return run


def png(labels: np.ndarray) -> bytes:
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def halves(number: int) -> Reply:
    """Class 0 above, class 1 below."""
    labels = np.zeros(SIZE)
    labels[20:] = 1
    return 200, png(labels)


def half_changed(number: int) -> Reply:
    """The same but for picture 2, where a quarter of class 1 is class 2."""
    labels = np.zeros(SIZE)
    labels[20:] = 1
    if number == 2:
        labels[20:25] = 2
    return 200, png(labels)


@pytest.fixture
def old() -> Iterator[FakeServer]:
    with FakeServer(halves) as server:
        yield server


def torchserve(server: FakeServer) -> str:
    return f"{server.url}/predictions/tiny"


def triton(server: FakeServer) -> str:
    return f"{server.url}/v2/models/tiny/versions/2"


class TestMasks:
    def test_pixels_classes_and_the_worst_picture(
        self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with FakeServer(half_changed) as new:
            status, written = run(torchserve(old), triton(new))
        assert status == 0
        summary = written["summary"]
        assert summary["agreement"] == pytest.approx(1 - 5 / (4 * 40))
        assert summary["worst_agreement"] == pytest.approx(1 - 5 / 40)
        assert (summary["compared"], summary["answers"], summary["errors"]) == (4, 12, 0)
        by_class = {row["class"]: row for row in summary["classes"]}
        assert by_class[0]["overlap"] == 1
        assert by_class[1]["old_pixels"] == 4 * 20 * 60
        assert by_class[1]["new_pixels"] == by_class[1]["old_pixels"] - 5 * 60
        assert (by_class[2]["old_pixels"], by_class[2]["overlap"]) == (0, 0)
        printed = capsys.readouterr().out
        assert "worst    0.875000  2.png" in printed

    def test_limits_decide_the_status(
        self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with FakeServer(half_changed) as new:
            assert run(torchserve(old), triton(new), "--limit", "agreement=0.96,errors=0")[0] == 0
            status, written = run(torchserve(old), triton(new), "--limit", "agreement=0.96,worst_agreement=0.9")
        assert status == 1
        assert [(limit["name"], limit["holds"]) for limit in written["limits"]] == [
            ("agreement", True),
            ("worst_agreement", False),
        ]
        assert "limit    worst_agreement 0.9: 0.875, DOES NOT HOLD" in capsys.readouterr().out

    def test_pictures_of_the_worst(
        self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path
    ) -> None:
        with FakeServer(half_changed) as new:
            run(torchserve(old), triton(new), "--pictures", str(tmp_path / "worst"))
        (drawn,) = (tmp_path / "worst").iterdir()
        assert drawn.name == "01-0.8750-2.png"
        panels = np.asarray(Image.open(drawn)).reshape(SIZE[0], 4, SIZE[1], 3).swapaxes(0, 1)
        assert panels[0, 30, 30].tolist() == [90, 90, 90]
        assert panels[1, 22, 30].tolist() == [0, 200, 0]
        assert panels[2, 22, 30].tolist() == [0, 0, 200]
        red = (panels[3] == [255, 0, 0]).all(axis=-1)
        assert red[20:25].all()
        assert red.sum() == 5 * 60


class TestTime:
    def test_quantiles(self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]]) -> None:
        """A pause of known length is in every latency of the one that pauses, and ratios are of all answers."""
        with FakeServer(halves, delay_seconds=0.1) as new:
            _, written = run(torchserve(old), torchserve(new))
        ms = {role: [t for picture in written["pictures"] for t in picture[f"{role}_ms"]] for role in ("old", "new")}
        assert min(ms["new"]) >= 100
        for q in (50, 99):
            ratio = np.percentile(ms["new"], q) / np.percentile(ms["old"], q)
            assert written["summary"][f"p{q}_ratio"] == pytest.approx(ratio, rel=1e-6)

    def test_turns_are_taken(self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]]) -> None:
        with FakeServer(halves) as new:
            run(torchserve(old), torchserve(new), "--repeats", "2")
            asked = sorted([(*ask, "old") for ask in old.asked] + [(*ask, "new") for ask in new.asked])
        told = [(number, who) for _, number, who in asked]
        first, second = [(0, "old"), (0, "new")], [(1, "new"), (1, "old")]
        assert told[2:10] == [*first, *reversed(first), *second, *reversed(second)]

    def test_one_request_at_a_time_over_one_connection(
        self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]]
    ) -> None:
        options = ["--header", "X-API-Key:secret", "--new-header", "X-MPM-Schedule: off"]
        with FakeServer(halves) as new:
            _, written = run(torchserve(old), triton(new), *options, "--sample", "2")
        assert len(old.asked) == len(new.asked) == 1 + 2 * 3
        assert set(new.paths) == {"/v2/models/tiny/versions/2/infer"}
        assert {headers["x-api-key"] for headers in old.headers + new.headers} == {"secret"}
        assert {headers.get("x-mpm-schedule") for headers in old.headers} == {None}
        assert {headers.get("x-mpm-schedule") for headers in new.headers} == {"off"}
        assert "secret" not in json.dumps(written)


class TestFailures:
    """What a deployment does wrong is told, counted and limited; it never ends the comparison."""

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            ((503, b'{"error": "overloaded"}'), 'status 503: {"error": "overloaded"}'),
            ((200, b"junk"), "expected a mask, got not a PNG: b'junk'"),
            ((200, png(np.zeros(SIZE))[:60]), "expected a mask, got a broken PNG: "),
            ((200, encode_picture(np.zeros((*SIZE, 3), np.uint8), "image/png")), "got a PNG of mode RGB"),
            ((200, png(np.zeros((10, 20)))), "a mask of another size: old 60x40, new 20x10"),
        ],
    )
    def test_one_picture(
        self,
        reply: Reply,
        message: str,
        old: FakeServer,
        run: Callable[..., tuple[int, dict[str, Any]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with FakeServer(lambda number: reply if number == 1 else halves(number)) as new:
            status, written = run(torchserve(old), torchserve(new), "--limit", "errors=0")
        assert status == 1
        assert written["summary"] | {"compared": 3, "errors": 1, "agreement": 1.0} == written["summary"]
        assert message in written["pictures"][1]["new_error"]
        assert "failed   1.png: new: " in capsys.readouterr().out

    def test_what_both_refuse_is_no_error_of_the_new_one(
        self, run: Callable[..., tuple[int, dict[str, Any]]], old: FakeServer
    ) -> None:
        def picky(number: int) -> Reply:
            return (400, b"no picture") if number == 3 else halves(number)

        with FakeServer(picky) as one, FakeServer(picky) as other:
            status, written = run(torchserve(one), torchserve(other), "--limit", "errors=0")
            assert status == 0
            assert (written["summary"]["errors"], written["summary"]["errors_of_both"]) == (0, 1)
            assert run(torchserve(one), torchserve(old), "--limit", "errors=0")[1]["summary"]["errors_of_old"] == 1

    def test_no_answer_in_time(self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]]) -> None:
        ended = threading.Event()

        def late(number: int) -> Reply:
            if number == 2:
                ended.wait(60)
            return halves(number)

        with FakeServer(late) as new:
            status, written = run(torchserve(old), torchserve(new), "--timeout", "1", "--repeats", "1")
            ended.set()
        assert status == 0
        assert written["pictures"][2]["new_error"] == "no answer within 1 s"
        assert [picture["agreement"] for picture in written["pictures"]] == [1.0, 1.0, None, 1.0]

    def test_nobody_there(
        self, old: FakeServer, run: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with FakeServer(halves) as gone:
            pass
        status, _ = run(torchserve(old), torchserve(gone))
        assert status == 2
        assert capsys.readouterr().err.startswith("no picture could be compared; 0.png: old answered; new no answer: ")


class TestRefusals:
    @pytest.mark.parametrize(
        "url",
        [
            "127.0.0.1:8080/predictions/tiny",
            "http://127.0.0.1:8080",
            "http://127.0.0.1:8080/predictions/",
            "http://127.0.0.1:port/predictions/tiny",
            "http:///predictions/tiny",
            "ftp://127.0.0.1/predictions/tiny",
            "http://127.0.0.1:8080/predictions/tiny?a=b",
        ],
    )
    def test_urls(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"^new: url: expected http"):
            Deployment.connect("new", url, [], 1)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("speed=3", "limit: expected NAME=NUMBER with a name of agreement, .* got speed=3"),
            ("agreement", "limit: expected NAME=VALUE, .* got 'agreement'"),
            ("errors=none", "limit: errors: expected a number >= 0, got 'none'"),
            ("errors=-1", "limit: errors: expected a number >= 0, got '-1'"),
            ("agreement=nan", "limit: agreement: expected a number >= 0, got 'nan'"),
        ],
    )
    def test_limits(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_limits(text)

    @pytest.mark.parametrize("header", ["X-API-Key", "two words:x", ":x", "X-Key:a\nb", "X-Key:€"])
    def test_headers(
        self,
        header: str,
        old: FakeServer,
        run: Callable[..., tuple[int, dict[str, Any]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(torchserve(old), torchserve(old), "--header", header)[0] == 2
        assert "expected NAME:VALUE, got" in capsys.readouterr().err
        assert not old.asked

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--repeats", "0"], "'--repeats': 0 is not in the range x>=1"),
            (["--timeout", "0"], "'--timeout': 0.0 is not in the range x>0"),
            (["--images", "missing"], "images: expected a folder with pictures, got missing"),
        ],
    )
    def test_options(
        self,
        options: list[str],
        message: str,
        old: FakeServer,
        run: Callable[..., tuple[int, dict[str, Any]]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(torchserve(old), torchserve(old), *options)[0] == 2
        assert message in capsys.readouterr().err


def test_limits_hold_at_their_value() -> None:
    summary = {"agreement": 0.99, "p99_ratio": 1.2, "errors": 0}
    assert all(limit["holds"] for limit in judge(summary, {"agreement": 0.99, "p99_ratio": 1.2, "errors": 0}))
    assert not any(limit["holds"] for limit in judge(summary, {"agreement": 0.991, "p99_ratio": 1.19}))


@pytest.mark.slow
def test_real_servers(
    server: TorchServe,
    triton_server: Triton,
    photo: Callable[..., np.ndarray],
    run: Callable[..., tuple[int, dict[str, Any]]],
    images: Path,
) -> None:
    """The same model behind both gives the same masks; another schedule does not, and a limit says so."""
    for file in images.iterdir():
        file.write_bytes(encode_picture(photo(int(file.stem)), "image/png"))
    old, new = f"{server.url}/predictions/tiny", f"{triton_server.url}/v2/models/tiny"
    strict = ["--limit", "agreement=1,errors=0", "--repeats", "1"]
    assert run(old, new, *strict)[0] == 0
    status, written = run(old, new, *strict, "--new-header", "X-MPM-Schedule:off")
    assert status == 1
    assert written["summary"]["errors"] == 0
    assert 0 < written["summary"]["agreement"] < 1


@pytest.fixture
def triton_server(request: pytest.FixtureRequest) -> Triton:
    """The fixture `triton`, whose name is taken here."""
    running: Triton = request.getfixturevalue("triton")
    return running
