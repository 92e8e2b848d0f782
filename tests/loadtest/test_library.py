"""A server whose masks are not the library's is found out before any load."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_server import FakeServer
from PIL import Image

from handlers.launch.torchserve import TorchServe
from loadtest import library
from loadtest.__main__ import main
from loadtest.client.masks import decode_mask
from loadtest.client.pictures import read_frame
from loadtest.client.shapes import steady
from loadtest.preparing import Library, draw_sample, library_masks, read_masks, served_library
from loadtest.report.summary import Limits, summarize
from loadtest.running import RunError, run_load
from loadtest.settings import LoadSettings
from loadtest.slo import Slo
from mpm_ops import load_segmenter

pytest_plugins = ("load_fixtures", "tiny_server")

SERVED = "0,1"  # the schedule of the model `tiny`


def grey_png(labels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def right_masks(pictures: Path) -> dict[str, str]:
    """What the server that computes nothing has to answer."""
    return {path.name: grey_png((read_frame(path).mean(axis=2) // 52).astype(np.uint8)) for path in pictures.iterdir()}


def settings(fake: FakeServer, pictures: Path, masks: dict[str, str], num_workers: int = 1) -> LoadSettings:
    return LoadSettings(
        urls=(fake.url,),
        model="fake",
        pictures=str(pictures),
        phases=steady(20, 0.5),
        shares={"raw": 0.3},
        library=masks,
        num_workers=num_workers,
    )


class TestIdleServers:
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_every_worker_compares(self, fake: FakeServer, pictures: Path, num_workers: int) -> None:
        masks = right_masks(pictures)
        del masks["2.png"]  # a sample
        run = settings(fake, pictures, masks, num_workers)
        result = run_load(run)
        assert result.library == {"0.png": 1.0, "1.png": 1.0}
        summary = summarize(run, result, Limits(slo=Slo.parse("errors=0")))
        assert summary["library"] == {"compared": 2, "least": 1.0, "pictures": {"0.png": 1.0, "1.png": 1.0}}
        assert summary["settings"]["library"] == ["0.png", "1.png"]

    def test_another_mask_is_no_run(self, fake: FakeServer, pictures: Path) -> None:
        def first_row_wrong(labels: np.ndarray, _: int) -> np.ndarray:
            return np.concatenate([(labels[:1] + 1) % 5, labels[1:]])

        fake.mask = first_row_wrong  # always so: idle and under load agree
        run_load(settings(fake, pictures, {}))
        told = (
            rf"0\.png from {fake.url} when idle: not the library's mask: 97\.92 % of the pixels agree, expected .* 99"
        )
        with pytest.raises(RunError, match=told):
            run_load(settings(fake, pictures, right_masks(pictures)))

    def test_masks_of_other_pictures(self, fake: FakeServer, pictures: Path) -> None:
        masks = right_masks(pictures)
        with pytest.raises(RunError, match=r"expected masks of pictures that are sent, got one of 'gone\.png'"):
            run_load(settings(fake, pictures, {"gone.png": masks["0.png"]}))
        with pytest.raises(RunError, match=r"held against the library's mask: wrong: another size than the reference"):
            run_load(settings(fake, pictures, masks | {"0.png": masks["1.png"]}))


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    names = [f"{i}.jpg" for i in range(9)]
    assert draw_sample(Path("a"), names, 9, seed=0) == [Path("a") / name for name in names]
    drawn = draw_sample(Path("a"), names, 3, seed=0)
    assert len(set(drawn)) == 3
    assert drawn == draw_sample(Path("a"), names[::-1], 3, seed=0)
    assert any(drawn != draw_sample(Path("a"), names, 3, seed=seed) for seed in range(1, 9))


def test_the_schedule_comes_from_the_metrics(fake: FakeServer) -> None:
    found = served_library(Path("a.pth"), [f"{fake.url}/metrics"])
    assert (found.schedule, found.align) == ("2,5", 1)
    with pytest.raises(ValueError, match=r"schedule: expected --schedule, or metrics .* got none"):
        served_library(Path("a.pth"), [])
    with pytest.raises(ValueError, match=r"schedule: expected --schedule, or metrics that tell it: .*refused"):
        served_library(Path("a.pth"), ["http://127.0.0.1:1/metrics"])


def test_pictures_are_upright_and_opaque(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_frame(tmp_path / "turned.jpg").shape == (40, 30, 3)
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_frame(tmp_path / "clear.png") == 255).all()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"broken\.png: not a picture"):
        read_frame(tmp_path / "broken.png")


class TestCommand:
    def test_it_writes_what_the_library_says(self, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
        model = load_segmenter(checkpoint, (0, 1), 8)
        named = ["--checkpoint", str(checkpoint), "--schedule", SERVED, "--align", "8", "--out", str(tmp_path)]
        assert library.main([*named, *map(str, sorted(pictures.iterdir()))]) == 0
        masks = read_masks(tmp_path)
        assert list(masks) == ["0.png", "1.png", "2.png"]
        for name, png in masks.items():
            labels, _ = decode_mask(base64.b64decode(png))
            np.testing.assert_array_equal(labels, model.segment(read_frame(pictures / name)))

    def test_what_is_wrong_is_named(self, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
        picture = [pictures / "0.png"]
        with pytest.raises(RunError, match=r"no masks of the library: .*missing\.pth"):
            library_masks(Library(checkpoint=checkpoint.with_name("missing.pth"), schedule="off"), picture)
        with pytest.raises(RunError, match=r"no masks of the library: schedule: expected .* got 'never'"):
            library_masks(Library(checkpoint=checkpoint, schedule="never"), picture)
        with pytest.raises(ValueError, match=r"library-masks: expected what python -m loadtest\.library writes"):
            read_masks(tmp_path)


class TestRealServer:
    @pytest.fixture
    def run(
        self,
        server: TorchServe,
        metrics_port: int,
        checkpoint: Path,
        photo: Callable[..., np.ndarray],
        tmp_path: Path,
    ) -> Callable[..., int]:
        folder = tmp_path / "photos"
        folder.mkdir()
        for seed in range(3):
            Image.fromarray(photo(seed)).save(folder / f"{seed}.jpg", quality=95)

        def run(*more: str) -> int:
            where = ["--url", server.url, "--model", "tiny", "--metrics", f"http://127.0.0.1:{metrics_port}/metrics"]
            what = ["--pictures", str(folder), "--raw", "40%", "--json", "20%", "--rate", "4", "--seconds", "2"]
            judged = ["--min-agreement", "95%", "--max-lateness", "1m", "--out", str(tmp_path / "report.html")]
            return main([*where, *what, *judged, "--checkpoint", str(checkpoint), *more])

        return run

    def test_the_checkpoint_that_is_served(self, run: Callable[..., int], tmp_path: Path) -> None:
        assert run("--library-sample", "2") == 0
        compared = json.loads((tmp_path / "report.json").read_text())["library"]
        assert compared["compared"] == 2
        assert compared["least"] > 0.99
        assert "as the library" in (tmp_path / "report.html").read_text()

    def test_another_schedule(self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--schedule", "off") == 2
        assert "when idle: not the library's mask" in capsys.readouterr().err

    def test_another_checkpoint(
        self, run: Callable[..., int], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "variant.yml").write_bytes((checkpoint.parent / "variant.yml").read_bytes())
        weights = torch.load(checkpoint, weights_only=True)["model"]
        torch.save({"model": {name: 0.9 * value for name, value in weights.items()}}, other / "checkpoint.pth")
        assert run("--checkpoint", str(other / "checkpoint.pth")) == 2
        assert "when idle: not the library's mask" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--library-sample", "0"], "library-sample: expected an integer >= 1, got 0"),
            (["--library-masks", "somewhere"], "library-masks: expected without --checkpoint"),
            (["--metrics", "none"], "metrics: expected http://HOST:PORT/metrics, got 'none'"),
        ],
    )
    def test_options(
        self, run: Callable[..., int], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*more) == 2
        assert message in capsys.readouterr().err
