"""What launchers read of the models that they serve."""

import json
import zipfile
from pathlib import Path

import pytest

from handlers.config import ServingConfig
from handlers.launch.models import Watch, read_archive, read_repository, with_watch
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from model_store.torchserve import build_archive
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

PLAIN = {"schedule": [0, 1]}
SERVING = {"deadline_seconds": 95.5, "max_image_bytes": 100 * 2**20, "max_image_pixels": 200_000_000}


def test_archives(checkpoint: Path, tmp_path: Path) -> None:
    config = read_archive(build_archive(checkpoint, name="a", out=tmp_path, serving=PLAIN | SERVING))
    assert config == ServingConfig(schedule=(0, 1), **SERVING)  # type: ignore[arg-type]
    plain = build_archive(checkpoint, name="b", out=tmp_path, serving=PLAIN)
    assert read_archive(plain) == ServingConfig(schedule=(0, 1))
    other = build_archive(checkpoint, name="c", out=tmp_path, serving={"merger": "tome:r=4"})
    assert read_archive(other) == ServingConfig(merger="tome:r=4")
    with pytest.raises(ValueError, match=r"^merger: tome has no parameter s, expected one of: r; got 'tome:s=4'$"):
        build_archive(checkpoint, name="d", out=tmp_path, serving={"merger": "tome:s=4"})


@pytest.mark.parametrize("text", [None, "", "[", "mpm: {windos: 3}", "mpm: 3", "3"])
def test_what_cannot_be_read_is_for_the_model_to_tell(tmp_path: Path, text: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as archive:
        if text is not None:
            archive.writestr("model-config.yaml", text)
    assert read_archive(tmp_path / "x.mar") == ServingConfig()
    (tmp_path / "x" / "1").mkdir(parents=True)
    if text is not None:
        (tmp_path / "x" / "1" / "serving.yaml").write_text(text)
    assert read_repository(tmp_path / "x") == ServingConfig()


def test_the_latest_version_counts(checkpoint: Path, tmp_path: Path) -> None:
    for version in (2, 10, 9):
        serving = PLAIN | {"deadline_seconds": version}
        build_model(checkpoint, name="x", out=tmp_path, serving=serving, version=version)
    assert read_repository(tmp_path / "x").deadline_seconds == 10


def test_limits_of_torchserve_are_those_of_its_models(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchServe, "_start", lambda self, store: None)
    build_archive(checkpoint, name="plain", out=tmp_path, serving=PLAIN)
    build_archive(checkpoint, name="large", out=tmp_path, serving=PLAIN | SERVING)
    server = TorchServe(tmp_path)
    properties = dict(line.split("=", 1) for line in server._properties(tmp_path).splitlines())
    assert int(properties["max_request_size"]) == 101 * 2**20
    assert int(properties["max_response_size"]) == 4 * 200_000_000 + 2**20
    assert server._drain_seconds == 95.5


def test_limits_are_numbers_that_java_has() -> None:
    config = ServingConfig(max_image_bytes=2**40, max_image_pixels=2**40)
    assert config.max_body_bytes == config.max_reply_bytes == 2**31 - 1


def test_triton_ends_when_the_longest_deadline_is_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(Triton, "_spawn", lambda self, command, environment: commands.append(command))
    build_model(checkpoint, name="plain", out=tmp_path, serving=PLAIN)
    build_model(checkpoint, name="slow", out=tmp_path, serving=PLAIN | SERVING)
    Triton(tmp_path)
    Triton(tmp_path, exit_seconds=4)
    assert "--exit-timeout-secs=96" in commands[0]
    assert "--exit-timeout-secs=4" in commands[1]


def test_a_port_for_the_launcher_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, exporting = ServingConfig(), ServingConfig(metrics_port=8090, metrics_host="0.0.0.0")
    watch = Watch({"plain": plain, "exporting": exporting})
    assert watch.urls["exporting"] == "http://127.0.0.1:8090/metrics"
    ((variable, text),) = watch.environment.items()
    monkeypatch.setenv(variable, text)
    port = json.loads(text)["plain"]
    assert watch.urls["plain"] == f"http://127.0.0.1:{port}/metrics"
    watched = with_watch(plain, "plain")
    assert (watched.metrics_host, watched.metrics_port) == ("127.0.0.1", port)
    assert with_watch(exporting, "exporting") == exporting
    assert with_watch(plain, "another") == plain
