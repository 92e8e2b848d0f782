"""Folders of pictures: which are found, how many are under way, and what an interruption leaves."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "loadtest"))

from fake_server import FakeServer

from handlers.cli import main
from handlers.folder import Ask, BadPictureError, Job, Shard, find_jobs, segment_jobs, segment_pictures, write_whole

pytest_plugins = ("load_fixtures",)

ALL = Shard(0, 1)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, and answers of an earlier run in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.jpg", "p/a.png", "p/b.png", "p/x/a.jpg", "p/x/y/c.png", "p/masks/b.png", "p/.hidden/d", "p/.e"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def found(*sources: str, out: str = "p/masks", shard: Shard = ALL) -> dict[str, str]:
    return {job.picture: os.path.relpath(job.stem, out) for job in find_jobs(sources, Path(out), shard)}


def test_folders_are_kept_and_names_too_where_they_must(tree: Path) -> None:
    expected = {"p/a.jpg": "a.jpg", "p/a.png": "a.png", "p/b.png": "b", "p/x/a.jpg": "x/a", "p/x/y/c.png": "x/y/c"}
    assert found("p") == expected
    assert found(str(tree / "p")) == {str(tree / picture): name for picture, name in expected.items()}
    assert found("p/**/*.jpg") == {"p/a.jpg": "a", "p/x/a.jpg": "x/a"}
    assert found("p/x*") == {"p/x/a.jpg": "x/a", "p/x/y/c.png": "x/y/c"}
    assert found("p/x", "p/b.png", "none.jpg") == {
        "p/x/a.jpg": "a",
        "p/x/y/c.png": "y/c",
        "p/b.png": "b",
        "none.jpg": "none",
    }
    for sources, out, told in (
        (["p/a.jpg", "p/x/a.jpg"], "m", "expected names that differ, got p/a.jpg and p/x/a.jpg"),
        (["p/x", "p/a.jpg", "p/*.jpg"], "m", "expected names that differ"),
        (["p"], "p", "expected a folder without the pictures, got one with a.jpg"),
        (["nothing*.jpg"], "m", "expected pictures, got folders without any"),
    ):
        with pytest.raises(ValueError, match=told):
            found(*sources, out=out)


def test_shards_share_the_pictures_out_by_name(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
    parts = [found(str(tmp_path), out="m", shard=Shard(i, 5)) for i in range(5)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 300
    assert min(map(len, parts)) > 30
    (tmp_path / "one more.png").touch()
    again = [found(str(tmp_path), out="m", shard=Shard(i, 5)) for i in range(5)]
    assert sum(len(new.keys() - old.keys()) for new, old in zip(again, parts, strict=True)) == 1


def jobs_of(folder: Path, number: int) -> list[Job]:
    folder.mkdir(exist_ok=True)
    for i in range(number):
        (folder / f"{i}.jpg").write_bytes(b"%d" % i)
    return find_jobs([str(folder)], folder.parent / "out", ALL)


def test_no_more_than_that_are_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(tmp_path / "p", 200)
    lock, inside, most = threading.Lock(), 0, 0

    def ask(picture: bytes) -> dict[str, bytes]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.001)
        with lock:
            inside -= 1
        if int(picture) % 50 == 7:
            raise BadPictureError("odd")
        return {"png": picture, "json": b"{}"}

    failed = segment_jobs(jobs, ask, ["png", "json"], at_once=4)
    assert (set(failed.values()), len(failed), most) == ({"odd"}, 4, 4)
    assert (tmp_path / "out" / "9.png").read_bytes() == b"9"
    assert len(list((tmp_path / "out").iterdir())) == 2 * 196


def test_only_what_is_left_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "p", tmp_path / "out"
    jobs_of(folder, 20)
    asked: list[bytes] = []

    @contextmanager
    def asking() -> Iterator[tuple[Ask, int]]:
        def ask(picture: bytes) -> dict[str, bytes]:
            asked.append(picture)
            return {"png": picture, "json": b"{}"}

        yield ask, 3

    def run() -> str:
        asked.clear()
        assert segment_pictures([str(folder)], out, asking(), ["png", "json"], shard=ALL, resume=True) == 0
        return capsys.readouterr().err

    assert "20 of 20 pictures written" in run()
    (out / "9.json").unlink()
    (out / "10.png").write_bytes(b"")  # as a machine leaves it that lost its power
    assert ", 18 were there" in run()
    assert sorted(asked) == [b"10", b"9"]
    assert "0 of 20 pictures written" in run()
    assert not asked


def test_an_interruption_leaves_whole_files_only(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "p", 50)
    asked = 0

    def ask(picture: bytes) -> dict[str, bytes]:
        nonlocal asked
        asked += 1
        if asked == 20:
            raise KeyboardInterrupt
        return {"png": picture * 1000}

    with pytest.raises(KeyboardInterrupt):
        segment_jobs(jobs, ask, ["png"], at_once=2)
    written = list((tmp_path / "out").iterdir())
    assert 10 < len(written) < 30
    assert all(path.read_bytes() == path.stem.encode() * 1000 for path in written)


def test_what_can_not_be_written_ends_it(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "p", 3)
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(OSError, match="out"):
        segment_jobs(jobs, lambda picture: {"png": picture}, ["png"], at_once=2)
    target = tmp_path / "folder" / "mask.png"
    target.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_whole(str(target), b"mask")
    assert list((tmp_path / "folder").iterdir()) == [target]


def test_a_server_that_is_busy_or_leaves(
    fake: FakeServer, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").mkdir()
    for path in pictures.iterdir():
        (tmp_path / "p" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "p" / "bad.png").write_bytes(b"no picture")
    fake.refusals = 3
    command = ["segment", str(tmp_path / "p"), "--url", f"{fake.url}/predictions/fake", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "3 of 4 pictures written" in told
    assert f"{tmp_path / 'p' / 'bad.png'}: not a picture" in told
    assert len(list((tmp_path / "out").iterdir())) == 3
    fake.status = 404
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(f"{fake.url}/predictions/fake: no room\n")
