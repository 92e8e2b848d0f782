"""Good, broken and abandoned requests, mixed, over both protocols: nothing hangs, nothing is lost, nothing leaks."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from asking_triton import infer_raw
from tritonclient.utils import InferenceServerException

from handlers.api.decode import decode_image
from handlers.api.formats.views import encode_picture
from handlers.launch.triton import Triton
from model_store.triton import build_model
from mpm_ops import Segmenter

pytest_plugins = ("tiny_server",)

SECONDS_TO_ANSWER = 60
NUM_CLIENTS = 10


@pytest.mark.parametrize("num_requests", [240, pytest.param(2000, marks=pytest.mark.slow)])
def test_mixed_load(
    checkpoint: Path, model: Segmenter, photo: Callable[..., np.ndarray], tmp_path: Path, num_requests: int
) -> None:
    good = [encode_picture(photo(i, 40 + 20 * i, 150 - 10 * i), ("image/png", "image/jpeg")[i % 2]) for i in range(6)]
    masks = [model.segment(decode_image(data, max_bytes=len(data), max_pixels=10**6)) for data in good]
    bad = [b"", b"junk", good[0][: len(good[0]) // 2], good[1][:300], b"\x93NUMPY\x01\x00"]
    build_model(
        checkpoint,
        name="tiny",
        out=tmp_path / "store",
        serving={"schedule": [0, 1], "precision": "fp32"},
        max_inflight=6,
        max_queue_size=16,
    )
    with Triton(tmp_path / "store", log=tmp_path / "log", exit_seconds=10) as server:
        server.wait_ready()
        before = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]

        def client(number: int) -> Counter[str]:
            return _client(server, random.Random(number), good, masks, bad, num_requests // NUM_CLIENTS)

        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            seen = sum(clients.map(client, range(NUM_CLIENTS)), Counter())
        assert set(seen) <= {"answered", "refused", "given up", "busy"}
        assert seen.total() == num_requests
        assert seen["answered"] > num_requests / 3
        assert seen["refused"] > num_requests / 10
        assert seen["given up"] > num_requests / 40

        # A place that was lost would be missing among the six now, which are asked for all at once.
        batch = tritonclient.grpc.InferInput("IMAGE", [6, 1], "BYTES")
        batch.set_data_from_numpy(np.array([[good[0]]] * 6, dtype=object))
        with tritonclient.grpc.InferenceServerClient(server.grpc_url) as grpc:
            assert grpc.infer("tiny", [batch]).as_numpy("MASK").shape == (6, *masks[0].shape)
        assert [child.pid for child in psutil.Process(server.pid).children(recursive=True)] == before
    log = (tmp_path / "log").read_text()
    assert "stopped with 0 pictures in flight" in log
    assert "Traceback" not in log


def _client(
    server: Triton, dice: random.Random, good: list[bytes], masks: list[np.ndarray], bad: list[bytes], number: int
) -> Counter[str]:
    """Ask so many times, in one way or another, and check every answer."""
    seen: Counter[str] = Counter()
    with (
        tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as http,
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as grpc,
    ):
        for _ in range(number):
            way, which = dice.choice(("http", "grpc", "raw", "cancel")), dice.randrange(len(good))
            broken = way != "cancel" and dice.random() < 0.3
            data = dice.choice(bad) if broken else good[which]
            try:
                if way == "cancel":
                    seen[_give_up(grpc, data, dice.random() * 0.05)] += 1
                    continue
                if way == "raw":
                    seen[_raw(server, data, masks[which])] += 1
                    continue
                client, inputs = (http, tritonclient.http) if way == "http" else (grpc, tritonclient.grpc)
                labels = client.infer("tiny", [_image(inputs, data)]).as_numpy("MASK")[0]
                assert not broken
                np.testing.assert_array_equal(labels, masks[which])
                seen["answered"] += 1
            except InferenceServerException as error:
                kind = _kind(error)
                seen[kind if broken or kind == "busy" else f"a good picture: {error}"] += 1
    return seen


def _raw(server: Triton, data: bytes, mask: np.ndarray) -> str:
    response = infer_raw(server.url, "tiny", data, X_MPM_Outputs="MASK")
    if response.status == 200:
        assert response.body[int(response.headers["inference-header-content-length"]) :] == mask.tobytes()
    return {200: "answered", 400: "refused", 503: "busy"}[response.status]


def _give_up(client: Any, data: bytes, seconds: float) -> str:
    """Cancel after so long; the answer may be faster."""
    over = threading.Event()
    errors: list[Any] = []

    def done(result: Any, error: Any) -> None:
        errors.append(error)
        over.set()

    call = client.async_infer("tiny", [_image(tritonclient.grpc, data)], done)
    over.wait(seconds)
    call.cancel()
    assert over.wait(SECONDS_TO_ANSWER)
    (error,) = errors
    return "answered" if error is None else _kind(error)


def _kind(error: Any) -> str:
    status = str(error.status())
    if "CANCELLED" in status or "cancelled" in str(error).lower():
        return "given up"
    return "refused" if status in ("400", "StatusCode.INVALID_ARGUMENT") else "busy"


def _image(protocol: Any, data: bytes) -> Any:
    image = protocol.InferInput("IMAGE", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[data]], dtype=object))
    return image
