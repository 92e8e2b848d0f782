"""What is sent."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadtest.pictures import draw_sample, ensure_pictures, load_mix

pytest_plugins = ("load_fixtures",)


def test_kinds_and_pictures_come_as_often_as_asked_for(pictures: Path) -> None:
    mix = load_mix(
        pictures, shares={"png": 0.65, "json": 0.2, "raw": 0.1, "bad": 0.05}, weights={"0.png": 2, "2*": 0}, seed=1
    )
    chosen = [mix.choose(number) for number in range(4000)]
    kinds = Counter(item.kind for item in chosen)
    assert kinds["json"] == pytest.approx(800, abs=110)
    assert kinds["raw"] == pytest.approx(400, abs=80)
    assert kinds["bad"] == pytest.approx(200, abs=60)
    names = Counter(item.name for item in chosen if item.kind == "png")
    assert set(names) == {"0.png", "1.png"}
    assert names["0.png"] / names["1.png"] == pytest.approx(2, rel=0.15)


def test_a_request_sends_the_same_whoever_sends_it(pictures: Path) -> None:
    mixes = [load_mix(pictures, shares={"png": 0.5, "json": 0.5}, seed=7) for _ in range(2)]
    assert [mixes[0].choose(i) for i in range(50)] == [mixes[1].choose(i) for i in range(50)]


def test_a_raw_frame_holds_the_pixels(pictures: Path) -> None:
    mix = load_mix(pictures, shares={"raw": 1.0})
    frame = np.load(io.BytesIO(mix.items["raw", "0.png"].body))
    assert (frame == np.asarray(Image.open(pictures / "0.png"))).all()


def test_a_turned_photo_is_as_large_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    mix = load_mix(tmp_path)
    assert mix.items["png", "turned.jpg"].size == (40, 20)


def test_bad_settings_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected pictures"):
        load_mix(pictures, weights={"*": 0})
    with pytest.raises(ValueError, match=r"pictures: expected a folder, got .*missing"):
        load_mix(tmp_path / "missing")
    (tmp_path / "not.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"not\.jpg: not a picture"):
        load_mix(tmp_path)


def test_painted_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    scenes = {"clutter": (0, 1), "sizes": ((64, 48),)}
    for name in ("a", "b"):
        ensure_pictures(tmp_path / name, scenes)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == ["clutter000_64x48.jpg", "clutter100_64x48.jpg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    ensure_pictures(tmp_path / "a", {"clutter": (0.5,), "sizes": ((64, 48),)})
    assert len(list((tmp_path / "a").iterdir())) == 2  # what is there stays


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    files = [Path(f"a/{i}.jpg") for i in range(9)]
    assert draw_sample(files, 9, seed=0) == files
    drawn = draw_sample(files, 3, seed=0)
    assert len(set(drawn)) == 3
    assert drawn == draw_sample(files[::-1], 3, seed=0)
    assert any(drawn != draw_sample(files, 3, seed=seed) for seed in range(1, 9))
