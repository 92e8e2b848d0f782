"""Mean IoU of a checkpoint, with and without merging, and what merging changes for which arithmetic.

python -m mpm_ops.evaluate --dataset camvid --root DIR --split val --checkpoint checkpoint.pth --schedule 2,5
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .classes import load_classes
from .labels import label_map
from .merging import Merger, NoMerging, make_merger
from .models import load_segmenter
from .runtime import PRECISIONS, RUNTIMES
from .segmenter import Segmenter, SegmenterConfig
from .stages import Decoded, Stage, WindowBatch, parse_schedule
from .windows import cut_windows, plan_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Where a dataset keeps a split's pictures and label PNGs, and what the labels mean.

    Attributes:
        images, labels: folders below the root, the same folders inside; `{split}` is filled in.
        ignore: label value without a class.
        first_class: label value of class 0.
        image_ending, label_ending: what a picture's and its labels' names end with after what they share.
        names: file with the names of the split's pictures, one a line; empty for all of the folder.
    """

    images: str
    labels: str
    ignore: int
    first_class: int = 0
    image_ending: str = ".*"
    label_ending: str = ".png"
    names: str = ""


DATASETS = {
    "ade20k": Dataset(images="images/{split}", labels="annotations/{split}", ignore=0, first_class=1),
    "camvid": Dataset(images="{split}/images", labels="{split}/labels", ignore=11),
    "cityscapes": Dataset(
        images="leftImg8bit/{split}",
        labels="gtFine/{split}",
        ignore=255,
        image_ending="_leftImg8bit.png",
        label_ending="_gtFine_labelTrainIds.png",
    ),
    "pascal_context": Dataset(  # VOC2010 with the label PNGs that mmsegmentation's conversion writes
        images="JPEGImages",
        labels="SegmentationClassContext",
        ignore=255,
        names="ImageSets/SegmentationContext/{split}.txt",
    ),
}


@dataclass(frozen=True, slots=True)
class Scores:
    """iou: [K], NaN for classes that neither occur nor are predicted; pixel_accuracy: share of labelled pixels."""

    iou: np.ndarray
    pixel_accuracy: float

    @property
    def mean_iou(self) -> float:
        return float(np.nanmean(self.iou))


def evaluate(model: Segmenter, pairs: Sequence[tuple[Path, Path]], dataset: Dataset) -> Scores:
    """Segment every picture and compare it with its labels.

    Raises:
        ValueError: there are no pictures, or labels do not have the size of their picture.
    """
    if not pairs:
        raise ValueError("pairs: expected at least one picture with labels, got none")
    num_classes = model.config.n_cls
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # rows: truth, columns: prediction
    for image_path, label_path in pairs:
        predicted = model.segment(np.asarray(Image.open(image_path).convert("RGB")))
        labels = np.asarray(Image.open(label_path)).astype(np.int64)
        if labels.shape != predicted.shape:
            raise ValueError(f"{label_path}: expected {predicted.shape}, the size of its picture, got {labels.shape}")
        truth = labels - dataset.first_class
        counted = (labels != dataset.ignore) & (truth >= 0) & (truth < num_classes)
        pairs_of_classes = num_classes * truth[counted] + predicted[counted]
        confusion += np.bincount(pairs_of_classes, minlength=confusion.size).reshape(confusion.shape)
    return score(confusion)


def score(confusion: np.ndarray) -> Scores:
    """Intersection over union per class from a [K, K] confusion matrix, truth in rows."""
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    with np.errstate(invalid="ignore"):
        return Scores(hits / np.where(union, union, np.nan), float(hits.sum() / max(confusion.sum(), 1)))


def compare(model: Segmenter, mergers: Sequence[Merger], pictures: Sequence[Path]) -> dict[str, tuple[float, float]]:
    """What merging changes, and what it saves.

    Returns:
        By merger: the mean share of a picture's pixels whose class is that of the unmerged network, and the
        operations of embedding, blocks and decoder as a share of its own, see `stage_flops`.
    """
    contestants = (NoMerging(tower=model.tower), *mergers)
    agreements = np.zeros((len(contestants), len(pictures)))
    flops = np.zeros(len(contestants))
    for i, path in enumerate(pictures):
        image = np.asarray(Image.open(path).convert("RGB"))
        labels = []
        for k, merger in enumerate(contestants):
            found, spent = _labels_and_flops(model, merger, image)
            labels.append(found)
            agreements[k, i] = (found == labels[0]).mean()
            flops[k] += spent
    return {str(m): (float(agreements[k].mean()), flops[k] / flops[0]) for k, m in enumerate(contestants)}


@torch.inference_mode()
def _labels_and_flops(model: Segmenter, merger: Merger, image: np.ndarray) -> tuple[np.ndarray, float]:
    plan = plan_windows(image.shape[0], image.shape[1], model.inference)
    windows = cut_windows(image, plan, model.inference).to(model.encoder.pos_embed.device)
    patches_across = -(-windows.shape[3] // model.config.patch_size)
    num_patches = -(-windows.shape[2] // model.config.patch_size) * patches_across
    lengths: Sequence[int] = (num_patches + model.encoder.num_special,) * len(windows)
    flops = len(windows) * 6.0 * num_patches * model.config.d_model * model.config.patch_size**2
    given: Tensor | WindowBatch = windows
    for stage in merger.stages:
        flops += stage_flops(model.config, stage, lengths)
        launched = model.launch(stage, given)
        if not isinstance(launched, Decoded):
            given = launched()
            lengths = given.tokens.lengths
    assert isinstance(launched, Decoded)
    logits = launched.logits.transpose(1, 2).unflatten(2, (-1, patches_across))
    return label_map(logits, plan, model.config.patch_size).labels, flops


def stage_flops(config: SegmenterConfig, stage: Stage, lengths: Sequence[int]) -> float:
    """Operations of a stage's blocks, and of the decoder if it is the last; two for a multiplication and a sum.

    Args:
        lengths: tokens of every window, special ones included.
    """
    width, classes = config.d_model, config.n_cls
    total = len(stage.parts) / 2 * sum(_block_flops(length, width) for length in lengths)
    if not stage.merges:
        for length in lengths:
            total += config.decoder_layers * _block_flops(length - 1 + classes, width)
            total += 2.0 * width * (width * (2 * (length - 1) + classes) + classes * (length - 1))
    return total


def _block_flops(length: int, width: int) -> float:
    return 24.0 * length * width**2 + 4.0 * length**2 * width


def find_pairs(root: Path, split: str, dataset: Dataset) -> list[tuple[Path, Path]]:
    """Pictures of a split with their label PNGs, sorted by name.

    Raises:
        FileNotFoundError: the folder of pictures, the list of names, a picture or its labels are missing.
    """
    images, labels, names = (
        root / path.format(split=split) for path in (dataset.images, dataset.labels, dataset.names)
    )
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder")
    found = {
        image.name.removesuffix(dataset.image_ending.replace(".*", image.suffix)): image
        for image in sorted(images.rglob(f"*{dataset.image_ending}"))
    }
    pairs = []
    for stem in names.read_text().split() if dataset.names else found:
        if stem not in found:
            raise FileNotFoundError(f"{images / stem}: no such picture, but {names} names it")
        label = labels / found[stem].relative_to(images).with_name(stem + dataset.label_ending)
        if not label.is_file():
            raise FileNotFoundError(f"{label}: no labels for {found[stem].name}")
        pairs.append((found[stem], label))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mpm_ops.evaluate", description="Mean IoU of a checkpoint.")
    parser.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--split", default="val")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pth with variant.yml beside it")
    parser.add_argument("--schedule", action="append", help="2,5 or off; repeat to compare (off and 2,5)")
    parser.add_argument("--align", type=int, default=1)
    parser.add_argument("--merger", action="append", default=[], help="tome:r=46, algm ...; repeat to compare")
    parser.add_argument("--runtime", choices=["auto", *RUNTIMES], default="auto")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many pictures at the start")
    parser.add_argument(
        "--agreement",
        action="store_true",
        help="instead of scores: pixels as without merging, and the share of its arithmetic",
    )
    parser.add_argument("--out", type=Path, help="write the scores as JSON too")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU, expected cpu")
    dataset = DATASETS[arguments.dataset]
    results = []
    try:
        pairs = find_pairs(arguments.root, arguments.split, dataset)[arguments.skip :]
        schedules = arguments.schedule or ([] if arguments.merger else ["off", "2,5"])
        mergers = [{"schedule": parse_schedule(text), "align": arguments.align} for text in schedules]
        chosen_mergers = [*mergers, *({"merger": text} for text in arguments.merger)]
        if arguments.agreement:
            results = _agreements(arguments, chosen_mergers, [image for image, _ in pairs])
            chosen_mergers = []
        for chosen in chosen_mergers:
            model = load_segmenter(
                arguments.checkpoint,
                runtime=arguments.runtime,
                precision=arguments.precision,
                device=arguments.device,
                **chosen,
            )
            runtime = f"{model.runtime.name} {model.runtime.precision}"
            told = {"merger": str(model.merger), "schedule": list(model.schedule), "align": model.align}
            title = f"{model.merger}, {runtime}"
            results.append(told | {"runtime": runtime} | _told(model, title, arguments, pairs))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _agreements(
    arguments: argparse.Namespace, mergers: Sequence[Mapping[str, Any]], pictures: Sequence[Path]
) -> list[dict[str, object]]:
    """Compare, print and return."""
    options = {name: getattr(arguments, name) for name in ("runtime", "precision", "device")}
    model = load_segmenter(arguments.checkpoint, **options)
    chosen = [
        make_merger(fields["merger"], model.tower) if "merger" in fields else model.mpm(**fields) for fields in mergers
    ]
    print(f"{len(pictures)} pictures, {model.runtime.name} {model.runtime.precision}: agreement, arithmetic")
    found = compare(model, chosen, pictures)
    for name, (agreement, arithmetic) in found.items():
        print(f"  {name:44} {agreement:8.4f} {arithmetic:8.3f}")
    return [
        {"merger": name, "agreement": round(agreement, 5), "arithmetic": round(arithmetic, 4)}
        for name, (agreement, arithmetic) in found.items()
    ]


def _told(
    model: Segmenter, title: str, arguments: argparse.Namespace, pairs: Sequence[tuple[Path, Path]]
) -> dict[str, object]:
    """Evaluate, print and return the scores."""
    scores = evaluate(model, pairs, DATASETS[arguments.dataset])
    names = load_classes(arguments.checkpoint.parent, len(scores.iou)).names
    print(f"{title}, {len(pairs)} pictures")
    for name, iou in zip(names, scores.iou, strict=True):
        print(f"  {name:20} {iou:7.4f}")
    print(f"  {'mean IoU':20} {scores.mean_iou:7.4f}\n  {'pixel accuracy':20} {scores.pixel_accuracy:7.4f}")
    return _as_fields(scores, names)


def _as_fields(scores: Scores, names: Sequence[str]) -> dict[str, object]:
    iou = {
        name: None if np.isnan(value) else round(float(value), 4)
        for name, value in zip(names, scores.iou, strict=True)
    }
    return {"mean_iou": round(scores.mean_iou, 4), "pixel_accuracy": round(scores.pixel_accuracy, 4), "iou": iou}


if __name__ == "__main__":
    sys.exit(main())
