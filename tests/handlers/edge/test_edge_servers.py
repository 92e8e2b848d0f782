"""The edge in front of real servers: the same bytes, and attacks that would end them."""

import base64
import io
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from asking_triton import infer_raw, raw_outputs
from fronting import Front, fronted
from launched import Launched, launched

from handlers.api.formats import FORMATS, MASKS
from handlers.api.formats.views import encode_picture
from handlers.edge.triton import OUTPUTS
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from model_store.torchserve import build_archive
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

LENGTH = "Inference-Header-Content-Length"
SERVING = {"schedule": [0, 1], "precision": "fp32"}


@pytest.fixture(scope="module")
def edges(server: TorchServe, triton: Triton) -> Iterator[dict[str, Front]]:
    with fronted(server.url, "torchserve") as first, fronted(triton.url, "triton") as second:
        yield {"torchserve": first, "triton": second}


@pytest.fixture(scope="module")
def picture(photo: Callable[..., np.ndarray]) -> bytes:
    return encode_picture(photo(3), "image/png")


def test_edge_offers_what_the_formats_are() -> None:
    assert {FORMATS[name].media_types[0]: FORMATS[name].output for name in MASKS} == OUTPUTS


@pytest.mark.parametrize("accept", ["image/png", "application/x-npy", "overlay"])
def test_pictures_are_answered_alike_in_every_form(
    edges: dict[str, Front], server: TorchServe, picture: bytes, accept: str
) -> None:
    headers = {"X-MPM-View": accept} if accept == "overlay" else {"Accept": accept}
    url = f"{server.url}/predictions/tiny"
    direct = requests.post(url, data=picture, headers=headers | {"Content-Type": "image/png"}).content
    assert len(direct) > 100
    encoded = base64.b64encode(picture).decode()
    for edge in edges.values():
        url = f"{edge.url}/predictions/tiny"
        for answer in (
            requests.put(url, data=picture, headers=headers),
            requests.post(url, files={"image": picture}, headers=headers),
            requests.post(url, files={"file": picture}, headers=headers),
            requests.post(url, json={"data": encoded}, headers=headers),
            requests.post(url, json={"instances": [{"b64": encoded}]}, headers=headers),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.content == direct
            assert answer.headers["Content-Type"] == (accept if "/" in accept else "image/png")
        instances = {"instances": [{"b64": encoded}, {"b64": encoded}]}
        predictions = requests.post(f"{edge.url}/v1/models/tiny:predict", json=instances).json()["predictions"]
        assert [(each["height"], each["width"]) for each in predictions] == 2 * [(96, 128)]


@pytest.mark.parametrize("server_name", ["torchserve", "triton"])
def test_open_inference_protocol(
    edges: dict[str, Front], server_name: str, triton: Triton, picture: bytes, photo: Callable[..., np.ndarray]
) -> None:
    """In JSON, in binary as its extension, and as a raw body: what Triton alone gives to binary requests."""
    url = f"{edges[server_name].url}/v2/models/tiny"
    assert (
        requests.get(f"{url}/ready").status_code
        == requests.get(f"{edges[server_name].url}/v2/health/ready").status_code
        == 200
    )
    described = requests.get(url).json()
    assert described["name"] == "tiny"
    assert {output["name"] for output in described["outputs"]} == set(OUTPUTS.values())
    assert requests.get(f"{edges[server_name].url}/v2/models/none/ready").status_code in (400, 404)
    pictures = [picture, encode_picture(photo(4), "image/png")]
    direct = [raw_outputs(infer_raw(triton.url, "tiny", each, X_MPM_Schedule="off")) for each in pictures]

    encoded = [base64.b64encode(each).decode() for each in pictures]
    given = {"name": "IMAGE", "datatype": "BYTES", "shape": [2, 1], "data": encoded}
    document = {
        "id": "mine",
        "parameters": {"X-MPM-Schedule": "off"},
        "inputs": [given],
        "outputs": [{"name": "MASK_PNG"}, {"name": "RESULT_JSON"}],
    }
    reply = requests.post(f"{url}/infer", json=document).json()
    assert (reply["model_name"], reply["id"]) == ("tiny", "mine")
    masks, results = reply["outputs"]
    assert (masks["name"], masks["datatype"], masks["shape"]) == ("MASK_PNG", "BYTES", [2, 1])
    assert [base64.b64decode(each) for each in masks["data"]] == [each["MASK_PNG"] for each in direct]
    for text, each in zip(results["data"], direct, strict=True):
        assert json.loads(text)["classes"] == json.loads(each["RESULT_JSON"])["classes"]

    values = b"".join(len(each).to_bytes(4, "little") + each for each in pictures)
    image = {"name": "IMAGE", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(values)}}
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in ("MASK", "MASK_PNG")]
    head = json.dumps({"inputs": [image], "outputs": outputs, "parameters": {"x-mpm-schedule": "off"}}).encode()
    headers = {LENGTH: str(len(head)), "Accept-Encoding": "identity"}
    answer = requests.post(f"{url}/infer", data=head + values, headers=headers)
    assert answer.status_code == 200, answer.text
    end = int(answer.headers[LENGTH])
    told = {output["name"]: output for output in json.loads(answer.content[:end])["outputs"]}
    assert told["MASK"]["shape"] == [2, 96, 128]
    assert told["MASK"]["datatype"] == "UINT8"
    found = {}
    for name, output in told.items():
        size = output["parameters"]["binary_data_size"]
        found[name], end = answer.content[end : end + size], end + size
    assert found["MASK"] == b"".join(each["MASK"] for each in direct)
    assert found["MASK_PNG"][4:].startswith(direct[0]["MASK_PNG"])

    raw = infer_raw(edges[server_name].url, "tiny", picture, X_MPM_Schedule="off", X_MPM_Outputs="MASK_PNG")
    assert raw_outputs(raw) == {"MASK_PNG": direct[0]["MASK_PNG"]}

    wrong = {**document, "inputs": [{**given, "data": [encoded[0], "AAAA"]}]}
    refused = requests.post(f"{url}/infer", json=wrong)
    assert refused.status_code == 400
    assert "picture 1 of 2: image: expected JPEG" in refused.json()["error"]
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"inputs": []}, "JSON: expected one input with name, datatype, shape and data"),
        (
            {"inputs": [{**given, "shape": [3]}]},
            "IMAGE: expected 3 pictures, as its shape says, got 2",
        ),
        ({"inputs": [{**given, "name": "X"}]}, "inputs: expected IMAGE of BYTES, got X of BYTES"),
        ({"outputs": [{"name": "MASK"}]}, "MASK: expected binary_data true, or MASK_PNG in its place, got it as JSON"),
        ({"outputs": [{"name": "X"}]}, "outputs: expected some of MASK_PNG, RESULT_JSON, MASK, got X"),
        ({"parameters": {"color": "red"}}, "got 'color'"),
        ({"parameters": {"x-mpm-view": "tokens"}, "outputs": [{"name": "RESULT_JSON"}]}, "expected MASK_PNG among"),
    ]
    for changed, reason in refusals:
        refused = requests.post(f"{url}/infer", json=document | changed)
        assert refused.status_code == 400, refused.text
        assert reason in refused.json()["error"]


def test_maps_are_the_same_bytes_from_both_servers(edges: dict[str, Front], triton: Triton, picture: bytes) -> None:
    headers = {"X-MPM-View": "maps", "X-Request-Id": "a"}
    for schedule, num_merges in ((None, 2), ("off", 0)):
        asked = headers | ({"X-MPM-Schedule": schedule} if schedule else {})
        answers = [
            requests.post(f"{edge.url}/predictions/tiny", data=picture, headers=asked) for edge in edges.values()
        ]
        first, second = (re.sub(rb'"timings_ms":{.*?},?', b"", answer.content) for answer in answers)
        assert first == second
        told = answers[0].json()
        assert told["height"] == 96
        assert [len(window["maps"]) for window in told["merging"]["windows"]] == [num_merges] * len(
            told["tokens_per_window"]
        )
    outputs = raw_outputs(infer_raw(triton.url, "tiny", picture, X_MPM_View="maps", X_Request_Id="a"))
    assert outputs["RESULT_JSON"].startswith(b'{"request_id":"a","height":96')
    assert b'"merging":{"frame":' in outputs["RESULT_JSON"]
    refused = requests.post(
        f"{edges['triton'].url}/predictions/tiny", data=picture, headers=headers | {"Accept": "image/png"}
    )
    assert (refused.status_code, "expected one of application/json" in refused.text) == (406, True)


@pytest.mark.parametrize("server_name", ["torchserve", "triton"])
def test_errors_have_one_form(edges: dict[str, Front], server_name: str, picture: bytes) -> None:
    url = f"{edges[server_name].url}/predictions/tiny"
    for data, headers, told in (
        (b"no picture", {}, "expected JPEG, PNG"),
        (picture, {"X-MPM-Schedule": "99"}, "X-MPM-Schedule"),
        (picture, {"X-MPM-View": "none"}, "X-MPM-View"),
    ):
        answer = requests.post(url, data=data, headers={"X-Request-Id": "mine", **headers})
        assert answer.status_code == 400
        fields = answer.json()
        assert told in fields.pop("error")
        assert fields == {"code": 400, "request_id": "mine"}
    refused = requests.post(url, data=picture, headers={"Accept": "text/html"})
    assert (refused.status_code, refused.json()["code"]) == (406, 406)


def test_triton_answers_its_own_protocol_unchanged(edges: dict[str, Front], triton: Triton, picture: bytes) -> None:
    import tritonclient.http as client

    url = edges["triton"].url
    through, direct = (infer_raw(each, "tiny", picture, X_MPM_Outputs="MASK") for each in (url, triton.url))
    assert (through.status, through.body) == (200, direct.body)
    image = client.InferInput("IMAGE", [1, 1], "BYTES")
    image.set_data_from_numpy(np.array([[picture]], object))
    with client.InferenceServerClient(url.removeprefix("http://")) as asking:
        assert asking.is_model_ready("tiny")
        masks = asking.infer("tiny", [image], outputs=[client.InferRequestedOutput("MASK")]).as_numpy("MASK")
    answer = requests.post(f"{url}/predictions/tiny", data=picture, headers={"Accept": "application/x-npy"})
    np.testing.assert_array_equal(masks[0], np.load(io.BytesIO(answer.content)))


def test_triton_survives_nested_json(edges: dict[str, Front], triton: Triton, picture: bytes) -> None:
    """300 KB of it end a Triton without an edge."""
    edge, pid = edges["triton"], triton.pid
    for start in ('{"inputs":', '{"inputs":[{"name":"IMAGE","parameters":{"a":', '{"parameters":'):
        for nest in ("[", '{"a":'):
            body = start + nest * (300_000 // len(nest))
            for headers in ({}, {LENGTH: str(len(body))}):
                answer = requests.post(f"{edge.url}/v2/models/tiny/infer", data=body, headers=headers)
                assert answer.status_code == 400
                assert "JSON: expected nesting of at most 64, got deeper" in answer.json()["error"]
    assert infer_raw(edge.url, "tiny", picture).status == 200
    assert triton.pid == pid


@pytest.mark.parametrize(
    ("changed", "status", "told"),
    [
        ({"outputs": [{"name": "MASK_PNG", "parameters": {"classification": 3}}]}, 400, "no parameter classification"),
        ({"shape": [2**62, 1]}, 400, "IMAGE: expected shape [pictures, 1]"),
        ({"shape": [-1, 1]}, 400, "Unable to parse 'shape'"),
        ({"shape": [2**31, 2**31]}, 400, "unexpected shape"),
        ({"binary_data_size": 2**62}, 400, "unexpected size for input"),
        ({"shared_memory_region": "../../etc/passwd", "shared_memory_byte_size": 2**62}, 404, "shared memory region"),
        ({"id": "\ud800"}, 400, "failed to parse the request JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_triton_survives_requests_that_lie(
    edges: dict[str, Front], triton: Triton, picture: bytes, changed: dict[str, Any], status: int, told: str
) -> None:
    """`classification` of what is no number divides by zero, and ends a Triton without an edge."""
    size = {"binary_data_size": len(picture) + 4}
    parameters = {name: value for name, value in changed.items() if name.startswith(("binary", "shared"))} or size
    image = {"name": "IMAGE", "shape": changed.get("shape", [1, 1]), "datatype": "BYTES", "parameters": parameters}
    others = {name: value for name, value in changed.items() if name in ("outputs", "id")}
    head = json.dumps({"inputs": [image]} | others).encode()
    data = head + len(picture).to_bytes(4, "little") + picture
    pid = triton.pid
    answer = requests.post(f"{edges['triton'].url}/v2/models/tiny/infer", data=data, headers={LENGTH: str(len(head))})
    assert answer.status_code == status
    assert told in answer.json()["error"]
    assert infer_raw(triton.url, "tiny", picture).status == 200
    assert triton.pid == pid


@pytest.mark.parametrize(
    "data", [b'{"inputs": [', b'{"inputs": 3}', b"[1]", b'{"id": "\xff"}', b'{"a": 1, "a": 2}'], ids=repr
)
def test_bad_json_is_the_clients_fault(edges: dict[str, Front], data: bytes) -> None:
    answer = requests.post(f"{edges['triton'].url}/v2/models/tiny/infer", data=data)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.slow
def test_triton_that_ends_is_started_again_and_drains_in_the_end(
    checkpoint: Path, tmp_path: Path, picture: bytes
) -> None:
    """On an IPv6 address, which takes IPv4 too."""
    build_model(checkpoint, name="tiny", out=tmp_path / "models", serving=SERVING)
    with launched("triton", tmp_path / "models", tmp_path / "log", "--host", "::", edge=True) as running:
        port = running.url.rpartition(":")[2]
        assert f"Ready on http://[::1]:{port}" in running.told
        (server,) = running.children("bin/tritonserver")
        (edge,) = running.children("handlers.edge")
        server.send_signal(signal.SIGSEGV)
        running.wait_until(lambda: not running.is_ready, 10)
        answer = requests.post(f"{running.url}/predictions/tiny", data=picture)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "2"
        running.wait_until(lambda: running.is_ready)
        edge.kill()
        edge.wait(10)
        assert requests.post(f"{running.url}/predictions/tiny", data=picture).status_code == 200  # waits for the next
        counted = requests.get(f"http://[::1]:{port}/metrics").text
        assert 'mpm_restarts_total{process="server"} 1' in counted
        assert 'mpm_restarts_total{process="edge"} 1' in counted
        check_drain(running, picture)
    assert running.process.returncode == 0
    assert "Triton ended with status -11; starting it again" in running.told
    assert "the edge ended with status -9; starting it again" in running.told
    assert "Traceback" not in running.told


@pytest.mark.slow
def test_torchserve_drains_behind_the_edge(checkpoint: Path, tmp_path: Path, picture: bytes) -> None:
    build_archive(checkpoint, name="tiny", out=tmp_path / "models", serving=SERVING)
    with launched("torchserve", tmp_path / "models", tmp_path / "log", edge=True) as running:
        check_drain(running, picture)
    assert running.process.returncode == 0


def check_drain(running: Launched, picture: bytes) -> None:
    """What was accepted is answered, a body that is still on its way too."""
    port = int(running.url.rpartition(":")[2])
    head = b"POST /predictions/tiny HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(picture)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client, ThreadPoolExecutor() as pool:
        client.sendall(head + picture[:100])
        others = [pool.submit(requests.post, f"{running.url}/predictions/tiny", data=picture) for _ in range(4)]
        time.sleep(0.3)
        running.process.terminate()
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        client.sendall(picture[100:])
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert {other.result().status_code for other in others} == {200}
