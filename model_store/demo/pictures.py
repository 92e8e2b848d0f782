"""Training crops, made on the device from pictures that lie there: labelled photographs and painted scenes."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How far crops stray from what inference sees.

    Attributes:
        zoom: the widest change of scale either way, as a factor.
        squeeze: likewise of the aspect.
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
        for index, (photo, own) in enumerate(zip(photos, labels, strict=True)):
            self._put(index, photo, own)
        counts = np.array([np.bincount(own.ravel(), minlength=IGNORE + 1)[:IGNORE] for own in labels])
        weights = (np.maximum(counts.sum(0), 1) / counts.sum()) ** -0.5
        self.class_weights = torch.tensor(weights / weights.mean(), dtype=torch.float32, device=device)
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
        windows, labels = paste_things(windows, labels, share=how.pasted)
        windows, labels = photograph(windows), labels
        windows, labels = cut_out(windows, labels)
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
        painted = torch.randint(self.num_photos, self.num_photos + max(self.num_painted, 1), (num_painted,))
        index = torch.cat([painted, torch.randint(self.num_photos, (num_any,))]).to(device)
        centre = torch.rand(len(index), 2, device=device) * torch.tensor([self.width, self.height], device=device)
        if num_rare:
            classes = torch.randint(len(self.spots), (num_rare,), device=device)
            spots = self.spots[classes, torch.randint(self.spots.shape[1], (num_rare,), device=device)]
            index, centre = torch.cat([index, spots[:, 0]]), torch.cat([centre, spots[:, 1:] + 0.5])
        order = torch.randperm(size, device=device)
        return index[order], centre[order]

    def _warp(self, index: Tensor, centre: Tensor, crop: int, how: Augmentation) -> tuple[Tensor, Tensor]:
        """Scale, squeeze, turn, flip and crop in one sampling."""
        size, device = len(index), index.device
        log_zoom, log_squeeze, turn = (
            uniform(size, -most, most, device) for most in (math.log(how.zoom), math.log(how.squeeze), how.turn)
        )
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
        if not num_scenes:
            return
        paint = partial(paint_one, self.height, self.width)
        with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,)) as pool:
            seeds = range(seed * num_scenes, (seed + 1) * num_scenes)
            for image, labels in pool.map(paint, seeds, chunksize=8):
                if self._stop.is_set():
                    pool.shutdown(wait=False, cancel_futures=True)
                    return
                self._put(self.num_photos + self.num_painted, image, labels)
                self.num_painted += 1

    def _put(self, index: int, image: np.ndarray, labels: np.ndarray) -> None:
        self.images[index] = torch.from_numpy(image).permute(2, 0, 1)
        self.labels[index] = torch.from_numpy(IGNORE - labels)


def read_pair(paths: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, 3] and its labels uint8 [H, W], IGNORE for whatever is no class."""
    image, labels = np.array(Image.open(paths[0]).convert("RGB")), np.array(Image.open(paths[1]))
    if labels.shape != image.shape[:2]:
        raise ValueError(f"{paths[1]}: expected {image.shape[:2]}, the size of its picture, got {labels.shape}")
    return image, np.minimum(labels, IGNORE).astype(np.uint8)


def find_spots(labels: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
    """[rare classes that occur, SPOTS, 3] pixels as picture, x, y; every picture as often as any that has the class."""
    found = []
    for rare in RARE:
        each = [np.argwhere(own == rare)[:, ::-1] for own in labels]
        having = [index for index, places in enumerate(each) if len(places)]
        if having:
            drawn = (int(index) for index in rng.choice(having, SPOTS))
            found.append([(index, *each[index][rng.integers(len(each[index]))]) for index in drawn])
    return torch.tensor(np.array(found, np.int64).reshape(-1, SPOTS, 3))


def paint_one(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene of any clutter, more often crowded than empty."""
    clutter = float(np.random.default_rng(seed).random() ** 0.5)
    return paint_scene(height, width, clutter=clutter, seed=seed)


def keep_inside(centre: Tensor, half: Tensor, side: int) -> Tensor:
    """The nearest centres whose spans stay within the side, or the middle where they can't."""
    return torch.where(2 * half >= side, side / 2, torch.minimum(torch.maximum(centre, half), side - half))


def paste_things(windows: Tensor, labels: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
    """Copy the things of some classes from the next crop of the batch, at their place.

    Source: Olsson et al., ClassMix (arXiv 2007.07936), with things for classes.
    """
    size, device = len(windows), windows.device
    chosen = torch.zeros(size, IGNORE + 1, dtype=torch.bool, device=device)
    takes = torch.rand(size, 1, device=device) < share
    chosen[:, list(PASTED)] = (torch.rand(size, len(PASTED), device=device) < 0.6) & takes
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
