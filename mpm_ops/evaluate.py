"""Mean IoU of a checkpoint, with and without merging, and what merging changes for which arithmetic."""

import json
from collections.abc import Sequence
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


def agreements(
    model: Segmenter, mergers: Sequence[Merger], pictures: Sequence[Path]
) -> dict[str, tuple[float, float]]:
    """What merging changes, and what it saves.

    Returns:
        By merger: the mean share of a picture's pixels whose class is that of the unmerged network, and the
        operations of embedding, blocks and decoder as a share of its own, see `stage_flops`.
    """
    contestants = (NoMerging(tower=model.tower), *mergers)
    equal = np.zeros((len(contestants), len(pictures)))
    flops = np.zeros(len(contestants))
    for i, path in enumerate(pictures):
        image = np.asarray(Image.open(path).convert("RGB"))
        labels = []
        for k, merger in enumerate(contestants):
            found, spent = _labels_and_flops(model, merger, image)
            labels.append(found)
            equal[k, i] = (found == labels[0]).mean()
            flops[k] += spent
    return {str(m): (float(equal[k].mean()), flops[k] / flops[0]) for k, m in enumerate(contestants)}


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


def compare(
    *,
    dataset: str,
    root: Path,
    split: str,
    checkpoint: Path,
    schedules: Sequence[str] = (),
    align: int = 1,
    mergers: Sequence[str] = (),
    runtime: str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    skip: int = 0,
    agreement: bool = False,
    out: Path | None = None,
) -> list[dict[str, object]]:
    """Evaluate a checkpoint with several mergers; prints the scores of each, or its agreement.

    Args:
        dataset: of DATASETS.
        root: its folder.
        schedules: of MPM, such as "2,5" or "off"; these two where nothing is named.
        mergers: such as "tome:r=46".
        skip: pictures at the start that are left out.
        agreement: instead of scores, see `agreements`.
        out: where the scores are written as JSON.

    Raises:
        OSError, ValueError: something is missing or does not fit.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(sorted(DATASETS))}, got {dataset!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no GPU, expected cpu")
    pairs = find_pairs(root, split, DATASETS[dataset])[skip:]
    schedules = schedules or ([] if mergers else ["off", "2,5"])
    chosen: list[dict[str, Any]] = [{"schedule": parse_schedule(text), "align": align} for text in schedules]
    chosen += [{"merger": text} for text in mergers]
    results = []
    if agreement:
        model = load_segmenter(checkpoint, runtime=runtime, precision=precision, device=device)
        used = f"{model.runtime.name} {model.runtime.precision}"
        built = [make_merger(m["merger"], model.tower) if "merger" in m else model.mpm(**m) for m in chosen]
        print(f"{len(pairs)} pictures, {used}: agreement with no merging, share of its arithmetic")
        for name, (share, arithmetic) in agreements(model, built, [image for image, _ in pairs]).items():
            print(f"  {name:44} {share:8.4f} {arithmetic:8.3f}")
            told = {"merger": name, "agreement": round(share, 5), "arithmetic": round(arithmetic, 4), "runtime": used}
            results.append(told)
        chosen = []
    for merging in chosen:
        model = load_segmenter(checkpoint, runtime=runtime, precision=precision, device=device, **merging)
        used = f"{model.runtime.name} {model.runtime.precision}"
        scores = evaluate(model, pairs, DATASETS[dataset])
        names = load_classes(checkpoint.parent, len(scores.iou)).names
        print(f"{model.merger}, {used}, {len(pairs)} pictures")
        for name, iou in zip(names, scores.iou, strict=True):
            print(f"  {name:20} {iou:7.4f}")
        print(f"  {'mean IoU':20} {scores.mean_iou:7.4f}\n  {'pixel accuracy':20} {scores.pixel_accuracy:7.4f}")
        told = {"merger": str(model.merger), "schedule": list(model.schedule), "align": model.align, "runtime": used}
        results.append(told | _as_fields(scores, names))
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _as_fields(scores: Scores, names: Sequence[str]) -> dict[str, object]:
    iou = {
        name: None if np.isnan(value) else round(float(value), 4)
        for name, value in zip(names, scores.iou, strict=True)
    }
    return {"mean_iou": round(scores.mean_iou, 4), "pixel_accuracy": round(scores.pixel_accuracy, 4), "iou": iou}
