"""How tests talk to Triton."""

import json

import psutil
import requests

from handlers.launch.triton import Triton

TIMEOUT = 60
RAW = {"Inference-Header-Content-Length": "0", "Accept-Encoding": "identity", "Connection": "close"}


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
    children = psutil.Process(server.pid).children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]  # Triton never buries a dead one
    (stub,) = (child for child in alive if any(f"/{model}/" in part for part in child.cmdline()))
    return stub
