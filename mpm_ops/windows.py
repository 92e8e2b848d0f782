"""From a picture to the network's square windows: Segmenter's official resize rule and sliding window."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FITS = ("shorter", "longer")

# On the 0..255 scale, as upstream rounds them.
NORMALIZATIONS = {
    "vit": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "deit": ((123.68, 116.28, 103.53), (58.4, 57.12, 57.38)),
}


class TooManyWindowsError(ValueError):
    """A picture would need more windows than `max_windows_per_request`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """How a picture of any size becomes windows.

    Attributes:
        im_size: the picture is resized to fit (max_ratio * im_size) x im_size pixels, up or down.
        max_ratio: how much longer than im_size the long side may get.
        window_size: side of the square windows in pixels.
        window_stride: pixels between neighbouring windows.
        normalization: a key of NORMALIZATIONS.
        max_windows_per_request: pictures that need more are refused.
        fit: which side of a picture longer than max_ratio decides. "shorter", the official rule: it is brought up to
            the window, and there are as many windows as it takes. "longer": it has max_ratio * im_size pixels, and the
            other is padded to the window; the picture is seen smaller, and its windows are bounded.
    """

    im_size: int
    max_ratio: int
    window_size: int
    window_stride: int
    normalization: str
    max_windows_per_request: int = 64
    fit: str = "shorter"

    def __post_init__(self) -> None:
        for name in ("im_size", "max_ratio", "window_size", "window_stride", "max_windows_per_request"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.window_stride > self.window_size:
            raise ValueError(
                f"window_stride: expected at most window_size = {self.window_size}, got {self.window_stride}"
            )
        if self.fit not in FITS:
            raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {self.fit!r}")
        if str(self.normalization) not in NORMALIZATIONS:
            raise ValueError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalization!r}")


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Where the windows of one picture lie. Sizes are (height, width) in pixels.

    Attributes:
        original_size: the picture as it came.
        fitted_size: after the keep-ratio resize of its 8-bit pixels.
        frame_size: after the short side is brought up to the window; windows lie in this frame, or, where the longer
            side decides, may reach beyond it.
        window_size: side of a window.
        tops, lefts: window origins; windows are their product, row by row.
    """

    original_size: tuple[int, int]
    fitted_size: tuple[int, int]
    frame_size: tuple[int, int]
    window_size: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def num_windows(self) -> int:
        return len(self.tops) * len(self.lefts)


def plan_windows(height: int, width: int, inference: InferenceConfig) -> WindowPlan:
    """Lay out the windows of a height x width picture; needs its size only.

    Raises:
        ValueError: height or width is below 1.
        TooManyWindowsError: see `InferenceConfig.max_windows_per_request`.

    Source: mmcv's keep-ratio resize, then rstrudel/segmenter@20d1bfad, `segm/model/utils.py`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"picture: expected at least 1x1 pixels, got {width}x{height}")
    window = inference.window_size
    scale = min(inference.im_size * inference.max_ratio / max(height, width), inference.im_size / min(height, width))
    fitted = (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
    frame = fitted
    if min(fitted) < window and inference.fit == "shorter":
        ratio = max(fitted) / min(fitted)
        frame = (window, int(ratio * window)) if fitted[0] < fitted[1] else (int(ratio * window), window)
    tops, lefts = (_origins(side, window, inference.window_stride) for side in frame)
    if len(tops) * len(lefts) > inference.max_windows_per_request:
        told = (
            f"a {width}x{height} picture needs {len(tops) * len(lefts)} windows of {window}x{window}; "
            f"at most {inference.max_windows_per_request} are allowed"
        )
        if inference.fit == "shorter":
            with suppress(TooManyWindowsError):
                fewer = plan_windows(height, width, replace(inference, fit="longer")).num_windows
                told += f"; where the longer side decides (fit: longer) it needs {fewer}"
        raise TooManyWindowsError(told)
    return WindowPlan((height, width), fitted, frame, window, tuple(tops), tuple(lefts))


def fit_picture(image: np.ndarray, plan: WindowPlan) -> np.ndarray:
    """Resize a picture by the plan; all that `cut_windows` needs of it.

    Args:
        image: uint8 RGB [H, W, 3], of the size that was planned, or a reduction of that picture.
    """
    if plan.fitted_size == image.shape[:2]:
        return image
    return cv2.resize(image, plan.fitted_size[::-1], interpolation=cv2.INTER_LINEAR)


def cut_windows(image: np.ndarray, plan: WindowPlan, inference: InferenceConfig, *, as_bytes: bool = False) -> Tensor:
    """Resize, normalise and cut a picture.

    Args:
        image: uint8 RGB [H, W, 3], of the size that was planned, or a reduction of that picture.
        as_bytes: leave normalising to `normalize_windows`, where that gives the same.

    Returns:
        float32 [num_windows, 3, window_size, window_size]; or, as bytes, uint8
        [num_windows, window_size, window_size, 3]. Windows of a frame that was resized after normalising, which
        pictures much longer than `max_ratio` have, are float32 in any case.
    """
    fitted, size = fit_picture(image, plan), plan.window_size
    if min(plan.frame_size) < size:
        grey = [round(mean) for mean in NORMALIZATIONS[inference.normalization][0]]
        missing = [max(size - side, 0) for side in plan.frame_size]
        fitted = cv2.copyMakeBorder(fitted, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=grey)
    origins = list(product(plan.tops, plan.lefts))
    if plan.frame_size == plan.fitted_size and as_bytes:
        pixels = np.empty((plan.num_windows, size, size, 3), np.uint8)
        for window, (top, left) in zip(pixels, origins, strict=True):
            window[:] = fitted[top : top + size, left : left + size]
        return torch.from_numpy(pixels)
    planes, tables = cv2.split(fitted), _normalized_values(inference.normalization)
    windows = np.empty((plan.num_windows, 3, size, size), np.float32)
    if plan.frame_size == plan.fitted_size:
        for window, (top, left) in zip(windows, origins, strict=True):
            for plane, table, normalized in zip(planes, tables, window, strict=True):
                cv2.LUT(plane[top : top + size, left : left + size], table, dst=normalized)
        return torch.from_numpy(windows)
    frame = torch.from_numpy(np.stack([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)]))
    frame = F.interpolate(frame[None], size=plan.frame_size, mode="bilinear", align_corners=False)[0]
    for window, (top, left) in zip(windows, origins, strict=True):
        window[:] = frame[:, top : top + size, left : left + size]
    return torch.from_numpy(windows)


def normalize_windows(windows: Tensor, normalization: str) -> Tensor:
    """What `cut_windows` gives, from its bytes, on the device that they are on: the same numbers.

    Args:
        windows: uint8 [B, H, W, 3]; float32 [B, 3, H, W] is returned as it is.
        normalization: a key of NORMALIZATIONS.

    Returns:
        float32 [B, 3, H, W], channels last in memory.

    Raises:
        ValueError: windows are neither.
    """
    if windows.is_floating_point():
        return windows
    if windows.dtype != torch.uint8 or windows.ndim != 4 or windows.shape[3] != 3:
        raise ValueError(f"windows: expected uint8 [B, H, W, 3], got {windows.dtype} {list(windows.shape)}")
    mean, std = _statistics_on(normalization, windows.device)
    return ((windows.float() - mean) / std).movedim(3, 1)


@lru_cache(maxsize=16)
def _statistics_on(normalization: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [3] mean and standard deviation of the channels."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(stat, dtype=torch.float32) for stat in NORMALIZATIONS[normalization])
        return mean.to(device), std.to(device)


@cache
def _normalized_values(normalization: str) -> np.ndarray:
    """float32 [3, 256]: what each channel's bytes become."""
    mean, std = (torch.tensor(stat, dtype=torch.float32) for stat in NORMALIZATIONS[normalization])
    return ((torch.arange(256)[:, None] - mean) / std).T.contiguous().numpy()


def _origins(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
