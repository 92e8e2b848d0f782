"""The client against real servers, and the notebook that shows it."""

import ast
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.api.formats.json import regions
from handlers.api.formats.views import encode_picture
from handlers.client import AsyncClient, Client, RefusedError, Result
from handlers.client.results import _run_lengths
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.classes import Classes

pytest_plugins = ("tiny_server",)

NOTEBOOK = Path(__file__).resolve().parents[2] / "handlers" / "client.ipynb"


@pytest.fixture(scope="module")
def urls(server: TorchServe, triton: Triton) -> list[str]:
    return [
        f"{server.url}/predictions/tiny",
        f"{triton.url}/v2/models/tiny",
        f"grpc://127.0.0.1:{triton.grpc_port}/tiny",
    ]


def segment_async(url: str, sources: list[Any]) -> list[Result]:
    async def asking() -> list[Result]:
        async with AsyncClient(url) as client:
            assert await client.is_ready()
            return await asyncio.gather(*(client.segment(source) for source in sources))

    return asyncio.run(asking())


def test_all_servers_give_the_same_to_all_kinds_of_pictures(
    urls: list[str], photo: Callable[..., np.ndarray], model: Segmenter, classes: Classes, tmp_path: Path
) -> None:
    image = photo(5, 90, 150)
    encoded = encode_picture(image, "image/png")
    path = tmp_path / "photo.png"
    path.write_bytes(encoded)
    sources = [path, str(path), encoded, image, Image.fromarray(image)]
    expected = model.segment(image)
    found = []
    for url in urls:
        with Client(url) as client:
            assert client.is_ready()
            found += [client.segment(source) for source in sources]
        found += segment_async(url, sources)
    for result in found:
        np.testing.assert_array_equal(result.labels, expected)
        assert result.labels.dtype == np.uint8
        assert len(result.tokens) == 3
        assert result.tokens[0] > result.tokens[2]
        assert result.timings["compute"] > 0
        assert result.request_id
        assert [(each.id, each.area) for each in result.classes] == [(r.index, r.area) for r in regions(expected)]
        for each in result.classes:
            assert each.name == classes.names[each.id]
            assert each.color == tuple(classes.colors[each.id])
            assert each.share == each.area / expected.size
    overlay = np.asarray(found[0].overlay(0.5)).astype(int)
    np.testing.assert_allclose(overlay, (image.astype(int) + classes.colors[expected]) / 2, atol=1)


def test_options_and_refusals(urls: list[str], photo: Callable[..., np.ndarray], merger: str) -> None:
    image = photo(6)
    for url in urls:
        with Client(url) as client:
            unmerged = client.segment(image, schedule="off")
            assert len(unmerged.tokens) == 1
            assert client.segment(image, merger=merger).tokens[-1] < unmerged.tokens[0]
            view = client.ask(encode_picture(image, "image/png"), view="overlay")
            assert view.body != client.ask(encode_picture(image, "image/png")).body
            with pytest.raises(RefusedError, match="X-MPM-Schedule: expected one of") as told:
                client.segment(image, schedule="1")
            assert told.value.status == 400
            with pytest.raises(RefusedError, match="expected JPEG, PNG"):
                client.segment(b"no picture")


def test_long_and_thin_pictures(urls: list[str], photo: Callable[..., np.ndarray], checkpoint: Path) -> None:
    image = photo(9, 2, 512)
    fitting = load_segmenter(checkpoint, (0, 1), runtime="auto", precision="fp32", inference={"fit": "longer"})
    expected = fitting.segment(image)
    for url in urls:
        with Client(url) as client:
            told = "at most 64 are allowed; where the longer side decides .fit: longer. it needs 5"
            with pytest.raises(RefusedError, match=told):
                client.segment(image)
            np.testing.assert_array_equal(client.segment(image, fit="longer").labels, expected)


def test_upright_where_exif_says_so(urls: list[str], photo: Callable[..., np.ndarray], tmp_path: Path) -> None:
    picture = Image.fromarray(photo(7, 60, 120))
    picture.getexif()[0x112] = 6  # a quarter to the right
    picture.save(tmp_path / "turned.png", exif=picture.getexif())
    with Client(urls[0]) as client:
        result = client.segment(tmp_path / "turned.png")
        again = client.segment(Image.open(tmp_path / "turned.png"))
    assert result.labels.shape == (120, 60)
    assert result.overlay().size == (60, 120)
    np.testing.assert_array_equal(result.labels, again.labels)


def test_run_lengths_are_read_as_they_are_written() -> None:
    dice = np.random.default_rng(0)
    for _ in range(20):
        labels = (dice.random((dice.integers(1, 400), dice.integers(1, 400))) > dice.random()).astype(np.uint8)
        for region in regions(labels):
            runs = _run_lengths(region.counts)
            filled = np.repeat(np.arange(runs.size) % 2, runs)
            filled = np.r_[filled, np.zeros(labels.size - filled.size, int)]
            np.testing.assert_array_equal(filled.reshape(labels.shape[::-1]).T, labels == region.index)


def test_the_notebook_runs(
    server: TorchServe, photo: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell, as Jupyter would, with the address and the picture of this test."""
    Image.fromarray(photo(8)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPM_URL", f"{server.url}/predictions/tiny")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        assert cell["outputs"] == []
        code = compile("".join(cell["source"]), str(NOTEBOOK), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if (awaited := eval(code, names)) is not None:
            asyncio.run(awaited)
    assert names["agreement"] > 0.5
