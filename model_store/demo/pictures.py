"""Training crops: labelled pictures and painted scenes, at the scale in which inference sees a picture."""

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from mpm_ops.windows import NORMALIZATIONS

from .painter import paint_scene
from .scene import BICYCLIST, CLASSES, FENCE, PEDESTRIAN, POLE, SIGN

IGNORE = len(CLASSES)
RARE = (POLE, SIGN, FENCE, PEDESTRIAN, BICYCLIST)
FITTED_SIDE = 512  # the short side of a picture at inference


class Pictures:
    """Random crops of labelled pictures and painted scenes, at the scale of inference."""

    def __init__(self, folder: Path, rng: np.random.Generator, *, painted: float) -> None:
        paths = sorted((folder / "images").iterdir())
        self.images = [read_picture(path, cv2.IMREAD_COLOR_RGB) for path in paths]
        self.labels = [read_picture(folder / "labels" / f"{p.stem}.png", cv2.IMREAD_UNCHANGED) for p in paths]
        self.rng = rng
        self.painted = painted
        counts = np.array([np.bincount(labels.ravel(), minlength=IGNORE + 1)[:IGNORE] for labels in self.labels])
        self.frequency = counts.sum(0) / counts.sum()
        self.having = {rare: np.flatnonzero(counts[:, rare] > 100) for rare in RARE}

    def class_weights(self) -> Tensor:
        """[K] inverse square roots of the class frequencies, 1 for the class of mean weight."""
        weights = self.frequency**-0.5
        return torch.tensor(weights / weights.mean(), dtype=torch.float32)

    def batch(self, size: int, crop: int) -> tuple[Tensor, Tensor]:
        """Normalised windows [B, 3, crop, crop] and their labels [B, crop, crop]."""
        images, labels = zip(*(self._sample(crop) for _ in range(size)), strict=True)
        mean, std = np.array(NORMALIZATIONS["vit"], np.float32)
        windows = (np.stack(images) - mean) / std
        return torch.from_numpy(windows).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(labels)).long()

    def _sample(self, crop: int) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        rare = rng.choice(RARE) if rng.random() < 0.5 else None
        if rng.random() < self.painted:
            height, width = rng.integers(260, 400, size=2)
            seed = int(rng.integers(2**31))
            image, labels = paint_scene(int(height), int(width * 1.25), clutter=rng.random() ** 0.5, seed=seed)
        else:
            index = rng.integers(len(self.images)) if rare is None else rng.choice(self.having[rare])
            image, labels = self.images[index], self.labels[index]
        image, labels = random_crop(image, labels, crop, rng, rare)
        return jitter_colours(image, rng), labels


def read_picture(path: Path, mode: int) -> np.ndarray:
    """Read a picture or a label map, or say which one can't be read."""
    picture = cv2.imread(str(path), mode)
    if picture is None:
        raise FileNotFoundError(f"{path}: no readable picture")
    return picture


def random_crop(
    image: np.ndarray, labels: np.ndarray, crop: int, rng: np.random.Generator, rare: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale, squeeze, flip and crop in one warp; around a pixel of the rare class if there is one."""
    height, width = labels.shape
    scale = FITTED_SIDE / min(height, width) * math.exp(rng.uniform(math.log(0.6), math.log(1.6)))
    squeeze = math.exp(rng.uniform(-0.12, 0.12))
    scale_x, scale_y = scale * squeeze, scale / squeeze
    spots = np.argwhere(labels == rare) if rare is not None else np.empty((0, 2))
    if len(spots):
        y, x = rng.choice(spots) + 0.5
        y, x = y + rng.uniform(-0.4, 0.4) * crop / scale_y, x + rng.uniform(-0.4, 0.4) * crop / scale_x
    else:
        y, x = rng.uniform(0, height), rng.uniform(0, width)
    y, x = keep_inside(y, height, crop / scale_y), keep_inside(x, width, crop / scale_x)
    flip = rng.choice([-1, 1])
    matrix = np.array(
        [
            [flip * scale_x, 0, crop / 2 - 0.5 - flip * scale_x * (x - 0.5)],
            [0, scale_y, crop / 2 - 0.5 - scale_y * (y - 0.5)],
        ]
    )
    size = (crop, crop)
    return (
        cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=[127, 127, 127]),
        cv2.warpAffine(labels, matrix, size, flags=cv2.INTER_NEAREST, borderValue=[IGNORE]),
    )


def keep_inside(centre: float, side: int, span: float) -> float:
    """The nearest centre whose span of pixels stays within the side, or the middle if it can't."""
    return side / 2 if span >= side else min(max(centre, span / 2), side - span / 2)


def jitter_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and white balance of another day; float32 out."""
    picture = image.astype(np.float32)
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + (picture - grey) * rng.uniform(0.5, 1.5)
    picture = (picture - grey.mean()) * rng.uniform(0.7, 1.35) + grey.mean()
    gains = math.exp(rng.uniform(-0.5, 0.35)) * rng.uniform(0.93, 1.07, size=3)
    return np.clip(picture * gains.astype(np.float32), 0, 255)
