"""How tests talk to Triton."""

import json

import psutil

from handlers.client import Answer, fetch
from handlers.launch.triton import Triton

TIMEOUT = 60
RAW = {"Inference-Header-Content-Length": "0", "Accept-Encoding": "identity", "Connection": "close"}


def infer_raw(url: str, model: str, data: bytes, **headers: str) -> Answer:
    """Post a picture as the whole body, as curl would."""
    sent = RAW | {name.replace("_", "-"): value for name, value in headers.items()}
    return fetch(f"{url}/v2/models/{model}/infer", data, headers=sent, timeout_seconds=TIMEOUT)


def raw_outputs(answer: Answer) -> dict[str, bytes]:
    """The values of a raw answer; those of BYTES without their length."""
    assert answer.status == 200, answer.error
    described = int(answer.headers["inference-header-content-length"])
    outputs, position = {}, described
    for output in json.loads(answer.body[:described])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        skipped = 4 if output["datatype"] == "BYTES" else 0
        outputs[output["name"]] = answer.body[position + skipped : position + size]
        position += size
    return outputs


def stub_of(server: Triton, model: str) -> psutil.Process:
    """The process that holds a model."""
    children = psutil.Process(server.pid).children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]  # Triton never buries a dead one
    (stub,) = (child for child in alive if any(f"/{model}/" in part for part in child.cmdline()))
    return stub
