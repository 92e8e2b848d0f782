"""`mpm build`: an archive that can be served, or one line that says why not."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from handlers.api.decode import decode_image
from handlers.cli import main
from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig

VARIANT = """\
net_kwargs:
  {image_size: [32, 32], patch_size: 16, d_model: 64, n_heads: 1, n_layers: 4, n_cls: 3, normalization: vit,
   decoder: {name: linear}}
inference_kwargs: {im_size: 32, window_size: 32, window_stride: 32}
"""
CLASSES = "index,name,red,green,blue\n0,sky,1,2,3\n1,road,4,5,6\n2,tree,7,8,9\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    network = SegmenterConfig(
        image_size=(32, 32), patch_size=16, d_model=64, n_heads=1, n_layers=4, n_cls=3, decoder="linear"
    )
    inference = InferenceConfig(im_size=32, max_ratio=4, window_size=32, window_stride=32, normalization="vit")
    weights = Segmenter(network, inference).state_dict()
    torch.save(
        {"model": weights, "optimizer": {"state": {0: torch.ones(2**20)}}, "epoch": 7}, folder / "checkpoint.pth"
    )
    (folder / "variant.yml").write_text(VARIANT)
    (folder / "classes.csv").write_text(CLASSES)
    return folder / "checkpoint.pth"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "some" / "store"


@pytest.fixture
def build(checkpoint: Path, out: Path) -> Callable[..., int]:
    """Runs the command on the checkpoint; keywords are its options."""

    def run(**options: Any) -> int:
        values = {"target": "torchserve", "checkpoint": checkpoint, "name": "street", "out": out} | options
        named = {f"--{key.replace('_', '-')}": value for key, value in values.items()}
        arguments = [name if value is True else f"{name}={value}" for name, value in named.items()]
        return main(["build", *arguments])

    return run


def assert_weights_alone(built: Path | io.BytesIO, checkpoint: Path) -> None:
    """What is built into an archive are the checkpoint's weights, bit for bit, and nothing else that it held."""
    found = torch.load(built, weights_only=True)
    assert found.keys() == {"model"}
    expected = torch.load(checkpoint, weights_only=True)["model"]
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][key], expected[key]) for key in expected)


class TestArchive:
    def test_holds_what_is_served(
        self, build: Callable[..., int], checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build(schedule="1,2") == 0
        assert capsys.readouterr().out.splitlines() == [
            f"built {out / 'street.mar'}",
            "  network: 4 blocks, 64 wide, 0.2 million weights, patches of 16, linear",
            "  classes: 3, sky, road, tree",
            "  windows: 32 x 32, every 32 pixels of a picture with a short side of 32",
            "  merging: mpm:1,2",
            f"  next:    mpm serve {out}",
        ]
        assert [path.name for path in out.iterdir()] == ["street.mar"]
        with zipfile.ZipFile(out / "street.mar") as archive:
            for name in ("variant.yml", "classes.csv"):
                assert archive.read(name) == (checkpoint.parent / name).read_bytes()
            assert_weights_alone(io.BytesIO(archive.read("checkpoint.pth")), checkpoint)
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
            assert (manifest["modelName"], manifest["handler"]) == ("street", "handler.py")
            assert archive.read("handler.py").count(b"\nclass ") == 1  # TorchServe takes the only one
            config = yaml.safe_load(archive.read(manifest["configFile"]))
        assert config["mpm"] == {"schedule": [1, 2]}
        assert (config["minWorkers"], config["maxWorkers"]) == (1, 1)
        assert config["maxBatchDelay"] >= 1

    def test_batching(self, build: Callable[..., int], out: Path) -> None:
        assert build(schedule="off", batch_size=3, max_delay_ms=7) == 0
        config = read_config(out)
        assert config["mpm"] == {"schedule": []}
        assert (config["batchSize"], config["maxBatchDelay"]) == (3, 7)

    def test_configuration_file(self, build: Callable[..., int], out: Path, tmp_path: Path) -> None:
        settings = {"schedule": [3], "align": 2, "max_group_windows": 4, "inference": {"window_stride": 16}}
        (tmp_path / "serving.yaml").write_text(yaml.safe_dump(settings))
        assert build(config=tmp_path / "serving.yaml", align=8) == 0  # the command line wins
        assert read_config(out)["mpm"] == settings | {"align": 8}

    def test_classes_are_optional(self, build: Callable[..., int], checkpoint: Path, out: Path) -> None:
        (checkpoint.parent / "classes.csv").unlink()
        assert build(schedule="1") == 0
        with zipfile.ZipFile(out / "street.mar") as archive:
            assert "classes.csv" not in archive.namelist()

    def test_says_why_classes_have_no_names(
        self, build: Callable[..., int], checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (checkpoint.parent / "classes.csv").unlink()
        (checkpoint.parent / "variant.yml").write_text(f"{VARIANT}dataset_kwargs: {{dataset: my_roads}}\n")
        assert build(schedule="1") == 0
        told = "  classes: 3, only numbered, because nothing is known of dataset 'my_roads': put classes.csv"
        assert told in capsys.readouterr().out

    def test_building_again_replaces_it(self, build: Callable[..., int], out: Path) -> None:
        for schedule, expected in (("1", [1]), ("2", [2])):
            assert build(schedule=schedule) == 0
            assert read_config(out)["mpm"] == {"schedule": expected}


@pytest.mark.parametrize("target", ["torchserve", "triton"])
class TestOthers:
    """Whatever else a store serves, as the demo model that a volume was filled with."""

    @pytest.fixture
    def others(self, build: Callable[..., int], target: str, out: Path) -> Path:
        assert build(target=target, schedule="1", name="demo") == 0
        (out / "notes.txt").write_text("no model")
        (out / "folder").mkdir()
        return out

    def test_stay(self, build: Callable[..., int], target: str, others: Path) -> None:
        assert build(target=target, schedule="1") == 0
        assert {path.stem for path in others.iterdir()} == {"demo", "street", "notes", "folder"}

    def test_go_where_it_is_to_be_alone(self, build: Callable[..., int], target: str, others: Path) -> None:
        assert build(target=target, schedule="1", alone=True) == 0
        assert {path.stem for path in others.iterdir()} == {"street", "notes", "folder"}

    def test_stay_where_nothing_was_built(self, build: Callable[..., int], target: str, others: Path) -> None:
        assert build(target=target, schedule="9", alone=True) == 2
        assert {path.stem for path in others.iterdir()} == {"demo", "notes", "folder"}


class TestModelRepository:
    @pytest.fixture
    def model(self, out: Path) -> Path:
        return out / "street"

    def test_holds_what_is_served(
        self, build: Callable[..., int], checkpoint: Path, out: Path, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build(target="triton", schedule="1,2", align=2) == 0
        assert capsys.readouterr().out.startswith(f"built {model / '1'}\n  network: 4 blocks")
        assert [path.name for path in out.iterdir()] == ["street"]
        assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt", "warmup"]
        for name in ("variant.yml", "classes.csv"):
            assert (model / "1" / name).read_bytes() == (checkpoint.parent / name).read_bytes()
        assert_weights_alone(model / "1" / "checkpoint.pth", checkpoint)
        assert yaml.safe_load((model / "1" / "serving.yaml").read_text()) == {"schedule": [1, 2], "align": 2}
        assert len((model / "1" / "model.py").read_text().splitlines()) < 10
        config = (model / "config.pbtxt").read_text()
        assert 'name: "street"' in config
        assert 'name: "MASK" data_type: TYPE_UINT8' in config
        assert 'string_value: "32"' in config
        (picture,) = (model / "warmup").iterdir()
        assert decode_image(picture.read_bytes(), max_bytes=10**6, max_pixels=10**6).shape == (360, 480, 3)

    def test_room(self, build: Callable[..., int], model: Path) -> None:
        assert build(target="triton", schedule="1", batch_size=3) == 0
        config = (model / "config.pbtxt").read_text()
        assert 'key: "max_inflight" value { string_value: "3" }' in config
        assert "max_batch_size: 3\n" in config  # one request may not hold more than there is room for

    def test_versions_stay_beside_each_other(self, build: Callable[..., int], model: Path) -> None:
        for version, schedule in ((1, "1"), (2, "2"), (2, "off")):
            assert build(target="triton", schedule=schedule, model_version=version) == 0
        schedules = [yaml.safe_load((model / v / "serving.yaml").read_text())["schedule"] for v in ("1", "2")]
        assert schedules == [[1], []]

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"name": "a b"}, "name: expected letters, digits"),
            ({"schedule": "9"}, "schedule"),
            ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
            ({"model_version": 0}, "version: expected at least 1, got 0"),
            ({"max_delay_ms": 5}, "--max-delay-ms: expected with --target torchserve only"),
            ({"target": "torchserve", "model_version": 2}, "--model-version: expected with --target triton only"),
        ],
    )
    def test_refusals(
        self,
        build: Callable[..., int],
        out: Path,
        capsys: pytest.CaptureFixture[str],
        options: dict[str, Any],
        told: str,
    ) -> None:
        assert build(**({"target": "triton", "schedule": "1"} | options)) == 2
        assert told in capsys.readouterr().err
        assert not out.parent.exists()


class TestRefusals:
    """Exit status 2, one line on stderr, and nothing written."""

    @pytest.fixture
    def refused(self, build: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(**options: Any) -> str:
            assert build(**({"schedule": "1,2"} | options)) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.count("\n") == 1
            assert not out.parent.exists()
            return printed.err

        return run

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".a", "-a", "a,b", "a\nb", "é"], ids=repr)
    def test_name(self, refused: Callable[..., str], name: str) -> None:
        assert refused(name=name).startswith("name: expected letters, digits")

    @pytest.mark.parametrize("schedule", ["", "a", "2,", "1;2", "1.5", "2,1", "1,1", "4", "-1", "0x1", "on"], ids=repr)
    def test_schedule(self, refused: Callable[..., str], schedule: str) -> None:
        assert "schedule" in refused(schedule=schedule)

    def test_default_schedule_beyond_a_shallow_network(
        self, build: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert build() == 2
        assert "within 0..3, got (2, 5)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "value"), [("align", 0), ("align", -8), ("batch_size", 0), ("max_delay_ms", 0)]
    )
    def test_numbers(self, refused: Callable[..., str], option: str, value: int) -> None:
        assert option in refused(**{option: value})

    @pytest.mark.parametrize("missing", ["variant.yml", "checkpoint.pth"])
    def test_missing_file(self, refused: Callable[..., str], checkpoint: Path, missing: str) -> None:
        (checkpoint.parent / missing).unlink()
        assert missing in refused()

    @pytest.mark.parametrize("name", ["variant.yml", "checkpoint.pth", "classes.csv"])
    @pytest.mark.parametrize("content", [b"", b"junk", b"\0\1\2", b"{", b"PK\x03\x04"], ids=repr)
    def test_broken_file(self, refused: Callable[..., str], checkpoint: Path, name: str, content: bytes) -> None:
        (checkpoint.parent / name).write_bytes(content)
        assert name in refused()

    def test_weights_that_are_no_numbers(self, refused: Callable[..., str], checkpoint: Path) -> None:
        data = torch.load(checkpoint, weights_only=True)
        data["model"]["encoder.norm.bias"][3] = torch.nan
        torch.save(data, checkpoint)
        told = "checkpoint.pth: encoder.norm.bias: expected finite numbers, got NaN or infinity in 1 of 64"
        assert told in refused()

    def test_checkpoint_of_another_network(self, refused: Callable[..., str], checkpoint: Path) -> None:
        (checkpoint.parent / "variant.yml").write_text(VARIANT.replace("n_layers: 4", "n_layers: 5"))
        assert "missing encoder.blocks.4" in refused()

    def test_classes_of_another_network(self, refused: Callable[..., str], checkpoint: Path) -> None:
        (checkpoint.parent / "classes.csv").write_text(CLASSES + "3,car,0,0,0\n")
        assert "expected classes 0..2" in refused()

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("windos: 3", "unknown fields windos; known are"),
            ("1: 2", "unknown fields 1; known are"),
            ("align: '8'", "align: expected an integer >= 1, got '8'"),
            ("max_image_bytes: 1e6", "max_image_bytes: expected an integer >= 1"),
            ("inference: 512", "inference: expected a mapping, got 512"),
            ("inference: {windos: 3}", "inference: unknown fields windos"),
            ("inference: {window_size: '32'}", "window_size"),
            ("inference: {window_stride: 64}", "window_stride: expected at most"),
            ("", "expected a mapping, got NoneType"),
            ("- align", "expected a mapping, got list"),
            ("align: [", "not readable as YAML"),
            ("a: !!python/object/apply:os.getpid []", "not readable as YAML"),
        ],
    )
    def test_configuration_file(self, refused: Callable[..., str], tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "serving.yaml").write_text(text)
        assert told in refused(config=tmp_path / "serving.yaml")

    def test_configuration_file_that_is_no_text(self, refused: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "serving.yaml").write_bytes(b"\xff\xfe\0")
        assert "not readable as YAML" in refused(config=tmp_path / "serving.yaml")

    def test_missing_configuration_file(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "nowhere.yaml" in refused(config=tmp_path / "nowhere.yaml")

    def test_store_that_is_a_file(
        self, build: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out.parent.mkdir()
        out.write_text("mine")
        assert build(schedule="1") == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert out.read_text() == "mine"

    @pytest.mark.parametrize("option", ["target", "align", "batch_size"])
    def test_what_the_command_line_cannot_mean(
        self, build: Callable[..., int], capsys: pytest.CaptureFixture[str], option: str
    ) -> None:
        assert build(**{option: "many"}) == 2
        assert "many" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("{}", 120),
        ("deadline_seconds: 5\nstall_seconds: 10", 120),
        ("deadline_seconds: 300.5", 321),
        ("stall_seconds: 200", 220),
        ("deadline_seconds: .inf", 1_000_020),
    ],
)
def test_torchserve_waits_longer_than_any_answer_takes(
    build: Callable[..., int], out: Path, tmp_path: Path, text: str, seconds: int
) -> None:
    """Otherwise it kills the worker that computes what clients still wait for."""
    (tmp_path / "serving.yml").write_text(text)
    assert build(config=tmp_path / "serving.yml", schedule="1") == 0
    assert read_config(out)["responseTimeout"] == seconds


def read_config(out: Path) -> dict[str, Any]:
    with zipfile.ZipFile(out / "street.mar") as archive:
        config: dict[str, Any] = yaml.safe_load(archive.read("model-config.yaml"))
    return config
