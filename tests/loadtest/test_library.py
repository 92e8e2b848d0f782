"""A server whose masks are not the library's is found out before any load."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_server import FakeServer
from locust_runs import Ended, Run
from PIL import Image

from handlers.launch.torchserve import TorchServe
from loadtest.__main__ import main
from loadtest.masks import Library, read_mask, read_masks, served
from loadtest.page import render
from loadtest.pictures import read_frame
from mpm_ops import load_segmenter

pytest_plugins = ("load_fixtures", "tiny_server")

SERVED = "0,1"  # the schedule of the model `tiny`


@pytest.fixture
def right_masks(pictures: Path, tmp_path: Path) -> Path:
    """What the server that computes nothing has to answer."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in pictures.iterdir():
        labels = (read_frame(path).mean(axis=2) // 52).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{path.name}.png")
    return folder


class TestIdleServers:
    @pytest.mark.parametrize("processes", [[], ["--processes=2"]])
    def test_every_process_compares(self, run_locust: Run, right_masks: Path, processes: list[str]) -> None:
        (right_masks / "2.png.png").unlink()  # a sample
        ended = run_locust(*processes, rate=20, run_time=1, raw="30%", library_masks=right_masks)
        assert ended.status == 0
        assert ended.summary["library"] == {"compared": 2, "least": 1.0, "pictures": {"0.png": 1.0, "1.png": 1.0}}

    def test_another_mask_is_no_run(self, run_locust: Run, right_masks: Path) -> None:
        def first_row_wrong(labels: np.ndarray, _: int) -> np.ndarray:
            return np.concatenate([(labels[:1] + 1) % 5, labels[1:]])

        run_locust.fake.mask = first_row_wrong  # always so: idle and under load agree
        assert run_locust(rate=20, run_time=1).status == 0
        ended = run_locust(rate=20, run_time=1, library_masks=right_masks)
        shares = "97.92 % of the pixels agree, expected at least 99 %"
        assert f"0.png from {run_locust.fake.url} when idle: not the library's mask: {shares}" in ended.output
        assert ended.status == 2

    def test_masks_of_other_pictures(self, run_locust: Run, right_masks: Path) -> None:
        (right_masks / "0.png.png").write_bytes((right_masks / "1.png.png").read_bytes())
        ended = run_locust(rate=20, run_time=1, library_masks=right_masks)
        assert "compared with the library's mask: wrong: another size than the reference" in ended.output
        (right_masks / "0.png.png").rename(right_masks / "gone.png.png")
        ended = run_locust(rate=20, run_time=1, library_masks=right_masks)
        assert "expected masks of pictures that are sent, got one of 'gone.png'" in ended.output


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
        assert main(["masks", *named, *map(str, sorted(pictures.iterdir()))]) == 0
        masks = read_masks(tmp_path)
        assert list(masks) == ["0.png", "1.png", "2.png"]
        for name, png in masks.items():
            np.testing.assert_array_equal(read_mask(png)[0], model.segment(read_frame(pictures / name)))

    def test_it_merges_as_the_server_says(self, fake: FakeServer) -> None:
        assert [served(name, f"{fake.url}/metrics") for name in ("schedule", "align")] == ["2,5", "1"]
        fake.also_serve("other")
        with pytest.raises(ValueError, match=r"variant: expected --variant, or metrics .* got \['fake', 'other'\]"):
            served("variant", f"{fake.url}/metrics")

    def test_what_is_wrong_is_named(
        self, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        masks = ["masks", str(pictures / "0.png"), "--out", str(tmp_path), "--checkpoint"]
        assert main([*masks, str(checkpoint.with_name("missing.pth"))]) == 2
        assert "missing.pth" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"loadtest masks: schedule: expected .* got 'never'"):
            Library(checkpoint=checkpoint, schedule="never").masks([pictures / "0.png"])
        with pytest.raises(ValueError, match=r"library-masks: expected what `mpm loadtest masks` writes"):
            read_masks(tmp_path)


class TestRealServer:
    @pytest.fixture
    def run(
        self,
        server: TorchServe,
        metrics_port: int,
        checkpoint: Path,
        photo: Callable[..., np.ndarray],
        run_locust: Run,
        tmp_path: Path,
    ) -> Callable[..., Ended]:
        folder = tmp_path / "photos"
        folder.mkdir()
        for seed in range(3):
            Image.fromarray(photo(seed)).save(folder / f"{seed}.jpg", quality=95)
        options = {
            "host": server.url,
            "model": "tiny",
            "metrics": f"http://127.0.0.1:{metrics_port}/metrics",
            "pictures": folder,
            "accept": "png=80%,json=20%",
            "raw": "40%",
            "rate": 4,
            "run_time": 2,
            "min_agreement": "95%",
        }

        def run(checkpoint: Path = checkpoint, schedule: str = SERVED) -> Ended:
            masks, pictures = tmp_path / "library", map(str, sorted(folder.iterdir()))
            named = ["--checkpoint", str(checkpoint), "--schedule", schedule, "--out", str(masks)]
            assert main(["masks", *named, *pictures]) == 0
            return run_locust(**options, library_masks=masks)

        return run

    def test_the_checkpoint_that_is_served(self, run: Callable[..., Ended]) -> None:
        ended = run()
        assert ended.status == 0, ended.output
        assert ended.summary["library"]["compared"] == 3
        assert ended.summary["library"]["least"] > 0.99
        assert "as the library" in render(ended.summary)

    @pytest.mark.slow
    def test_another_schedule(self, run: Callable[..., Ended]) -> None:
        ended = run(schedule="off")
        assert ended.status == 2
        assert "when idle: not the library's mask" in ended.output

    @pytest.mark.slow
    def test_another_checkpoint(self, run: Callable[..., Ended], checkpoint: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "variant.yml").write_bytes((checkpoint.parent / "variant.yml").read_bytes())
        weights = torch.load(checkpoint, weights_only=True)["model"]
        torch.save({"model": {name: 0.9 * value for name, value in weights.items()}}, other / "checkpoint.pth")
        ended = run(checkpoint=other / "checkpoint.pth")
        assert ended.status == 2
        assert "when idle: not the library's mask" in ended.output
