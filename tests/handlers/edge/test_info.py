"""What the edge tells of the service by itself, in front of real servers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import requests
from fronting import Front, fronted
from openapi_spec_validator import validate

from handlers.api.formats.views import encode_picture
from handlers.edge.info import figures_of
from handlers.launch.processes import Server
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from mpm_ops.classes import Classes

pytest_plugins = ("tiny_server",)


@pytest.fixture(scope="module")
def edges(server: TorchServe, triton: Triton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Front]]:
    folder = tmp_path_factory.mktemp("edges")

    def models(name: str, of: Server) -> str:
        (folder / name).write_text(json.dumps({url.rpartition("/")[2]: told for url, told in of.watched.items()}))
        return str(folder / name)

    example = folder / "a b.png"
    example.write_bytes(encode_picture(np.zeros((8, 8, 3), np.uint8), "image/png"))
    first = fronted(server.url, "torchserve", "--models", models("first", server), "--example", str(example))
    with first as one, fronted(triton.url, "triton", "--models", models("second", triton), "--no-page") as two:
        yield {"torchserve": one, "triton": two}


@pytest.fixture(params=["torchserve", "triton"])
def edge(request: pytest.FixtureRequest, edges: dict[str, Front]) -> Front:
    return edges[request.param]


def get(edge: Front, path: str) -> Any:
    answer = requests.get(edge.url + path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json"), answer.text
    return answer.json()


def test_models_are_described_alike(edges: dict[str, Front], classes: Classes, merger: str) -> None:
    told = {name: get(edge, "/info") for name, edge in edges.items()}
    assert {name: info["server"] for name, info in told.items()} == {name: name for name in edges}
    one, two = ({model["name"]: model for model in info["models"]}["tiny"] for info in told.values())
    assert one == two
    assert (one["path"], one["precision"]) == ("/predictions/tiny", "fp32")
    assert one["limits"]["max_image_bytes"] == 24 * 2**20
    assert [each["name"] for each in one["classes"]] == list(classes.names)
    assert [each["color"] for each in one["classes"]] == classes.colors.tolist()
    default, *others = one["mergers"]
    assert (default["is_default"], default["header"], default["value"]) == (True, "X-MPM-Schedule", "0,1")
    asked_by = [(each["header"], each["value"]) for each in others]
    assert asked_by == [("X-MPM-Schedule", "off"), ("X-MPM-Merger", merger)]


def test_what_is_described_is_allowed(edge: Front, photo: Callable[..., np.ndarray]) -> None:
    picture = encode_picture(photo(4), "image/png")
    info = get(edge, "/info")
    model = next(model for model in info["models"] if model["name"] == "tiny")
    for merger in model["mergers"]:
        headers = {merger["header"]: merger["value"]}
        assert requests.post(edge.url + model["path"], data=picture, headers=headers).status_code == 200
    for media_type in model["media_types"]:
        answer = requests.post(edge.url + model["path"], data=picture, headers={"Accept": media_type})
        assert answer.headers["Content-Type"] == media_type
    for view in model["views"]:
        assert requests.post(edge.url + model["path"], data=picture, headers={"X-MPM-View": view}).status_code == 200


def test_figures_count_pictures_and_tokens(edge: Front, photo: Callable[..., np.ndarray]) -> None:
    picture = encode_picture(photo(5), "image/png")
    before = requests.get(edge.url + "/live").json()["models"]["tiny"]
    for _ in range(2):
        assert requests.post(f"{edge.url}/predictions/tiny", data=picture).status_code == 200
    after = before
    while after == before:  # a second old at most
        after = requests.get(edge.url + "/live").json()["models"]["tiny"]
    assert after["pictures"] - before["pictures"] in (1, 2)
    assert 0 < after["tokens_saved"] < after["tokens"]
    assert 0 < after["merge_seconds"] < after["compute_seconds"]


def test_figures_leave_out_what_never_merges() -> None:
    lines = [
        f'mpm_tokens_total{{model="a",point="{point}",stage="{stage}",schedule="{schedule}"}} {value}'
        for point, stage, schedule, value in (
            ("in", 0, "2,5", 100),
            ("out", 0, "2,5", 80),
            ("in", 1, "2,5", 80),
            ("out", 1, "2,5", 80),
            ("in", 0, "off", 1000),
            ("out", 0, "off", 1000),
        )
    ]
    figures = figures_of("# TYPE mpm_tokens counter\n" + "\n".join(lines) + "\n")
    assert (figures["tokens"], figures["tokens_saved"], figures["pictures"]) == (100, 20, 0)


def test_openapi_is_valid_and_names_what_is_served(edges: dict[str, Front], merger: str) -> None:
    for name, edge in edges.items():
        document = get(edge, "/openapi.json")
        validate(document)
        parameters = document["components"]["parameters"]
        assert "tiny" in parameters["Model"]["schema"]["enum"]
        assert {"0,1", "off"} <= set(parameters["Schedule"]["schema"]["enum"])
        assert parameters["Merger"]["schema"]["enum"] == [merger]
        assert ("/v2/models/{name}/infer" in document["paths"]) == (name == "triton")


def test_answers_are_those_of_openapi(edge: Front, photo: Callable[..., np.ndarray]) -> None:
    document = get(edge, "/openapi.json")

    def check(answer: requests.Response, path: str, method: str) -> None:
        responses = document["paths"][path][method]["responses"]
        described = responses[str(answer.status_code)]
        if "$ref" in described:
            described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
        media_type = answer.headers["Content-Type"].partition(";")[0]
        schema = described["content"][media_type].get("schema") if answer.content else None
        if schema and media_type == "application/json":
            jsonschema.validate(answer.json(), {**schema, "components": document["components"]})

    picture = encode_picture(photo(6), "image/png")
    for path, methods in document["paths"].items():
        if "get" in methods:
            check(requests.get(edge.url + path), path, "get")
    segment = "/predictions/{name}"
    for data, headers in (
        (picture, {}),
        (picture, {"Accept": "application/json"}),
        (picture, {"X-MPM-View": "maps"}),
        (picture, {"X-MPM-View": "overlay", "Accept": "image/jpeg"}),
        (picture, {"Accept": "text/html"}),
        (picture, {"X-MPM-Schedule": "99"}),
        (picture, {"Content-Encoding": "br"}),
        (b"no picture", {}),
        (bytes(40 * 2**20), {}),
    ):
        check(requests.post(f"{edge.url}/predictions/tiny", data=data, headers=headers), segment, "post")
    instances = {"instances": [{"b64": ""}]}
    check(requests.post(f"{edge.url}/v1/models/tiny:predict", json=instances), "/v1/models/{name}:predict", "post")


def test_page_is_ours_alone(edges: dict[str, Front]) -> None:
    edge = edges["torchserve"]
    page = requests.get(edge.url)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in page.headers["Content-Security-Policy"]
    static = Path(__file__).resolve().parents[3] / "handlers" / "edge" / "static"
    for file in static.iterdir():
        assert requests.get(f"{edge.url}/page/{file.name}").content == file.read_bytes()
        assert "http" not in file.read_text().replace("http://www.w3.org/2000/svg", "").replace("https or this", "")
    (example,) = get(edge, "/info")["examples"]
    assert requests.get(edge.url + example).headers["Content-Type"] == "image/png"
    for path in ("/page/../app.py", "/page/", "/examples/", "/examples/../first", "/page/%2e%2e/app.py"):
        assert requests.get(edge.url + path).status_code in (400, 404, 405)


def test_no_page_leaves_the_description(edges: dict[str, Front]) -> None:
    edge = edges["triton"]
    assert requests.get(edge.url).status_code in (400, 404)  # Triton's
    assert requests.get(f"{edge.url}/page/main.js").status_code in (400, 404)
    assert get(edge, "/info")["examples"] == []


def test_a_model_that_does_not_answer_is_named(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.write_text('{"gone": "http://127.0.0.1:9/metrics"}')
    with fronted("http://127.0.0.1:9", "triton", "--models", str(models)) as edge:
        (model,) = get(edge, "/info")["models"]
        assert model == {"name": "gone", "is_ready": False, "path": "/predictions/gone"}
        assert get(edge, "/live") == {"models": {}}
        validate(get(edge, "/openapi.json"))
