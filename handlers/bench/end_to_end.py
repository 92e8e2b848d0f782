"""What serving costs beyond the model: the engine at saturation and alone, beside the same steps one by one."""

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handlers.api.decode import decode_image
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.api.options import RequestOptions
from handlers.config import ServingConfig
from handlers.engine.engine import Engine
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.bench import model_shapes, percentile_ms, read_images, write_report
from mpm_ops.classes import Classes, load_classes
from mpm_ops.labels import label_map
from mpm_ops.runtime import make_runtime
from mpm_ops.stages import parse_schedule
from mpm_ops.windows import cut_windows, plan_windows

OPTIONS = RequestOptions(request_id="bench")
WARM_UP = 3  # pictures that are not timed


def bench_end_to_end(
    model: Segmenter, classes: Classes, images: Sequence[np.ndarray], config: ServingConfig
) -> dict[str, Any]:
    """Steps one by one and the engine with one client, in random order, then the engine with eight.

    Each sees every picture once; the first ones warm up and are not timed.

    Raises:
        ValueError: there is no picture left to time.
        RuntimeError: the engine does not give the masks of the steps; figures would compare different work.
    """
    pictures = list(dict.fromkeys(encode_picture(image, "image/jpeg") for image in images))
    if len(pictures) <= WARM_UP:
        raise ValueError(f"images: expected more than {WARM_UP} different pictures, got {len(pictures)}")
    model.runtime = make_runtime(model, config.runtime, config.precision)
    steps: list[dict[str, float]] = []
    alone: list[float] = []
    order = random.Random(0)
    with closing(Engine(model, classes, config)) as engine:
        for i, picture in enumerate(pictures):
            masks: dict[str, bytes] = {}
            for way in order.sample(("steps", "engine"), 2):
                start = time.monotonic()
                if way == "steps":
                    masks[way], seconds = _step_by_step(model, classes, picture)
                else:
                    masks[way] = engine.submit(picture, OPTIONS).result().body
                    elapsed = time.monotonic() - start
            if masks["steps"] != masks["engine"]:
                raise RuntimeError("parity: the engine does not give the library's mask; no figures are reported")
            if i >= WARM_UP:
                steps.append(seconds)
                alone.append(elapsed)
        num_windows = sum(step["windows"] for step in steps)
        served = num_windows / _saturate(engine, pictures[WARM_UP:])
    model_only = num_windows / sum(step["network"] for step in steps)
    names = ("decode", "network", "labels", "encode")
    lone_ms, summed_ms = percentile_ms(alone), percentile_ms([sum(step[name] for name in names) for step in steps])
    return {
        "runtime": f"{model.runtime.name} {model.runtime.precision}",
        "pictures": len(steps),
        "median_ms": {name: percentile_ms([step[name] for step in steps]) for name in names},
        "model_windows_per_second": round(model_only, 3),
        "served_windows_per_second": round(served, 3),
        "served_share": round(served / model_only, 3),
        "alone_ms_p50": lone_ms,
        "alone_ms_p90": percentile_ms(alone, 90),
        "summed_ms_p50": summed_ms,
        "alone_over_summed": round(lone_ms / summed_ms, 3),
    }


@torch.inference_mode()
def _step_by_step(model: Segmenter, classes: Classes, picture: bytes) -> tuple[bytes, dict[str, float]]:
    """The mask, and the seconds of each step; cutting windows counts as decoding."""
    start = time.monotonic()
    image = decode_image(picture, max_bytes=len(picture), max_pixels=10**9)
    plan = plan_windows(image.shape[0], image.shape[1], model.inference)
    windows = cut_windows(image, plan, model.inference)
    decoded = time.monotonic()
    logits = torch.cat([model.window_logits(window[None]) for window in windows])
    computed = time.monotonic()
    labels = label_map(logits, plan, model.config.patch_size).labels
    labelled = time.monotonic()
    mask = encode_mask_png(labels, classes)
    seconds = {
        "decode": decoded - start,
        "network": computed - decoded,
        "labels": labelled - computed,
        "encode": time.monotonic() - labelled,
        "windows": plan.num_windows,
    }
    return mask, seconds


def _saturate(engine: Engine, pictures: Sequence[bytes], num_clients: int = 8) -> float:
    """Seconds in which clients, each sending the next picture when it has its mask, get all of them once."""
    start = time.monotonic()
    with ThreadPoolExecutor(num_clients) as clients:
        list(clients.map(lambda picture: engine.submit(picture, OPTIONS).result(), pictures))
    return time.monotonic() - start


def add_command(commands: Any) -> None:
    """Add `end-to-end` to the commands of `mpm bench`."""
    command = commands.add_parser("end-to-end", help="what serving costs beyond the model")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument("--most", type=int, default=53, help="pictures of a folder, evenly chosen")
    command.add_argument("--schedule", default="2,5")
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images, arguments.most)
    schedule = parse_schedule(arguments.schedule)
    model = load_segmenter(arguments.checkpoint, schedule)
    classes = load_classes(arguments.checkpoint.parent, model.config.n_cls)
    config = ServingConfig(schedule=schedule)
    found = bench_end_to_end(model, classes, images, config)
    for name, value in found.items():
        print(f"{name}: {value}")
    write_report(arguments.out, found, shapes=model_shapes(model) | {"pictures": [image.shape for image in images]})
    return 0
