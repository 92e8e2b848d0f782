"""A real Triton from outside: what clients send, by mistake and on purpose, and what they get."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from asking_triton import TIMEOUT, infer_raw, raw_outputs
from PIL import Image
from tritonclient.utils import InferenceServerException

from handlers.api.decode import decode_image
from handlers.api.formats.npy import encode_npy
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.cli import main
from handlers.client import connect, fetch, segment_shared
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.classes import Classes, load_classes

pytest_plugins = ("tiny_server",)

OUTPUTS = ("MASK", "MASK_PNG", "RESULT_JSON")
Infer = Callable[..., Any]


@pytest.fixture(autouse=True)
def _same_processes(triton: Triton) -> Iterator[None]:
    """Nothing that a client sends may end a process."""
    before = processes(triton)
    yield
    assert processes(triton) == before


def processes(triton: Triton) -> set[int]:
    """All but those that decode, which come and go."""
    found = psutil.Process(triton.pid).children(recursive=True)
    return {child.pid for child in found if "handlers.api.other_formats" not in child.cmdline()}


@pytest.fixture
def jpeg(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(0), "image/jpeg")


@pytest.fixture(scope="module")
def expected(model: Segmenter) -> Callable[[bytes], np.ndarray]:
    """The labels that the library gives for an encoded picture."""
    return lambda data: model.segment(decode_image(data, max_bytes=len(data), max_pixels=10**7))


@pytest.fixture(params=["http", "grpc"])
def infer(request: pytest.FixtureRequest, triton: Triton) -> Iterator[Infer]:
    """Asks for the outputs of a batch, through either client; the model is the first argument."""
    protocol: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    url = triton.url.removeprefix("http://") if request.param == "http" else triton.grpc_url

    def ask(model: str, *pictures: bytes, outputs: tuple[str, ...] = OUTPUTS, **options: Any) -> dict[str, Any]:
        image = protocol.InferInput("IMAGE", [len(pictures), 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture] for picture in pictures], dtype=object))
        wanted = [protocol.InferRequestedOutput(name) for name in outputs]
        result = client.infer(model, [image], outputs=wanted, **options)
        return {name: result.as_numpy(name) for name in OUTPUTS if result.as_numpy(name) is not None}

    with protocol.InferenceServerClient(url) as client:
        yield ask


class TestAnswers:
    def test_all_outputs_of_one_picture(
        self, infer: Infer, jpeg: bytes, expected: Callable[[bytes], np.ndarray], classes: Classes
    ) -> None:
        found = infer("tiny", jpeg, request_id="my-request")
        np.testing.assert_array_equal(found["MASK"][0], expected(jpeg))
        assert found["MASK_PNG"][0, 0] == encode_mask_png(expected(jpeg), classes)
        told = json.loads(found["RESULT_JSON"][0, 0])
        assert (told["height"], told["width"], told["request_id"]) == (96, 128, "my-request")
        assert sum(described["area"] for described in told["classes"]) == 96 * 128

    @pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000", "WEBP"])
    def test_pictures_that_are_decoded_apart(
        self,
        triton: Triton,
        photo: Callable[..., np.ndarray],
        expected: Callable[[bytes], np.ndarray],
        file_format: str,
    ) -> None:
        buffer = io.BytesIO()
        Image.fromarray(photo(2, 40, 40)).save(buffer, file_format)
        found = raw_outputs(infer_raw(triton.url, "tiny", buffer.getvalue()))
        assert found["MASK"] == expected(buffer.getvalue()).tobytes()

    @pytest.mark.parametrize("outputs", [("MASK",), ("MASK_PNG",), ("RESULT_JSON",), ("RESULT_JSON", "MASK")])
    def test_only_those_asked_for(self, infer: Infer, jpeg: bytes, outputs: tuple[str, ...]) -> None:
        assert set(infer("tiny", jpeg, outputs=outputs)) == set(outputs)

    def test_raw_body(self, triton: Triton, jpeg: bytes, expected: Callable[[bytes], np.ndarray]) -> None:
        found = raw_outputs(infer_raw(triton.url, "tiny", jpeg))
        assert set(found) == set(OUTPUTS)
        assert found["MASK"] == expected(jpeg).tobytes()

    def test_raw_body_for_one_output(
        self, triton: Triton, jpeg: bytes, expected: Callable[[bytes], np.ndarray], classes: Classes
    ) -> None:
        found = raw_outputs(infer_raw(triton.url, "tiny", jpeg, X_MPM_Outputs="MASK_PNG"))
        assert found == {"MASK_PNG": encode_mask_png(expected(jpeg), classes)}

    def test_json_for_those_who_read_no_binary(self, triton: Triton, jpeg: bytes) -> None:
        header = {
            "inputs": [
                {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES"}
                | {"parameters": {"binary_data_size": len(jpeg) + 4}}
            ],
            "outputs": [{"name": "RESULT_JSON"}],
        }
        head = json.dumps(header).encode()
        answer = fetch(
            f"{triton.url}/v2/models/tiny/infer",
            head + len(jpeg).to_bytes(4, "little") + jpeg,
            headers={"Inference-Header-Content-Length": str(len(head))},
            timeout_seconds=TIMEOUT,
        )
        (output,) = json.loads(answer.body)["outputs"]
        assert json.loads(output["data"][0])["height"] == 96

    def test_view(self, infer: Infer, jpeg: bytes, expected: Callable[[bytes], np.ndarray]) -> None:
        found = infer("tiny", jpeg, outputs=("MASK", "MASK_PNG"), parameters={"x-mpm-view": "overlay"})
        assert Image.open(io.BytesIO(found["MASK_PNG"][0, 0])).mode == "RGB"
        np.testing.assert_array_equal(found["MASK"][0], expected(jpeg))  # still the mask

    def test_schedule(self, infer: Infer, jpeg: bytes, checkpoint: Path) -> None:
        found = infer("tiny", jpeg, outputs=("MASK",), parameters={"x-mpm-schedule": "off"})
        image = decode_image(jpeg, max_bytes=len(jpeg), max_pixels=10**6)
        unmerged = load_segmenter(checkpoint, (), runtime="auto", precision="fp32")
        np.testing.assert_array_equal(found["MASK"][0], unmerged.segment(image))

    def test_headers_as_options(self, triton: Triton, jpeg: bytes) -> None:
        sent = {"X_MPM_Outputs": "RESULT_JSON", "X_Request_Id": "mine", "X_MPM_Schedule": "off"}
        told = json.loads(raw_outputs(infer_raw(triton.url, "tiny", jpeg, **sent))["RESULT_JSON"])
        assert told["request_id"] == "mine"
        assert all(len(steps) == 1 for steps in told["tokens_per_window"])  # nothing merged
        with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
            image = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
            image.set_data_from_numpy(np.array([[jpeg]], dtype=object))
            found = client.infer("tiny", [image], headers={"x-request-id": "mine"}).as_numpy("RESULT_JSON")
            assert json.loads(found[0, 0])["request_id"] == "mine"

    @pytest.mark.parametrize(
        "header", ["X-MPM-Request-Id", "elastic-apm-traceparent", "ce-traceparent", "traceparent-x", "X-MPM-Viewer"]
    )
    def test_headers_of_others_are_none_of_ours(self, triton: Triton, jpeg: bytes, header: str) -> None:
        """Proxies and agents add theirs; TorchServe ignores them too."""
        assert raw_outputs(infer_raw(triton.url, "tiny", jpeg, **{header: "1"}, X_MPM_Outputs="MASK_PNG"))
        with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
            image = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
            image.set_data_from_numpy(np.array([[jpeg]], dtype=object))
            assert client.infer("tiny", [image], headers={header.lower(): "1"}).as_numpy("MASK") is not None

    @pytest.mark.parametrize("header", ["x-mpm-outputs", "X-MPM-OUTPUTS"])
    def test_headers_in_any_case(self, triton: Triton, jpeg: bytes, header: str) -> None:
        assert set(raw_outputs(infer_raw(triton.url, "tiny", jpeg, **{header: "MASK"}))) == {"MASK"}

    def test_batch_of_one_size(
        self, infer: Infer, photo: Callable[..., np.ndarray], expected: Callable[[bytes], np.ndarray]
    ) -> None:
        pictures = [encode_picture(photo(i), "image/png") for i in range(5)]
        found = infer("tiny", *pictures)
        np.testing.assert_array_equal(found["MASK"], np.stack([expected(picture) for picture in pictures]))
        assert found["MASK_PNG"].shape == (5, 1)

    def test_ragged_batch(
        self, infer: Infer, photo: Callable[..., np.ndarray], expected: Callable[[bytes], np.ndarray], classes: Classes
    ) -> None:
        pictures = [encode_picture(photo(i, 50 + i, 60), "image/png") for i in range(3)]
        found = infer("tiny", *pictures, outputs=("MASK_PNG",))["MASK_PNG"]
        assert found.ravel().tolist() == [encode_mask_png(expected(picture), classes) for picture in pictures]
        with pytest.raises(InferenceServerException, match="60x50, 60x51, 60x52; ask for MASK_PNG"):
            infer("tiny", *pictures, outputs=("MASK",))

    def test_demo_model_beside_it(
        self, infer: Infer, demo_checkpoint: Path, demo_model: Segmenter, photo: Callable[..., np.ndarray]
    ) -> None:
        image = photo(4, 180, 240)
        (mask,) = infer("demo", encode_picture(image, "image/png"), outputs=("MASK_PNG",))["MASK_PNG"][0]
        assert mask == encode_mask_png(demo_model.segment(image), load_classes(demo_checkpoint.parent, 11))


class TestSameBytesEverywhere:
    @pytest.mark.parametrize("form", ["jpeg", "png", "npy"])
    @pytest.mark.parametrize(("height", "width"), [(96, 128), (61, 300)])
    def test_library_torchserve_and_triton(
        self,
        server: TorchServe,
        triton: Triton,
        photo: Callable[..., np.ndarray],
        expected: Callable[[bytes], np.ndarray],
        classes: Classes,
        form: str,
        height: int,
        width: int,
    ) -> None:
        image = photo(height, height, width)
        picture = encode_npy(image) if form == "npy" else encode_picture(image, f"image/{form}")
        mask = encode_mask_png(expected(picture), classes)
        url = f"{server.url}/predictions/tiny"
        assert fetch(url, picture, timeout_seconds=TIMEOUT).body == mask
        assert raw_outputs(infer_raw(triton.url, "tiny", picture, X_MPM_Outputs="MASK_PNG"))["MASK_PNG"] == mask
        assert ask(f"grpc://{triton.grpc_url}/tiny", picture) == mask

    def test_another_merger(
        self,
        server: TorchServe,
        triton: Triton,
        photo: Callable[..., np.ndarray],
        checkpoint: Path,
        classes: Classes,
        merger: str,
    ) -> None:
        merged = load_segmenter(checkpoint, merger=merger, runtime="auto", precision="fp32")
        image, headers = photo(5, 61, 300), {"X-MPM-Merger": merger}
        picture, mask = encode_npy(image), encode_mask_png(merged.segment(image), classes)
        for url in (
            f"{server.url}/predictions/tiny",
            f"{triton.url}/v2/models/tiny",
            f"grpc://{triton.grpc_url}/tiny",
        ):
            with connect(url) as client:
                assert client.ask(picture, headers=headers).body == mask
                refused = client.ask(picture, headers={"X-MPM-Merger": "tome:r=4"})
            assert refused.status == 400
            assert f"X-MPM-Merger: expected one of mpm:0,1, {merger}, none, got 'tome:r=4'" in refused.error

    def test_in_the_precision_that_the_chip_prefers(
        self,
        server: TorchServe,
        triton: Triton,
        photo: Callable[..., np.ndarray],
        demo_checkpoint: Path,
        demo_model: Segmenter,
    ) -> None:
        classes = load_classes(demo_checkpoint.parent, demo_model.config.n_cls)
        for height, width in ((180, 240), (250, 131)):
            image = photo(height, height, width)
            picture, mask = encode_npy(image), encode_mask_png(demo_model.segment(image), classes)
            assert fetch(f"{server.url}/predictions/demo", picture, timeout_seconds=TIMEOUT).body == mask
            assert ask(f"{triton.url}/v2/models/demo", picture) == mask
            assert ask(f"grpc://{triton.grpc_url}/demo", picture) == mask

    def test_a_frame_that_is_none_is_told_the_same(self, server: TorchServe, triton: Triton) -> None:
        frame = encode_npy(np.zeros((4, 5), np.float32))
        told = fetch(f"{server.url}/predictions/tiny", frame, timeout_seconds=TIMEOUT).error
        assert told == "image: expected a .npy frame of uint8 [H, W, 3] in C order, got '<f4' [4, 5]"
        assert infer_raw(triton.url, "tiny", frame).error == told


class TestRefusals:
    @pytest.mark.parametrize("data", [b"", b"junk", b"\xff\xd8\xff", b"\x93NUMPY", b"\0" * 1000], ids=repr)
    def test_no_picture(self, infer: Infer, triton: Triton, data: bytes) -> None:
        with pytest.raises(InferenceServerException, match=r"image: (expected|the header)") as caught:
            infer("tiny", data)
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        assert infer_raw(triton.url, "tiny", data).status == 400

    @pytest.mark.parametrize("name", ["X-Request-Id", "X-MPM-View"])
    def test_headers_that_are_no_text(self, triton: Triton, jpeg: bytes, name: str) -> None:
        response = infer_raw(triton.url, "tiny", jpeg, **{name: "\xe9\xff"})
        assert response.status == 400
        assert response.error == "headers and parameters: expected UTF-8, got other bytes"

    def test_truncated(self, triton: Triton, jpeg: bytes) -> None:
        response = infer_raw(triton.url, "tiny", jpeg[: len(jpeg) // 2])
        assert response.status == 400
        assert "broken or truncated JPEG picture of 128x96 pixels" in response.error

    def test_place_in_a_batch(self, infer: Infer, jpeg: bytes) -> None:
        with pytest.raises(InferenceServerException, match="picture 1 of 3: image: expected JPEG"):
            infer("tiny", jpeg, b"junk", jpeg)

    def test_too_large(self, triton: Triton, photo: Callable[..., np.ndarray]) -> None:
        for data, told in (
            (bytes(24 * 2**20 + 1), "at most 25165824 bytes"),
            (encode_picture(np.zeros((1, 20_000, 3), np.uint8), "image/png"), "windows"),
        ):
            response = infer_raw(triton.url, "tiny", data)
            assert response.status == 400
            assert told in response.error

    @pytest.mark.parametrize(
        ("parameters", "told"),
        [
            ({"x-mpm-view": "mask"}, "X-MPM-View: expected one of"),
            ({"x-mpm-schedule": "1,0"}, "X-MPM-Schedule: "),
            ({"x-mpm-schedule": "0"}, "X-MPM-Schedule: expected one of 0,1, off"),
            ({"x-mpm-schedule": "off", "x-mpm-merger": "none"}, "X-MPM-Merger: expected without X-MPM-Schedule, got"),
            ({"windos": "3"}, "parameters: expected some of"),
            ({"x-mpm-view": 1}, "x-mpm-view: expected text, got 1"),
        ],
    )
    def test_options(self, infer: Infer, jpeg: bytes, parameters: dict[str, Any], told: str) -> None:
        with pytest.raises(InferenceServerException, match=told):
            infer("tiny", jpeg, parameters=parameters)

    @pytest.mark.parametrize("shape", [[1], [2, 2], [0, 1], [17, 1]])
    def test_shapes(self, triton: Triton, shape: list[int]) -> None:
        image = tritonclient.grpc.InferInput("IMAGE", shape, "BYTES")
        image.set_data_from_numpy(np.full(shape, b"junk", dtype=object))
        with (
            tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client,
            pytest.raises(InferenceServerException),
        ):
            client.infer("tiny", [image])

    def test_unknown_names(self, infer: Infer, jpeg: bytes) -> None:
        with pytest.raises(InferenceServerException):
            infer("tiny", jpeg, outputs=("MASKS",))
        with pytest.raises(InferenceServerException):
            infer("nope", jpeg)

    @pytest.mark.parametrize(
        "path",
        [
            "repository/index",
            "repository/models/tiny/unload",
            "repository/models/tiny/load",
            "systemsharedmemory/region/x/register",
            "trace/setting",
            "logging",
        ],
    )
    def test_what_changes_the_server(self, triton: Triton, path: str) -> None:
        for headers in ({}, {"x-admin": "guess"}):
            assert fetch(f"{triton.url}/v2/{path}", b"{}", headers=headers).status == 403, path

    def test_what_changes_the_server_over_grpc(self, triton: Triton) -> None:
        with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
            for change in (
                lambda: client.unload_model("tiny"),
                lambda: client.register_system_shared_memory("a", "/a", 1),
                lambda: client.update_log_settings({"log_verbose_level": 1}),
            ):
                with pytest.raises(InferenceServerException, match="restricted"):
                    change()


def ask(url: str, picture: bytes) -> bytes:
    with connect(url) as client:
        answer = client.ask(picture)
    assert answer.status == 200, answer.error
    return answer.body


class TestClient:
    @pytest.mark.parametrize("url", ["{0.url}/v2/models/tiny", "grpc://{0.grpc_url}/tiny"])
    def test_many_at_once(
        self,
        triton: Triton,
        photo: Callable[..., np.ndarray],
        expected: Callable[[bytes], np.ndarray],
        classes: Classes,
        url: str,
    ) -> None:
        pictures = [encode_picture(photo(i, 40 + i, 50), "image/png") for i in range(20)]
        with connect(url.format(triton)) as client, ThreadPoolExecutor(8) as threads:
            masks = list(threads.map(lambda picture: client.ask(picture).body, pictures))
            assert masks == [encode_mask_png(expected(picture), classes) for picture in pictures]
            unmerged = client.ask(pictures[0], headers={"X-MPM-Schedule": "off"})
            assert Image.open(io.BytesIO(unmerged.body)).size == (50, 40)
            assert client.ask(pictures[0], headers={"X-MPM-View": "tokens"}).status == 200
            with pytest.raises(ValueError, match=r"accept: expected one of image/png, .* got 'image/webp'"):
                client.ask(pictures[0], accept="image/webp")

    def test_shared_memory(self, triton: Triton, photo: Callable[..., np.ndarray], model: Segmenter) -> None:
        frame = photo(7, 90, 110)
        before = set(Path("/dev/shm").iterdir())
        labels = segment_shared(triton.grpc_url, "tiny", frame, triton.admin_secret)
        np.testing.assert_array_equal(labels, model.segment(frame))
        with pytest.raises(InferenceServerException, match="restricted"):
            segment_shared(triton.grpc_url, "tiny", frame, "guess")
        assert set(Path("/dev/shm").iterdir()) == before

    def test_command(
        self,
        server: TorchServe,
        triton: Triton,
        jpeg: bytes,
        expected: Callable[[bytes], np.ndarray],
        classes: Classes,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder, out = tmp_path / "pictures", tmp_path / "masks"
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(jpeg)
        (folder / "broken.png").write_bytes(b"no picture")
        for url in (
            f"{server.url}/predictions/tiny",
            f"{triton.url}/v2/models/tiny",
            f"grpc://{triton.grpc_url}/tiny",
        ):
            assert main(["segment", str(folder), "--url", url, "--out", str(out)]) == 1
            told = capsys.readouterr().err
            assert "1 of 2 pictures written" in told
            assert f"{folder / 'broken.png'}: image: expected JPEG" in told
            assert (out / "photo.png").read_bytes() == encode_mask_png(expected(jpeg), classes)
            (out / "photo.png").unlink()
        assert main(["segment", str(folder / "photo.jpg"), "--url", f"{triton.url}/v2/models/no"]) == 2
        assert "no" in capsys.readouterr().err


class TestMany:
    def test_a_small_request_overtakes_a_large_one(
        self, triton: Triton, photo: Callable[..., np.ndarray], jpeg: bytes
    ) -> None:
        large = [encode_picture(photo(i, 1500, 1500), "image/jpeg") for i in range(2)] * 4
        done: dict[str, float] = {}

        def ask(name: str, pictures: list[bytes]) -> None:
            image = tritonclient.grpc.InferInput("IMAGE", [len(pictures), 1], "BYTES")
            image.set_data_from_numpy(np.array([[picture] for picture in pictures], dtype=object))
            with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
                client.infer("tiny", [image], outputs=[tritonclient.grpc.InferRequestedOutput("MASK")])
            done[name] = time.monotonic()

        first = threading.Thread(target=ask, args=("large", large))
        first.start()
        time.sleep(0.1)
        ask("small", [jpeg])
        first.join()
        assert done["small"] < done["large"]

    def test_more_than_fits_is_refused_and_the_rest_answered(
        self, triton: Triton, photo: Callable[..., np.ndarray], expected: Callable[[bytes], np.ndarray]
    ) -> None:
        """`narrow` takes one picture at a time and lets two wait, beside those on their way."""
        picture = encode_picture(photo(0, 700, 700), "image/png")
        labels = expected(picture).tobytes()
        with ThreadPoolExecutor(24) as clients:
            responses = list(clients.map(lambda _: infer_raw(triton.url, "narrow", picture), range(24)))
        statuses = [response.status for response in responses]
        assert set(statuses) == {200, 503}
        assert 3 <= statuses.count(200) <= 12
        assert all(raw_outputs(r)["MASK"] == labels for r in responses if r.status == 200)
        assert all("queue" in r.error for r in responses if r.status == 503)

    def test_cancelled_requests_make_room(self, triton: Triton, photo: Callable[..., np.ndarray]) -> None:
        """A lost place would block `narrow` forever, which has only one."""
        picture = encode_picture(photo(0, 700, 700), "image/png")
        image = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture]], dtype=object))
        with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
            for delay in (0, 0.01, 0.03, 0.1, 0.2):
                over = threading.Event()
                call = client.async_infer("narrow", [image], lambda result, error, over=over: over.set())
                time.sleep(delay)
                call.cancel()
                assert over.wait(TIMEOUT)
            deadline = time.monotonic() + TIMEOUT
            while True:  # a cancelled request may still stand in the queue, which has room for two
                try:
                    found = client.infer("narrow", [image]).as_numpy("MASK")
                    break
                except InferenceServerException as error:
                    if "queue" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            assert found.shape == (1, 700, 700)
