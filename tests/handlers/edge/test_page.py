"""The page in a real browser, in front of a real server."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fronting import fronted
from PIL import Image

from handlers.api.formats.views import encode_picture
from handlers.launch.torchserve import TorchServe
from mpm_ops import Segmenter
from mpm_ops.classes import Classes

playwright = pytest.importorskip("playwright.sync_api")
pytest_plugins = ("tiny_server",)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

# As from a folder of the desktop.
DROP = """
([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(bytes)], name));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}
"""

# Pixels of the mask that hide nothing of the picture.
CLEAR = """
() => {
  const mask = document.querySelector("#mask");
  const { data } = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
  return data.filter((value, i) => i % 4 === 3 && value === 0).length;
}
"""


@pytest.fixture(scope="module")
def page(server: TorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Opened in a browser; whatever its console complains of fails the test."""
    models = tmp_path_factory.mktemp("edge") / "models"
    models.write_text(json.dumps({"tiny": server.watched[f"{server.url}/predictions/tiny"]}))
    complaints: list[str] = []
    with fronted(server.url, "torchserve", "--models", str(models)) as edge, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.set_default_timeout(20_000)
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(edge.url)
        yield opened
        browser.close()
    assert [told for told in complaints if "status of 400" not in told] == []  # of the broken file


@pytest.fixture(scope="module")
def picture(photo: Callable[..., np.ndarray]) -> np.ndarray:
    return photo(7, 96, 300)  # three windows


def shown(page: Any) -> None:
    """Wait until a picture's answers are there."""
    page.wait_for_selector("#busy", state="hidden")
    page.wait_for_selector("#classes li")


def test_a_picture_that_is_dropped_is_segmented(
    page: Any, picture: np.ndarray, model: Segmenter, classes: Classes
) -> None:
    page.wait_for_selector("#merger option", state="attached")
    page.evaluate(DROP, ["street.png", list(encode_picture(picture, "image/png"))])
    page.wait_for_selector("#classes li")
    shown(page)
    expected = np.bincount(model.segment(picture).ravel(), minlength=11) / picture[..., 0].size
    order = [i for i in np.argsort(-expected, kind="stable") if expected[i]]
    rows = page.locator("#classes li").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == [classes.names[i] for i in order]
    assert [row.split("\n")[-1] for row in rows] == [f"{100 * expected[i]:.1f} %" for i in order]
    assert page.locator("#agreement").inner_text().endswith(" %")
    assert page.locator("#times .bar").count() == 2
    assert page.locator("#steps button").count() == 3
    assert "curl -T 'street.png'" in page.locator("#command").inner_text()


def test_a_class_that_is_pointed_at_lights_up(page: Any, picture: np.ndarray, model: Segmenter) -> None:
    areas = np.bincount(model.segment(picture).ravel(), minlength=11)
    rows = page.locator("#classes .class")
    for i in (0, 1):
        rows.nth(i).hover()  # the others are dark
        assert page.evaluate(CLEAR) == areas[int(rows.nth(i).get_attribute("data-id"))]
    page.mouse.move(1, 1)
    assert page.evaluate(CLEAR) == 0


def test_a_patch_tells_who_shares_its_token(page: Any) -> None:
    page.click("#steps button:nth-child(2)")  # after the first merge
    page.locator("#picture").scroll_into_view_if_needed()
    box = page.locator("#picture").bounding_box()
    told = set()
    for i in range(1, 40):
        page.mouse.move(box["x"] + box["width"] * i / 40, box["y"] + box["height"] / 2)
        told.add(page.locator("#readout").inner_text())
    assert any(text.endswith(": 2 patches share this token") for text in told)
    page.focus("#picture")
    page.keyboard.press("ArrowRight")
    assert "token" in page.locator("#readout").inner_text()
    page.click("#steps button:nth-child(1)")
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    assert page.locator("#readout").inner_text().endswith(": a patch with a token of its own")


def test_the_schedule_can_be_switched(page: Any) -> None:
    page.select_option("#merger", "off")
    page.wait_for_selector("#steps button:nth-child(2)", state="detached")
    shown(page)
    assert "%" not in page.locator("#agreement").inner_text()
    assert "X-MPM-Schedule: off" in page.locator("#command").inner_text()
    page.select_option("#merger", "0,1")
    page.wait_for_selector("#steps button:nth-child(3)")
    shown(page)


def test_a_broken_file_is_named_and_the_picture_stays(page: Any) -> None:
    page.set_input_files("#file", {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    page.wait_for_selector("#alert:visible")
    assert page.locator("#alert-title").inner_text() == "broken.jpg could not be read"
    assert "expected JPEG, PNG" in page.locator("#alert-text").inner_text()
    assert page.locator("#classes li").count() > 0


def test_downloads_are_the_servers_answer(page: Any, picture: np.ndarray, model: Segmenter, tmp_path: Path) -> None:
    saved = {}
    for name in ("mask", "json", "overlay"):
        with page.expect_download() as download:
            page.click(f"#save-{name}")
        saved[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    assert set(saved) == {"street_mask.png", "street.json", "street_overlay.png"}
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(saved["street_mask.png"]))), model.segment(picture))
    assert json.loads(saved["street.json"])["height"] == 96
    assert Image.open(io.BytesIO(saved["street_overlay.png"])).size == (300, 96)


def test_figures_are_live(page: Any) -> None:
    page.wait_for_selector("#live:visible")
    assert page.locator("#live-saved").inner_text().endswith(" %")
