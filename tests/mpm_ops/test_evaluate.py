"""Every score against plain loops, the command and what it keeps, and where the datasets keep their pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handlers.cli import main
from mpm_ops import Segmenter, SegmenterConfig
from mpm_ops.bench.gpu_networks import PAPER, whole_windows
from mpm_ops.evaluate import DATASETS, Arithmetic, Dataset, batch_statistics, find_pairs, picture_row, sweep_mergers
from mpm_ops.evaluate.data import READ_NOISE, SHOT_PHOTONS, darkened, read_classes, read_image
from mpm_ops.evaluate.report import family
from mpm_ops.evaluate.scores import (
    QUANTILES,
    boundary_counts,
    class_counts,
    drawn_again,
    intersections_over_unions,
    merge_distances,
    near_boundary,
    quantile,
    scores,
)  # fmt: skip
from mpm_ops.merging import Tower, make_merger


def some_sums(num_pictures: int = 1, **given: Any) -> dict[str, np.ndarray]:
    """Sums that mean nothing, but what is given."""
    names = ("pictures", "seconds", "agreement", "windows", "tokens_per_block", "flops", "flops_decoding_all")
    found = {name: np.ones(num_pictures) for name in names}
    found |= {name: np.ones((num_pictures, 3, 2)) for name in ("classes", "boundary")}
    found |= {name: np.ones((num_pictures, 4)) for name in ("tokens", "distances", "token_histogram")}
    return found | given


def test_scores_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, (2, 20, 25))
    truth[truth == 3] = 2  # class 3 is only ever predicted, class 4 never seen
    truth[random.random(truth.shape) < 0.1] = -1
    pairs = [(t, p) for t, p in zip(truth.flat, predicted.flat, strict=True) if t >= 0]
    counts = class_counts(truth, predicted, 5)
    iou = intersections_over_unions(counts)
    for k in range(4):
        both = sum(t == k and p == k for t, p in pairs)
        assert iou[k] == pytest.approx(both / sum(t == k or p == k for t, p in pairs))
    assert np.isnan(iou[4])
    found = scores({name: of_pictures.sum(0) for name, of_pictures in some_sums(classes=counts[None]).items()})
    assert found["mean_iou"] == pytest.approx(iou[:4].mean())
    assert found["pixel_accuracy"] == pytest.approx(np.mean([t == p for t, p in pairs]))
    assert found["mean_accuracy"] == pytest.approx(
        np.mean([np.mean([p == k for t, p in pairs if t == k]) for k in range(3)])
    )
    often = [sum(t == k for t, _ in pairs) / len(pairs) for k in range(3)]
    assert found["frequency_weighted_iou"] == pytest.approx(np.dot(often, iou[:3]))


def test_boundaries_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(-1, 3, (2, 6, 8)).repeat(9, axis=1).repeat(8, axis=2)
    predicted = predicted.clip(0)
    width = 2  # 2 % of the diagonal of 54 x 64, 84, rounded

    def band(labels: np.ndarray, y: int, x: int) -> bool:
        height, across = labels.shape
        around = [(y + dy, x + dx) for dy in range(-width, width + 1) for dx in range(-width, width + 1)]
        inside = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < across]
        return len(inside) < len(around) or any(labels[v, u] != labels[y, x] for v, u in inside)

    expected = np.zeros((3, 3), np.int64)
    for y, x in np.ndindex(truth.shape):
        t, p = truth[y, x], predicted[y, x]
        assert near_boundary(truth, width)[y, x] == band(truth, y, x) if (y + x) % 97 == 0 else True
        if t >= 0:
            expected[0, t] += t == p and band(truth, y, x) and band(predicted, y, x)
            expected[1, t] += band(truth, y, x)
            expected[2, p] += band(predicted, y, x)
    assert (boundary_counts(truth, predicted, 3) == expected).all()


def test_distances_are_those_between_the_first_patches_of_tokens() -> None:
    #  0 0 1 2     two merges on a grid of 2 x 4 patches: 0 with 1 and 4, then the token of 2 with that of 7
    #  0 3 4 5
    first = np.array([0, 0, 1, 2, 0, 3, 4, 5])
    assert merge_distances(None, first, columns=4).tolist() == [1, 1]
    assert merge_distances(first, np.array([0, 0, 1, 2, 0, 3, 4, 1]), columns=4).tolist() == [2]  # (0, 2) and (1, 3)
    assert merge_distances(first, first, columns=4).tolist() == []


def test_quantiles_are_those_of_the_values() -> None:
    values = np.random.default_rng(0).integers(0, 30, 77)
    for share in (0.05, *QUANTILES.values()):
        expected = np.quantile(values, share, method="inverted_cdf")
        assert quantile(np.bincount(values, minlength=40), share) == expected
    assert np.isnan(quantile(np.zeros((2, 5)), 0.5)).all()


def test_drawing_pictures_again_draws_whole_pictures() -> None:
    agreement = np.array([0.0, 1.0, 10.0, 100.0, 1000.0])
    drawn = drawn_again(some_sums(5, agreement=agreement))
    assert set(drawn["pictures"]) == {5}
    assert all(set(str(int(total))) <= set("012345") for total in drawn["agreement"]), "every picture counts wholly"
    mean = scores(drawn)["agreement"]
    assert mean.mean() == pytest.approx(agreement.mean(), rel=0.1)
    assert mean.std() == pytest.approx(agreement.std() / 5**0.5, rel=0.1)


def test_random_batches_pad_to_their_longest_window() -> None:
    lengths = np.random.default_rng(0).integers(500, 700, (2, 100))
    found = batch_statistics(lengths)
    assert found is not None
    assert (found["size"], found["number"]) == (32, 3)
    drawn = lengths[:, np.random.default_rng(0).permutation(100)[:96]]
    for stage in range(2):
        batches = [drawn[stage, i : i + 32] for i in (0, 32, 64)]
        padding = [1 - batch.sum() / (32 * max(batch)) for batch in batches]
        assert found["padding"][stage] == pytest.approx([np.mean(padding), np.std(padding, ddof=1) / 3**0.5], rel=1e-4)
        assert found["longest"][stage][0] == pytest.approx(np.mean([max(batch) for batch in batches]), rel=1e-4)
    assert batch_statistics(lengths[:, :63]) is None


def test_operations_are_those_of_a_plain_count(tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(n_layers=3, decoder_layers=1)

    def linear(rows: int, columns_in: int, columns_out: int) -> int:
        return 2 * rows * columns_in * columns_out

    def block(rows: int) -> int:
        mlp = linear(rows, 64, 256) + linear(rows, 256, 64)
        attention = linear(rows, 64, 192) + linear(rows, 64, 64) + 2 * linear(rows, rows, 64)
        return mlp + attention

    def decoder(tokens: int) -> int:
        return 2 * linear(tokens, 64, 64) + block(tokens + 5) + linear(5, 64, 64) + linear(tokens, 64, 5)

    stages = model.mpm((2,)).stages
    blocks = linear(16, 3 * 16 * 16, 64) + 2 * block(17) + block(12)
    assert Arithmetic(model).window(stages, [16, 11]) == blocks + decoder(11)
    assert Arithmetic(model).window(stages, [16, 11], decoding=16) == blocks + decoder(16)


@pytest.mark.parametrize(
    ("width", "decoder", "unmerged", "merged"),
    [
        (192, "mask_transformer", 25, 17.6),
        (384, "mask_transformer", 76.9, 54),
        (768, "mask_transformer", 258, 184),
        (192, "linear", 21, 13),
    ],
)
def test_operations_are_those_that_the_paper_counts(width: int, decoder: str, unmerged: float, merged: float) -> None:
    """Tables 1 and 9, at the 1025, 789 and 620 tokens of the supplement's table 3, decoding all patches as they do."""
    shape: dict[str, Any] = {"image_size": (512, 512), "patch_size": 16, "n_heads": width // 64, "n_layers": 12}
    with torch.device("meta"):
        config = SegmenterConfig(d_model=width, n_cls=150, decoder=decoder, **shape)
        model = Segmenter(config, whole_windows(PAPER))
    arithmetic = Arithmetic(model)
    assert arithmetic.window(model.mpm(()).stages, [1024]) / 1e9 == pytest.approx(unmerged, rel=0.012)
    found = arithmetic.window(model.mpm((2, 5)).stages, [1024, 788, 619], decoding=1024) / 1e9
    assert found == pytest.approx(merged, rel=0.04)  # the mean over pictures, not those lengths


def test_the_night_is_darker_and_noisier() -> None:
    day = np.full((200, 200, 3), 128, np.uint8)
    night = darkened(day, 0.3, seed=1).astype(float)
    photons = 128 / 255 * 0.3 * SHOT_PHOTONS
    assert night.mean() == pytest.approx(0.3 * 128, rel=0.01)
    expected = photons * (255 / SHOT_PHOTONS) ** 2 + READ_NOISE**2 + 1 / 12  # the last is rounding's
    assert night.var() == pytest.approx(expected, rel=0.03)
    assert (darkened(day, 0.3, seed=1) == night).all()


def test_pictures_are_upright_by_exif(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert (read_image(tmp_path / "a.png") == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize(
    ("dataset", "labels", "expected"),
    [("ade20k", [[0, 1, 2, 3]], [[-1, 0, 1, -1]]), ("camvid", [[0, 1, 11, 200]], [[0, 1, -1, -1]])],
)
def test_labels_without_a_class_do_not_count(dataset: str, labels: Any, expected: Any, tmp_path: Path) -> None:
    """As in ADE20K: 0 is no class, and 1 is class 0; nor does what is beyond the network's two classes."""
    Image.fromarray(np.array(labels, np.uint8)).save(tmp_path / "label.png")
    assert read_classes(tmp_path / "label.png", (1, 4), DATASETS[dataset], 2).tolist() == expected
    with pytest.raises(ValueError, match=r"label\.png: expected \(4, 1\), the size of its picture, got \(1, 4\)"):
        read_classes(tmp_path / "label.png", (4, 1), DATASETS[dataset], 2)


def test_what_a_picture_tells_of_a_merger(tiny_model: Callable[..., Segmenter], tmp_path: Path) -> None:
    model = tiny_model(image_size=(64, 64), n_layers=4)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(random.integers(0, 5, (64, 96), dtype=np.uint8)).save(tmp_path / "labels.png")
    expected = model.segment(image)
    merger = make_merger("mpm:1,2", model.tower)
    pair = (tmp_path / "image.png", tmp_path / "labels.png")
    row, labels = picture_row(model, merger, pair, DATASETS["camvid"], unmerged=expected)
    model.merger = merger
    assert (labels == model.segment(image)).all()
    assert row["agreement"] == (labels == expected).mean() < 1
    patches, first, second = np.array(row["lengths"])
    assert patches.tolist() == [16, 16]
    assert ((patches > first) & (first > second) & (second >= 4)).all()
    assert sum(row["distances"]) == (patches - second).sum()


def test_sweeps_what_fits_the_network() -> None:
    texts = [str(merger) for merger in sweep_mergers(Tower(num_blocks=12, width=192, num_special=1))]
    assert len(set(texts)) == len(texts) > 35
    assert {"mpm:11", "mpm:2,5", "tome:r=60", "algm:threshold=0.999", "region"} <= set(texts)
    assert not any(
        text.startswith("algm") for text in map(str, sweep_mergers(Tower(num_blocks=12, width=192, num_special=2)))
    )
    curves = {family(text) for text in texts}
    assert {"mpm, 1 merge", "mpm, 2 merges", "mpm 1,3, keep", "tome", "algm"} <= curves


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


VARIANT = """\
net_kwargs:
  {image_size: [64, 64], patch_size: 16, d_model: 64, n_heads: 1, n_layers: 3, n_cls: 5, normalization: vit,
   decoder: {name: mask_transformer}}
inference_kwargs: {im_size: 64, window_size: 64, window_stride: 64}
"""


@pytest.fixture
def arguments(tiny_model: Callable[..., Segmenter], tmp_path: Path) -> list[str]:
    """Of `mpm`: a small checkpoint and two small pictures of noise."""
    random = np.random.default_rng(0)
    for kind, shape in (("images", (64, 96, 3)), ("labels", (64, 96))):
        (tmp_path / "val" / kind).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"val/{kind}/{i}.png")
    (tmp_path / "variant.yml").write_text(VARIANT)
    torch.save(tiny_model().state_dict(), tmp_path / "checkpoint.pth")
    fixed = "evaluate --dataset=camvid --schedule=1 --runtime=torch --precision=fp32"
    return [*fixed.split(), f"--root={tmp_path}", f"--checkpoint={tmp_path / 'checkpoint.pth'}"]


def test_a_run_that_was_interrupted_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [*arguments, f"--out={out}"]
    assert main([*arguments, "--most=1", f"--plot={tmp_path / 'plot.svg'}"]) == 0
    assert "agreement" in (tmp_path / "plot.svg").read_text()
    assert "| mpm:1 " in capsys.readouterr().out
    lines = (out / "pictures.jsonl").read_text().splitlines()
    assert len(lines) == 3
    (out / "pictures.jsonl").write_text("\n".join(lines) + '\n{"merger": "mpm:1')
    assert main(arguments) == 0
    results = json.loads((out / "scores.json").read_text())["results"]
    unmerged, merged = results
    assert unmerged["agreement"] == 1 > merged["agreement"] > 0.5
    assert unmerged["tokens"] == merged["tokens_after_merges"][0] == 16 > merged["tokens"]
    assert unmerged["gflops"] > merged["gflops_decoding_all"] > merged["gflops"]
    assert len(merged["iou"]) == 5
    assert (out / "pictures.jsonl").read_text().splitlines()[:3] == lines

    monkeypatch.setattr(Segmenter, "segment", None)  # nothing is computed again
    assert main(arguments) == 0
    assert json.loads((out / "scores.json").read_text())["results"] == results
    assert main([*arguments, f"--checkpoint={tmp_path}"]) == 0  # its folder is the same checkpoint
    assert main([*arguments, "--window-stride=32"]) == 2
    assert "was measured with other inference; give another folder" in capsys.readouterr().err


def test_every_merger_meets_every_light(arguments: list[str], tmp_path: Path) -> None:
    row = {"size": "Ti", "merger": "none", "runtime": "torch", "precision": "fp32", "median_ms": 12.3}
    report = {
        "shapes": {"sizes": {"Ti": [64, 1], "S": [128, 2]}},
        "results": [row, row | {"size": "S", "median_ms": 9}],
    }
    (tmp_path / "bench.json").write_text(json.dumps(report))
    more = ["--light=1", "--light=0.3", f"--out={tmp_path / 'out'}", f"--times={tmp_path / 'bench.json'}"]
    assert main([*arguments, *more]) == 0
    results = json.loads((tmp_path / "out/scores.json").read_text())["results"]
    assert [row["merger"] for row in results] == ["none", "none light=0.3", "mpm:1", "mpm:1 light=0.3"]
    assert [row["agreement"] for row in results[:2]] == [1, 1], "with the unmerged network in the same light"
    assert results[0]["mean_iou"] != results[1]["mean_iou"]
    assert [row["median_ms"] for row in results] == [12.3, None, None, None]


def test_what_is_left_out(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--skip=2"]) == 2
    assert "skip: expected fewer than the pictures of val, got 2" in capsys.readouterr().err
    assert main([*arguments, "--light=0"]) == 2
    assert "light: expected numbers in (0, 1], got 0" in capsys.readouterr().err
