"""Where datasets keep their pictures and labels, and how both are read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SHOT_PHOTONS = 500  # that white gives in the light of day
READ_NOISE = 2.0  # standard deviation, of 255


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


def read_image(path: Path, light: float = 1.0) -> np.ndarray:
    """A picture as the servers see it, upright by EXIF: uint8 RGB [H, W, 3].

    Args:
        light: below 1, as by night: see `darkened`.
    """
    with Image.open(path) as opened:
        image = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    return image if light == 1 else darkened(image, light, seed=int.from_bytes(path.stem.encode()) % 2**32)


def darkened(image: np.ndarray, light: float, seed: int) -> np.ndarray:
    """A picture in less light, with the shot noise of the photons that are left and the sensor's own noise.

    Source: MPM, figure 2, which names neither number: a sensor of 500 photons and a deviation of 2 are ours.
    """
    random = np.random.default_rng(seed)
    photons = random.poisson(image * (light * SHOT_PHOTONS / 255))
    noisy = photons * (255 / SHOT_PHOTONS) + random.normal(0, READ_NOISE, image.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def read_classes(path: Path, size: tuple[int, ...], dataset: Dataset, num_classes: int) -> np.ndarray:
    """The class of every pixel, int64 [H, W], -1 where a label is none of the classes.

    Raises:
        ValueError: labels do not have the size of their picture.
    """
    labels = np.asarray(Image.open(path)).astype(np.int64)
    if labels.shape != size:
        raise ValueError(f"{path}: expected {size}, the size of its picture, got {labels.shape}")
    classes = labels - dataset.first_class
    counted = (labels != dataset.ignore) & (classes >= 0) & (classes < num_classes)
    return np.where(counted, classes, -1)
