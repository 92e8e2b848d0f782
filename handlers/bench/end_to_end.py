"""What serving costs beyond the model: the engine at saturation and alone, beside the same steps one by one."""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from itertools import count
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

from .load import closed_loop

OPTIONS = RequestOptions(request_id="bench")


def bench_end_to_end(
    model: Segmenter,
    classes: Classes,
    images: Sequence[np.ndarray],
    config: ServingConfig,
    seconds: float,
    rounds: int,
) -> dict[str, Any]:
    """Steps one by one, the engine with one client and with eight, in turn.

    Raises:
        RuntimeError: the engine does not give the masks of the steps; figures would compare different work.
    """
    model.runtime = make_runtime(model, config.runtime, config.precision)
    pictures = [encode_picture(image, "image/jpeg") for image in images]
    num_windows = [plan_windows(image.shape[0], image.shape[1], model.inference).num_windows for image in images]
    steps: list[dict[str, float]] = []
    alone: list[float] = []
    windows_per_second = []
    with closing(Engine(model, classes, config)) as engine:
        for picture in pictures:
            if engine.submit(picture, OPTIONS).result().body != _step_by_step(model, classes, picture)[0]:
                raise RuntimeError("parity: the engine does not give the library's mask; no figures are reported")
        for _ in range(rounds):
            end = time.monotonic() + seconds
            for i in count():
                steps.append(_step_by_step(model, classes, pictures[i % len(pictures)])[1])
                start = time.monotonic()
                engine.submit(pictures[i % len(pictures)], OPTIONS).result()
                alone.append(time.monotonic() - start)
                if time.monotonic() > end:
                    break
            windows_per_second.append(_saturate(engine, pictures, num_windows, seconds))
    model_only = sum(step["windows"] for step in steps) / sum(step["network"] for step in steps)
    names = ("decode", "network", "labels", "encode")
    lone_ms, summed_ms = percentile_ms(alone), percentile_ms([sum(step[name] for name in names) for step in steps])
    served = statistics.median(windows_per_second)
    return {
        "runtime": f"{model.runtime.name} {model.runtime.precision}",
        "median_ms": {name: percentile_ms([step[name] for step in steps]) for name in names},
        "model_windows_per_second": round(model_only, 3),
        "served_windows_per_second": round(served, 3),
        "served_share": round(served / model_only, 3),
        "alone_ms_p50": lone_ms,
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


def _saturate(
    engine: Engine, pictures: Sequence[bytes], num_windows: Sequence[int], seconds: float, num_clients: int = 8
) -> float:
    """Windows per second with clients that each send the next picture when they have their mask."""

    def ask(i: int) -> None:
        engine.submit(pictures[i % len(pictures)], OPTIONS).result()

    latencies, elapsed = closed_loop(lambda: nullcontext(ask), num_clients, seconds)
    return sum(num_windows[i % len(pictures)] for i in range(len(latencies))) / elapsed


def add_command(commands: Any) -> None:
    """Add `end-to-end` to the commands of `mpm bench`."""
    command = commands.add_parser("end-to-end", help="what serving costs beyond the model")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument("--most", type=int, default=8, help="pictures of a folder, evenly chosen")
    command.add_argument("--schedule", default="2,5")
    command.add_argument("--seconds", type=float, default=10, help="of each loop")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images, arguments.most)
    schedule = parse_schedule(arguments.schedule)
    model = load_segmenter(arguments.checkpoint, schedule)
    classes = load_classes(arguments.checkpoint.parent, model.config.n_cls)
    config = ServingConfig(schedule=schedule)
    found = bench_end_to_end(model, classes, images, config, arguments.seconds, arguments.rounds)
    for name, value in found.items():
        print(f"{name}: {value}")
    write_report(arguments.out, found, shapes=model_shapes(model) | {"pictures": [image.shape for image in images]})
    return 0
