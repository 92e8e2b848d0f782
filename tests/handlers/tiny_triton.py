"""The small model of `tiny_server` behind a real Triton, started once."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from tiny_server import DEMO, SCHEDULE

from handlers.triton_launcher import Triton
from model_store.triton import build_model

TIMEOUT = 60
RAW = {"Inference-Header-Content-Length": "0", "Accept-Encoding": "identity", "Connection": "close"}


@pytest.fixture(scope="session")
def repository(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny`, `narrow` that takes one picture at a time, and `demo`."""
    out = tmp_path_factory.mktemp("repository")
    serving = {"schedule": list(SCHEDULE)}
    build_model(checkpoint, name="tiny", out=out, serving=serving | {"max_image_bytes": 24 * 2**20})
    build_model(checkpoint, name="narrow", out=out, serving=serving, max_inflight=1, max_queue_size=2)
    if DEMO.is_file():
        build_model(DEMO, name="demo", out=out, serving={})
    return out


@pytest.fixture(scope="session")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A running Triton of its own; its output goes to its log."""
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    with Triton(repository, log=log, exit_seconds=10) as running:
        running.wait_ready()
        processes = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        yield running
    assert not [process for process in processes if process.is_running()]
    assert log.read_text().count("stopped with 0 pictures in flight") == len(running.models)


def infer_raw(url: str, model: str, data: bytes, **headers: str) -> requests.Response:
    """Post a picture as the whole body, as curl would."""
    sent = RAW | {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(f"{url}/v2/models/{model}/infer", data=data, headers=sent, timeout=TIMEOUT)


def raw_outputs(response: requests.Response) -> dict[str, bytes]:
    """The values of a raw answer; those of BYTES without their length."""
    assert response.status_code == 200, response.text
    described = int(response.headers["Inference-Header-Content-Length"])
    outputs, position = {}, described
    for output in json.loads(response.content[:described])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        skipped = 4 if output["datatype"] == "BYTES" else 0
        outputs[output["name"]] = response.content[position + skipped : position + size]
        position += size
    return outputs


def stub_of(server: Triton, model: str) -> psutil.Process:
    """The process that holds a model."""
    (stub,) = (
        child
        for child in psutil.Process(server.pid).children(recursive=True)
        if any(f"/{model}/" in part for part in child.cmdline())
    )
    return stub
