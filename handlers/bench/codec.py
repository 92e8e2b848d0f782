"""Decoding pictures, cutting windows and encoding masks, against the plain ways, one thread a call.

Real pictures as they are and enlarged to 1920x1080 and 4000x3000; masks are the model's own of them.
"""

import argparse
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco
from torch import Tensor

from handlers.api.decode import decode_image
from handlers.api.formats.json import describe_classes
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.bench import model_shapes, percentile_ms, read_images, time_in_turn, write_report
from mpm_ops.classes import Classes, default_colors
from mpm_ops.windows import NORMALIZATIONS, InferenceConfig, WindowPlan, cut_windows, plan_windows

SIZES = ((1920, 1080), (4000, 3000))
JPEG_QUALITY = 90

Way = Callable[[], Any]


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def cut_whole(image: np.ndarray, plan: WindowPlan, inference: InferenceConfig) -> Tensor:
    """Normalise the fitted picture as floats, then cut and stack."""
    fitted = cv2.resize(image, plan.fitted_size[::-1], interpolation=cv2.INTER_LINEAR)
    mean, std = (torch.tensor(stat) for stat in NORMALIZATIONS[inference.normalization])
    frame = ((torch.from_numpy(fitted) - mean) / std).permute(2, 0, 1)[None]
    if plan.frame_size != plan.fitted_size:
        frame = F.interpolate(frame, size=plan.frame_size, mode="bilinear", align_corners=False)
    size = plan.window_size
    return torch.stack([frame[0, :, top : top + size, left : left + size] for top in plan.tops for left in plan.lefts])


def png_with_pillow(labels: np.ndarray, classes: Classes) -> bytes:
    image = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        image.putpalette(classes.colors.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def regions_one_by_one(labels: np.ndarray) -> list[tuple[int, int, str]]:
    """Class, area and run lengths, a pass over all pixels for each class."""
    areas = np.bincount(labels.ravel())
    order = np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)].tolist()
    counts = [coco.encode(np.asfortranarray(labels == index))["counts"].decode("ascii") for index in order]
    return [(index, int(areas[index]), text) for index, text in zip(order, counts, strict=True)]


def bench_codec(model: Segmenter, pictures: Mapping[str, np.ndarray], repeats: int) -> list[dict[str, Any]]:
    """Parity first, then every step by both ways in turn; medians.

    Raises:
        RuntimeError: two ways differ.
    """
    classes = Classes(tuple(map(str, range(model.config.n_cls))), default_colors(model.config.n_cls))
    results = []
    for name, image in pictures.items():
        data = encode_picture(image, "image/jpeg")
        plan = plan_windows(image.shape[0], image.shape[1], model.inference)
        labels = model.segment(image)
        for step, plain, ours in _ways(data, plan, model.inference, labels, classes):
            sizes = _check(step, plain(), ours())
            seconds = time_in_turn({"plain_ms": plain, "ms": ours}, repeats=repeats)
            ratio = statistics.median(p / o for p, o in zip(*seconds.values(), strict=True))
            row = {"picture": name, "step": step, **{way: percentile_ms(spent) for way, spent in seconds.items()}}
            row["speedup"] = round(ratio, 2)
            results.append(row | ({"plain_bytes": sizes[0], "bytes": sizes[1]} if sizes else {}))
    return results


def _ways(
    data: bytes, plan: WindowPlan, inference: InferenceConfig, labels: np.ndarray, classes: Classes
) -> list[tuple[str, Way, Way]]:
    image = decode_with_pillow(data)
    limits = {"max_bytes": len(data), "max_pixels": labels.size}
    return [
        ("decode", lambda: decode_with_pillow(data), lambda: decode_image(data, **limits)),
        ("cut", lambda: cut_whole(image, plan, inference), lambda: cut_windows(image, plan, inference)),
        ("png", lambda: png_with_pillow(labels, classes), lambda: encode_mask_png(labels, classes)),
        (
            "json",
            lambda: regions_one_by_one(labels),
            lambda: [
                (entry["id"], entry["area"], entry["rle"]["counts"]) for entry in describe_classes(labels, classes)
            ],
        ),
    ]


def _check(step: str, plain: Any, ours: Any) -> tuple[int, int] | None:
    """Bytes of both where they are files, which may differ as files and not as pictures."""
    sizes = None
    if isinstance(ours, bytes):
        sizes = len(plain), len(ours)
        plain, ours = (np.asarray(Image.open(io.BytesIO(data))) for data in (plain, ours))
    if not (plain == ours if isinstance(ours, list) else np.array_equal(plain, ours)):
        raise RuntimeError(f"parity: {step} gives another result than the plain way; no figures are reported")
    return sizes


def pictures_of_all_sizes(images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The pictures as they are, and the first one enlarged."""
    found = {f"{i}: {image.shape[1]}x{image.shape[0]}": image for i, image in enumerate(images)}
    for size in SIZES:
        found[f"{size[0]}x{size[1]}"] = cv2.resize(images[0], size, interpolation=cv2.INTER_CUBIC)
    return found


def add_command(commands: Any) -> None:
    """Add `codec` to the commands of `mpm bench`."""
    command = commands.add_parser("codec", help="decoding, cutting and encoding, against the plain ways")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument("--most", type=int, default=2, help="pictures of a folder, evenly chosen")
    command.add_argument("--repeats", type=int, default=11)
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images, arguments.most)
    model = load_segmenter(arguments.checkpoint, ())
    results = bench_codec(model, pictures_of_all_sizes(images), arguments.repeats)
    for row in results:
        sizes = f"  {row['plain_bytes']} -> {row['bytes']} bytes" if "bytes" in row else ""
        print(
            f"{row['picture']:<14} {row['step']:<7} plain {row['plain_ms']:8.2f} ms  ours {row['ms']:8.2f} ms  "
            f"{row['speedup']:6.2f}x{sizes}"
        )
    write_report(arguments.out, {"repeats": arguments.repeats, "results": results}, shapes=model_shapes(model))
    return 0
