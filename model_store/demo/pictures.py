"""Training crops, made on the device from pictures that lie there: labelled photographs and painted scenes."""

import logging
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .painter import paint_scene
from .scene import BICYCLIST, CAR, CLASSES, FENCE, PEDESTRIAN, POLE, SIGN

IGNORE = len(CLASSES)
RARE = (POLE, SIGN, FENCE, PEDESTRIAN, BICYCLIST)
PASTED = (*RARE, CAR)
FITTED_SIDE = 512  # the short side of a picture at inference
SPOTS = 20_000  # remembered pixels of each rare class
SCENES_AT_ONCE = 50

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How far crops stray from what inference sees.

    Attributes:
        zoom: the largest enlargement, as a factor; reductions go down to 1 / sqrt(zoom).
        squeeze: the largest change of the sides' ratio either way, as a factor of each.
        turn: the largest rotation, in radians.
        painted: share of painted scenes.
        pasted: share of crops into which things of another crop are pasted.
        blended: share of crops that are mixed with another one pixel by pixel; their labels are unknown.
    """

    zoom: float
    squeeze: float
    turn: float
    painted: float
    pasted: float
    blended: float


class Pictures:
    """Labelled pictures of one size, and painted ones of the same size as soon as they are there.

    Attributes:
        class_weights: [K] inverse square roots of the class frequencies, 1 for the class of mean weight.
        num_painted: painted scenes that can be drawn so far.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], *, num_scenes: int, num_workers: int, device: str, seed: int
    ) -> None:
        photos, labels = zip(*map(read_pair, pairs), strict=True)
        for (path, _), photo in zip(pairs, photos, strict=True):
            if photo.shape != photos[0].shape:
                raise ValueError(f"{path}: expected {photos[0].shape}, the size of the others, got {photo.shape}")
        self.height, self.width = labels[0].shape
        self.num_photos, self.num_painted = len(photos), 0
        # Labels are kept as IGNORE - label: what lies outside a picture is sampled as 0, unknown.
        shape = (len(photos) + num_scenes, self.height, self.width)
        self.images = torch.empty((shape[0], 3, *shape[1:]), dtype=torch.uint8, device=device)
        self.labels = torch.empty(shape, dtype=torch.uint8, device=device)
        self._put(slice(len(photos)), np.stack(photos), np.stack(labels))
        counts = np.array([np.bincount(own.ravel(), minlength=IGNORE + 1)[:IGNORE] for own in labels])
        weights = (np.maximum(counts.sum(0), 1) / counts.sum()) ** -0.5
        self.class_weights = torch.tensor(weights / weights.mean(), dtype=torch.float32, device=device)
        self.things = torch.tensor([label in PASTED for label in range(IGNORE + 1)], device=device)
        self.spots = find_spots(labels, np.random.default_rng(seed)).to(device)
        self._stop = threading.Event()
        self._painting = threading.Thread(target=self._paint, args=(num_scenes, num_workers, seed), daemon=True)
        self._painting.start()

    def close(self) -> None:
        """Paint no more scenes."""
        self._stop.set()
        self._painting.join()

    def batch(self, size: int, crop: int, how: Augmentation) -> tuple[Tensor, Tensor]:
        """Normalised windows [B, 3, crop, crop] and their labels [B, crop, crop], IGNORE where unknown."""
        index, centre = self._choose(size, how)
        windows, labels = self._warp(index, centre, crop, how)
        windows, labels = paste_things(windows, labels, self.things, share=how.pasted)
        windows, labels = cut_out(photograph(windows), labels)
        blended = round(size * how.blended)
        if blended:
            amount = torch.rand(blended, 1, 1, 1, device=windows.device)
            windows = torch.cat([torch.lerp(windows[:blended], windows[-blended:], amount), windows[blended:]])
            labels = torch.cat([torch.full_like(labels[:blended], IGNORE), labels[blended:]])
        return windows, labels

    def _choose(self, size: int, how: Augmentation) -> tuple[Tensor, Tensor]:
        """Pictures [B] and where to look at them, [B, 2] as x, y in pixels; half of the photographs at rare things."""
        device = self.images.device
        num_painted = round(size * how.painted) if self.num_painted else 0
        num_rare = (size - num_painted) // 2 if len(self.spots) else 0
        num_any = size - num_painted - num_rare
        end = self.num_photos + max(self.num_painted, 1)
        painted = torch.randint(self.num_photos, end, (num_painted,), device=device)
        index = torch.cat([painted, torch.randint(self.num_photos, (num_any,), device=device)])
        x, y = torch.rand(2, len(index), device=device)
        centre = torch.stack([x * self.width, y * self.height], dim=1)
        if num_rare:
            classes = torch.randint(len(self.spots), (num_rare,), device=device)
            spots = self.spots[classes, torch.randint(self.spots.shape[1], (num_rare,), device=device)]
            index, centre = torch.cat([index, spots[:, 0]]), torch.cat([centre, spots[:, 1:] + 0.5])
        order = torch.randperm(size, device=device)
        return index[order], centre[order]

    def _warp(self, index: Tensor, centre: Tensor, crop: int, how: Augmentation) -> tuple[Tensor, Tensor]:
        """Scale, squeeze, turn, flip and crop in one sampling."""
        size, device = len(index), index.device
        log_zoom = uniform(size, -0.5 * math.log(how.zoom), math.log(how.zoom), device)
        log_squeeze, turn = (uniform(size, -most, most, device) for most in (math.log(how.squeeze), how.turn))
        fitted = FITTED_SIDE / min(self.height, self.width)
        # Half the crop's sides in pixels of the picture; signed, for the flip.
        half_x = crop / 2 / fitted * (-log_zoom - log_squeeze).exp()
        half_y = crop / 2 / fitted * (-log_zoom + log_squeeze).exp()
        x = keep_inside(centre[:, 0] + half_x * uniform(size, -0.8, 0.8, device), half_x, self.width)
        y = keep_inside(centre[:, 1] + half_y * uniform(size, -0.8, 0.8, device), half_y, self.height)
        half_x = half_x * torch.where(torch.rand(size, device=device) < 0.5, -1, 1)
        across = torch.stack([turn.cos() * half_x, -turn.sin() * half_y, x - self.width / 2], dim=1) * 2 / self.width
        down = torch.stack([turn.sin() * half_x, turn.cos() * half_y, y - self.height / 2], dim=1) * 2 / self.height
        grid = F.affine_grid(torch.stack([across, down], dim=1), [size, 3, crop, crop], align_corners=False)
        windows = self.images[index].float().sub_(127.5).div_(127.5)  # "vit"; outside is grey
        labels = self.labels[index, None].float()
        windows = F.grid_sample(windows, grid, mode="bilinear", align_corners=False)
        labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)
        return windows, IGNORE - labels[:, 0].round().long()

    def _paint(self, num_scenes: int, num_workers: int, seed: int) -> None:
        """Fill the rest of `images`, many scenes at a time: each copy waits for what the device is busy with."""
        if not num_scenes:
            return
        parts = np.array_split(np.arange(seed * num_scenes, (seed + 1) * num_scenes), -(-num_scenes // SCENES_AT_ONCE))
        paint = partial(paint_scenes, self.height, self.width)
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            for images, labels in pool.map(paint, parts):
                first = self.num_photos + self.num_painted
                self._put(slice(first, first + len(images)), images, labels)
                self.num_painted += len(images)
                if self._stop.is_set():
                    pool.shutdown(wait=False, cancel_futures=True)
                    return
        log.info("%d scenes are painted", self.num_painted)

    def _put(self, index: slice, images: np.ndarray, labels: np.ndarray) -> None:
        self.images[index] = torch.from_numpy(images).movedim(-1, 1)
        self.labels[index] = torch.from_numpy(IGNORE - labels)


def read_pair(paths: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, 3] and its labels uint8 [H, W], IGNORE for whatever is no class."""
    image, labels = np.array(Image.open(paths[0]).convert("RGB")), np.array(Image.open(paths[1]))
    if labels.shape != image.shape[:2]:
        raise ValueError(f"{paths[1]}: expected {image.shape[:2]}, the size of its picture, got {labels.shape}")
    return image, np.minimum(labels, IGNORE).astype(np.uint8)


def find_spots(labels: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Pixels of the rare classes that occur, [R, SPOTS, 3] as picture, x, y; pictures with a class count alike."""
    found = []
    for rare in RARE:
        each = [np.argwhere(own == rare)[:, ::-1] for own in labels]
        having = [index for index, places in enumerate(each) if len(places)]
        if having:
            drawn = (int(index) for index in rng.choice(having, SPOTS))
            found.append([(index, *each[index][rng.integers(len(each[index]))]) for index in drawn])
    return torch.tensor(np.array(found, np.int64).reshape(-1, SPOTS, 3))


def paint_scenes(height: int, width: int, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Scenes [S, H, W, 3] of any clutter, more often crowded than empty, and their labels [S, H, W]."""
    clutters = (float(np.random.default_rng(seed).random() ** 0.5) for seed in seeds)
    scenes = [
        paint_scene(height, width, clutter=clutter, seed=int(seed))
        for seed, clutter in zip(seeds, clutters, strict=True)
    ]
    images, labels = zip(*scenes, strict=True)
    return np.stack(images), np.stack(labels)


def keep_inside(centre: Tensor, half: Tensor, side: int) -> Tensor:
    """The nearest centres whose spans stay within the side, or the middle where they can't."""
    return torch.where(2 * half >= side, side / 2, torch.minimum(torch.maximum(centre, half), side - half))


def paste_things(windows: Tensor, labels: Tensor, things: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
    """Copy the things of some classes from the previous crop of the batch, at their place.

    Args:
        things: [K + 1] bool, classes to copy.
        share: of the crops that take any.

    Source: Olsson et al., ClassMix (arXiv 2007.07936), with things for classes.
    """
    size, device = len(windows), windows.device
    takes = torch.rand(size, 1, device=device) < share
    chosen = (torch.rand(size, len(things), device=device) < 0.6) & takes & things
    donors = labels.roll(1, 0)
    pasted = chosen.gather(1, donors.flatten(1)).view_as(labels)
    return torch.where(pasted[:, None], windows.roll(1, 0), windows), torch.where(pasted, donors, labels)


def photograph(windows: Tensor) -> Tensor:
    """Saturation, contrast, exposure, white balance, blur and noise of another day; -1..1 in and out."""
    size, device = len(windows), windows.device

    def per_crop(low: float, high: float, share: float = 1.0, channels: int = 1) -> Tensor:
        drawn = uniform(size * channels, low, high, device).view(size, channels, 1, 1)
        return drawn * (torch.rand(size, 1, 1, 1, device=device) < share)

    grey = windows.mean(1, keepdim=True)
    windows = torch.lerp(grey, windows, per_crop(0.4, 1.6, share=0.95))
    mean = windows.mean((1, 2, 3), keepdim=True)
    windows = torch.lerp(mean, windows, per_crop(0.65, 1.4))
    windows = (windows + 1) * per_crop(-0.5, 0.35).exp() * per_crop(0.92, 1.08, channels=3) - 1
    windows = torch.lerp(windows, F.avg_pool2d(windows, 5, 1, 2), per_crop(0, 1, share=0.3))
    windows = windows + torch.randn_like(windows) * per_crop(0, 0.08, share=0.5)
    return windows.clamp(-1, 1)


def cut_out(windows: Tensor, labels: Tensor, *, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Hide a rectangle of some crops."""
    size, crop, device = len(windows), windows.shape[2], windows.device
    low, extent = torch.rand(2, size, 2, 1, device=device)
    extent = (0.08 + 0.25 * extent) * (torch.rand(size, 1, 1, device=device) < share)
    place = torch.arange(crop, device=device) / crop
    inside = (place >= low) & (place < low + extent)  # [B, 2, crop]
    hidden = inside[:, 0, :, None] & inside[:, 1, None, :]
    return windows.masked_fill(hidden[:, None], 0), labels.masked_fill(hidden, IGNORE)


def uniform(size: int, low: float, high: float, device: torch.device) -> Tensor:
    """[size] numbers within low..high."""
    return torch.empty(size, device=device).uniform_(low, high)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
