"""The command `mpm`: what it offers, how it starts, and `segment` in its own process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from handlers import cli
from handlers.api.decode import decode_image
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.cli import main
from mpm_ops import load_segmenter
from mpm_ops.classes import load_classes

pytest_plugins = ("tiny_server",)

COMMANDS = {
    "bench", "build", "check-manifests", "evaluate", "health", "loadtest", "monitor", "samples", "segment", "serve",
    "simulate",
}  # fmt: skip
OPTIONS = ("--schedule", "0,1", "--runtime", "torch", "--precision", "fp32")


def mpm(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", "-m", "handlers", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_help_lists_all_commands_and_imports_no_model() -> None:
    done = mpm("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  (\S+)", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) >= COMMANDS
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not {"torch", "numpy", "PIL", "cv2", "mpm_ops", "locust", "gevent"} & imported


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", "segment"),
        ("serve --lame", "--lame-duck-seconds"),
        ("bench model --im", "--images"),
        ("loadtest ", "capacity"),
    ],
)
def test_shells_complete(typed: str, offered: str) -> None:
    words = f"mpm {typed}"
    number = len(words.split()) - (not words.endswith(" "))
    done = mpm(_MPM_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(number))
    assert f"plain,{offered}" in done.stdout.splitlines()


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "promql_parser", None)
    monkeypatch.delitem(sys.modules, "k8s.check", raising=False)
    assert main(["check-manifests"]) == 2
    told = "import of promql_parser halted; None in sys.modules; see the extras of mpm-segmenter in its README\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment"], "Missing argument 'PICTURE|FOLDER|PATTERN...'"),
        (
            ["segment", ".", "--url", "http://h/predictions/x", "--runtime", "torch"],
            "--runtime: expected without --url",
        ),
        (["segment", "empty"], "PICTURE: expected pictures, got folders without any"),
        (["segment", "a.png", "--out", "."], "--out: expected a folder without the pictures, got one with a.png"),
        (["segment", "a.png", "b/a.png"], "PICTURE: expected names that differ"),
        (
            ["segment", "a.png", "--format", "png,gif"],
            "expected some of png, json, npy, grey, overlay",
        ),
        (["segment", "a.png", "--shard", "2/2"], "expected one such as 0/16 to 15/16, got '2/2'"),
        (["segment", "a.png", "--config", "a.png"], "a.png: expected a mapping, got NoneType"),
        (["segment", "a.png", "--schedule", "two"], "schedule: expected"),
        (["segment", "a.png", "--schedule", "99"], "schedule: expected"),
        (["segment", "a.png", "--merger", "tome:46"], "merger: tome has no parameter schedule, expected one of: r"),
        (
            ["segment", "a.png", "--merger", "none", "--align", "8"],
            "merger: expected without align, got 'none' beside them",
        ),
        (["segment", "a.png", "--checkpoint", "none.pth"], "none.pth"),
        (["serve", "none"], "MODEL: expected a checkpoint or what `mpm build` made, got none: no such file"),
        (["serve", "b", "--schedule", "off"], "--schedule: expected with a checkpoint, got b, which is built already"),
        (["serve", "b", "--grpc-port", "1"], "--grpc-port, --triton-metrics-port, --admin-secret-file: expected with"),
        (["health", "http://127.0.0.1:1/"], "url: expected http(s)://HOST:PORT/predictions/NAME"),
        (["evaluate", "--dataset", "coco", "--root", ".", "--checkpoint", "x"], "dataset: expected one of ade20k, "),
    ],
)
def test_bad_input_is_a_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "b"):
        Path(folder).mkdir()
    for file in ("a.png", "b/a.png"):
        Path(file).write_bytes(b"")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


class TestSegment:
    @pytest.fixture
    def folder(self, photo: Callable[..., np.ndarray], tmp_path: Path) -> Path:
        folder = tmp_path / "pictures"
        (folder / "deeper").mkdir(parents=True)
        (folder / "a.png").write_bytes(encode_picture(photo(1, 60, 90), "image/png"))
        (folder / "b.jpg").write_bytes(encode_picture(photo(2, 70, 50), "image/jpeg"))
        (folder / "b.png").write_bytes(encode_picture(photo(3, 50, 70), "image/png"))
        (folder / "notes.txt").write_text("no picture")
        return folder

    def test_a_folder_and_what_is_refused(
        self, checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The bytes are those of the library, and so of the servers; one computation gives all forms."""
        out, missing = tmp_path / "out", tmp_path / "missing.jpg"
        (folder / "b.jpg").rename(folder / "deeper" / "b.jpg")
        (folder / "b.png").rename(folder / "deeper" / "b.png")
        options = ["--checkpoint", str(checkpoint), "--out", str(out), *OPTIONS, "--format", "json,png,overlay,npy"]
        assert main(["segment", str(folder), str(missing), *options]) == 1
        printed = capsys.readouterr()
        told, *refused = printed.err.splitlines()[-3:]
        assert re.fullmatch(rf"3 of 5 pictures written to {out} in [0-9.]+ s, 2 failed:", told)
        assert f"{missing}: No such file or directory" in refused
        assert any(line.startswith(f"{folder / 'notes.txt'}: image: expected JPEG") for line in refused)
        pictures = {"a": "a.png", "deeper/b.jpg": "deeper/b.jpg", "deeper/b.png": "deeper/b.png"}
        suffixes = (".png", ".json", ".npy", ".overlay.png")
        expected = {name + suffix for name in pictures for suffix in suffixes}
        assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == expected
        model = load_segmenter(checkpoint, (0, 1), runtime="torch", precision="fp32")
        classes = load_classes(checkpoint.parent, model.config.n_cls)
        for name, source in pictures.items():
            image = decode_image((folder / source).read_bytes(), max_bytes=10**6, max_pixels=10**6)
            labels = model.segment(image)
            assert (out / f"{name}.png").read_bytes() == encode_mask_png(labels, classes)
            np.testing.assert_array_equal(np.load(out / f"{name}.npy"), labels)
            assert json.loads((out / f"{name}.json").read_text())["width"] == labels.shape[1]
            with Image.open(out / f"{name}.overlay.png") as view:
                assert (view.size, view.mode) == (labels.shape[::-1], "RGB")

    def test_another_merger(self, checkpoint: Path, folder: Path, tmp_path: Path, merger: str) -> None:
        source = folder / "a.png"
        options = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), *OPTIONS[2:], "--merger", merger]
        assert main(["segment", str(source), *options]) == 0
        model = load_segmenter(checkpoint, merger=merger)
        image = decode_image(source.read_bytes(), max_bytes=10**6, max_pixels=10**6)
        mask = encode_mask_png(model.segment(image), load_classes(checkpoint.parent, model.config.n_cls))
        assert (tmp_path / "a.png").read_bytes() == mask

    def test_a_server_that_is_not_there(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["segment", str(folder), "--url", "http://127.0.0.1:1/predictions/x"]) == 2
        told = "http://127.0.0.1:1/predictions/x: no server is there; start one with mpm serve\n"
        assert capsys.readouterr().err == told


def test_serve_builds_a_checkpoint_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `build` and `samples` are given, and that their failure ends it."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoint.pth").touch()
    ran: list[list[str]] = []

    def run(command: list[str]) -> "subprocess.CompletedProcess[bytes]":
        ran.append(command[4:])
        return subprocess.CompletedProcess(command, len(ran) > 1)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert main(["serve", ".", "--server", "triton", "--schedule", "off", "--metrics-port", "8090"]) == 1
    (build, samples) = ran
    assert build[0] == "build"
    assert set(build[1:]) == {
        "--target=triton", "--checkpoint=.", "--schedule=off", "--metrics-port=8090",
        "--out=build/model_repository", "--alone",
    }  # fmt: skip
    assert samples == ["samples", "--out=build/samples"]
    group = cli.commands.get_command(click.Context(cli.commands), "build")
    assert group is not None
    assert group.make_context("build", build[1:])
