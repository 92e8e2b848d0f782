"""Mean IoU against plain loops, and where the datasets keep their pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from handlers.cli import main
from mpm_ops import Segmenter
from mpm_ops.evaluate import DATASETS, Dataset, agreements, evaluate, find_pairs, score
from mpm_ops.merging import make_merger

DEMO = Path(__file__).resolve().parents[2] / "model_store/demo/checkpoint.pth"


def test_scores_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, (2, 500))
    truth[truth == 3] = 2  # class 3 is only ever predicted, class 4 never seen
    confusion = np.zeros((5, 5), dtype=np.int64)
    for t, p in zip(truth, predicted, strict=True):
        confusion[t, p] += 1
    scores = score(confusion)
    for k in range(4):
        both = sum(t == k and p == k for t, p in zip(truth, predicted, strict=True))
        either = sum(t == k or p == k for t, p in zip(truth, predicted, strict=True))
        assert scores.iou[k] == pytest.approx(both / either)
    assert np.isnan(scores.iou[4])
    assert scores.mean_iou == pytest.approx(scores.iou[:4].mean())
    assert scores.pixel_accuracy == pytest.approx((truth == predicted).mean())


class Oracle:
    """Predicts what each picture's red channel says."""

    def __init__(self, num_classes: int) -> None:
        self.config = type("Config", (), {"n_cls": num_classes})()

    def segment(self, image: np.ndarray) -> np.ndarray:
        return image[..., 0]


def pair(folder: Path, predicted: Any, labels: Any) -> tuple[Path, Path]:
    image, label = folder / "image.png", folder / "label.png"
    Image.fromarray(np.dstack([np.array(predicted, np.uint8)] * 3)).save(image)
    Image.fromarray(np.array(labels, np.uint8)).save(label)
    return image, label


def test_ignored_labels_and_the_first_class(tmp_path: Path) -> None:
    """As in ADE20K: 0 is no class, and 1 is class 0; what is beyond the network's classes does not count either."""
    found = pair(tmp_path, [[0, 0, 1, 1, 0, 1]], [[1, 2, 2, 2, 0, 9]])
    scores = evaluate(cast(Segmenter, Oracle(2)), [found], DATASETS["ade20k"])
    assert scores.iou == pytest.approx([1 / 2, 2 / 3])
    assert scores.pixel_accuracy == pytest.approx(3 / 4)


def test_an_ignore_value_inside_the_classes(tmp_path: Path) -> None:
    found = pair(tmp_path, [[0, 1, 1]], [[0, 1, 11]])
    scores = evaluate(cast(Segmenter, Oracle(12)), [found], DATASETS["camvid"])
    assert scores.mean_iou == 1
    assert np.isnan(scores.iou[11])


def test_labels_of_another_size(tmp_path: Path) -> None:
    found = pair(tmp_path, [[0, 1]], [[0], [1]])
    with pytest.raises(ValueError, match=r"label\.png: expected \(1, 2\), the size of its picture, got \(2, 1\)"):
        evaluate(cast(Segmenter, Oracle(2)), [found], DATASETS["camvid"])
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        evaluate(cast(Segmenter, Oracle(2)), [], DATASETS["camvid"])


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("dataset", "split", "files", "expected"),
    [
        ("camvid", "val", ["val/images/a.png", "val/labels/a.png"], [("val/images/a.png", "val/labels/a.png")]),
        (
            "ade20k",
            "validation",
            ["images/validation/b.jpg", "annotations/validation/b.png", "images/training/c.jpg"],
            [("images/validation/b.jpg", "annotations/validation/b.png")],
        ),
        (
            "cityscapes",
            "val",
            [
                "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png",
                "leftImg8bit/val/aachen/aachen_2_leftImg8bit.png",
                *(
                    f"gtFine/val/{city}/{city}_{i}_gtFine_{kind}.png"
                    for city, i in (("ulm", 1), ("aachen", 2))
                    for kind in ("labelTrainIds", "labelIds", "color")
                ),
            ],
            [
                (f"leftImg8bit/val/{name}_leftImg8bit.png", f"gtFine/val/{name}_gtFine_labelTrainIds.png")
                for name in ("aachen/aachen_2", "ulm/ulm_1")
            ],
        ),
        (
            "pascal_context",
            "val",
            ["JPEGImages/2008_1.jpg", "JPEGImages/2008_12.jpg", "SegmentationClassContext/2008_1.png"],
            [("JPEGImages/2008_1.jpg", "SegmentationClassContext/2008_1.png")],
        ),
    ],
)
def test_where_datasets_keep_their_pictures(
    dataset: str, split: str, files: list[str], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    touch(tmp_path, *files, "ImageSets/SegmentationContext/val.txt")
    (tmp_path / "ImageSets/SegmentationContext/val.txt").write_text("2008_1\n")
    pairs = find_pairs(tmp_path, split, DATASETS[dataset])
    assert pairs == [(tmp_path / image, tmp_path / label) for image, label in expected]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="val/images: no such folder"):
        find_pairs(tmp_path, "val", DATASETS["camvid"])
    touch(tmp_path, "val/images/a.png", "JPEGImages/b.jpg")
    with pytest.raises(FileNotFoundError, match=r"val/labels/a\.png: no labels for a\.png"):
        find_pairs(tmp_path, "val", DATASETS["camvid"])
    with pytest.raises(FileNotFoundError, match=r"SegmentationContext/val\.txt"):
        find_pairs(tmp_path, "val", DATASETS["pascal_context"])
    listed = Dataset(images="val/images", labels="val/labels", ignore=255, names="names.txt")
    (tmp_path / "names.txt").write_text("gone")
    with pytest.raises(FileNotFoundError, match=r"gone: no such picture, but .*names\.txt names it"):
        find_pairs(tmp_path, "val", listed)


def test_the_command(data_root: Path, tmp_path: Path, capsys: Any) -> None:
    """Two real pictures, with merging and without."""
    for kind in ("images", "labels"):
        (tmp_path / "val" / kind).mkdir(parents=True)
        for file in sorted((data_root / "camvid/val" / kind).iterdir())[:2]:
            (tmp_path / "val" / kind / file.name).symlink_to(file)
    paths = {"root": tmp_path, "out": tmp_path / "out.json"}
    options = paths | {"dataset": "camvid", "checkpoint": DEMO, "runtime": "torch"}
    assert main(["evaluate", *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert [scores["schedule"] for scores in json.loads((tmp_path / "out.json").read_text())] == [[], [2, 5]]
    told = capsys.readouterr().out
    assert "none, " in told
    assert "mpm:2,5, " in told
    assert "pedestrian" in told


def test_agreement_and_arithmetic_are_those_of_the_network_without_merging(
    tiny_model: Callable[..., Segmenter], tmp_path: Path
) -> None:
    model = tiny_model(image_size=(64, 64), n_layers=4)
    picture = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    mergers = [make_merger(text, model.tower) for text in ("mpm:1", "mpm:1,2,keep=0.5,weighted,proportional")]
    found = agreements(model, mergers, [picture])
    assert found["none"] == (1, 1)
    expected = model.segment(noise)
    for merger in mergers:
        model.merger = merger
        agreement, arithmetic = found[str(merger)]
        assert agreement == (model.segment(noise) == expected).mean()
        assert 0.4 < arithmetic < 1
