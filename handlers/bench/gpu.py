"""The engine on the device at hand, from bytes to masks, among the sections of `mpm_ops.bench.gpu`.

    python -m handlers.bench.gpu --out gpu.json        # all of it, in one command

The demo model (Ti) on painted noise, or on your pictures: JPEGs, and frames that need no decoding; merged and not, in
turn, on one engine that always has enough to do.
"""

import argparse
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mpm_ops.bench import gpu, read_images
from mpm_ops.bench.model import DEMO

from . import engines

WINDOWS = 32  # of a group
INFLIGHT = 4 * WINDOWS  # pictures
GRAPH_MIB = 2048
PROCESSES = (1, 2, 4, 8)


def time_engine(
    folder: Path, images: Sequence[np.ndarray], device: str, seconds: float, *, graph_mib: int = 0
) -> dict[str, Any]:
    """Pictures a second with many in flight, and milliseconds of one alone.

    Each way as it is served, and frames also without launching the next group behind the one that runs.

    Raises:
        ServingError: a picture was not answered.
    """
    # These need packages that a machine for kernels alone may lack.
    from handlers.api.formats.npy import encode_npy
    from handlers.api.formats.views import encode_picture
    from handlers.api.options import RequestOptions
    from handlers.config import ServingConfig
    from handlers.engine.loading import load_engine

    config = ServingConfig(
        device=device,
        max_group_windows=WINDOWS,
        max_batch_tokens=WINDOWS * 1025,
        max_inflight_tokens=16 * INFLIGHT * 1025,
        codec_threads=max(2, (os.cpu_count() or 2) // 2),
        agreement_fraction=0,
        agreement_min_fraction=0,
        graph_mib=graph_mib,
    )
    sources = {
        "jpeg": [encode_picture(image, "image/jpeg") for image in images],
        "frame": [encode_npy(image) for image in images],
    }
    rows: dict[str, dict[str, Any]] = {}
    with closing(load_engine(folder, config)) as engine:
        options = {
            name: RequestOptions(request_id="bench", schedule=schedule)
            for name, schedule in (("merged", (2, 5)), ("unmerged", ()))
        }
        ways = [(source, name, 1) for source in sources for name in options]
        ways += [("frame", name, 0) for name in options]  # where the host has least to do beside
        parity = {}
        for source, name, lookahead in ways:  # warms up, too
            engine.lookahead = lookahead
            alone = [engine.submit(data, options[name]).result().body for data in sources[source]]
            many = [engine.submit(data, options[name]) for data in sources[source] * 4]
            same = [answer.result().body == alone[i % len(alone)] for i, answer in enumerate(many)]
            parity[_title(source, name, lookahead)] = sum(same) / len(same)
        rates: dict[tuple[str, str, int], list[float]] = {way: [] for way in ways}
        lone: dict[tuple[str, str, int], list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way in ways:
                source, name, engine.lookahead = way
                rates[way].append(_saturate(engine, sources[source], options[name], seconds))
                lone[way] += _alone(engine, sources[source], options[name])
    for way in ways:
        rows[_title(*way)] = {
            "pictures_per_second": round(statistics.median(rates[way]), 2),
            "alone_ms_p50": round(1000 * statistics.median(lone[way]), 3),
        }
    return {
        "engine": rows,
        "pictures": [list(image.shape[:2]) for image in images],
        "same_bytes_among_others": parity,
        "graph_mib": graph_mib,
    }


def _title(source: str, name: str, lookahead: int) -> str:
    return f"{source}, {name}" + (", one group at a time" if lookahead == 0 else "")


def _saturate(engine: Any, data: Sequence[bytes], options: Any, seconds: float) -> float:
    """Pictures answered per second while so many are in flight."""
    flying: deque[Any] = deque()
    answered, sent, start = 0, 0, time.monotonic()
    while time.monotonic() - start < seconds:
        while len(flying) < INFLIGHT:
            flying.append(engine.submit(data[sent % len(data)], options))
            sent += 1
        flying.popleft().result()
        answered += 1
    rate = answered / (time.monotonic() - start)
    for answer in flying:
        answer.result()
    return rate


def _alone(engine: Any, data: Sequence[bytes], options: Any, number: int = 10) -> list[float]:
    seconds = []
    for i in range(number):
        start = time.monotonic()
        engine.submit(data[i % len(data)], options).result()
        seconds.append(time.monotonic() - start)
    return seconds


def _engines(
    arguments: argparse.Namespace, images: Sequence[np.ndarray], size: str, mps: bool, on_gpu: bool
) -> dict[str, Any]:
    from handlers.api.formats.npy import encode_npy
    from handlers.api.formats.views import encode_picture

    sources = {
        "jpeg": [encode_picture(image, "image/jpeg") for image in images],
        "frame": [encode_npy(image) for image in images],
    }
    load = engines.Load(
        folder=arguments.checkpoint.parent,
        size=size,
        device=arguments.device,
        sources=sources,
        windows=WINDOWS,
        inflight=INFLIGHT,
        graph_mib=GRAPH_MIB if on_gpu else 0,
    )
    first = size == (arguments.sizes or ("Ti",))[0]  # around the network all sizes cost the same
    networks = engines.NETWORKS if first else engines.NETWORKS[:1]
    found = engines.time_engines(
        load, processes=arguments.processes, networks=networks, seconds=arguments.loop, mps=mps
    )
    return found | {"lines": [engines.line(row) for row in found["engines"]]}


def soft_pictures(number: int, side: int) -> list[np.ndarray]:
    """Soft noise: JPEGs of it are about as large as those of photos."""
    random = np.random.default_rng(0)
    return [
        cv2.resize(random.integers(0, 256, (16, 16, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
        for _ in range(number)
    ]


def add_command(commands: Any) -> None:
    """Add `gpu` to the commands of `mpm bench`."""
    _add_arguments(commands.add_parser("gpu", help="merging, networks, labels and the engine on a GPU"))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="of the engine's model (the demo model)")
    parser.add_argument("--images", type=Path, help="a picture or a folder of pictures (soft noise, 512 x 512)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=PROCESSES,
        help="engines on one GPU, of the section engines (1 2 4 8)",
    )
    parser.add_argument("--loop", type=float, default=2, help="seconds of each loop of the engine (2)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    images = read_images(arguments.images)[:16] if arguments.images else soft_pictures(16, 512)
    engine = partial(time_engine, arguments.checkpoint.parent, images, arguments.device, arguments.loop)
    more: list[gpu.Section] = [("engine", "", engine)]
    on_gpu = arguments.device != "cpu"
    if on_gpu:
        more.append(("engine", "graphs", partial(engine, graph_mib=GRAPH_MIB)))
    for size in arguments.sizes or ("Ti",):
        for mps in (False, True) if on_gpu and engines.has_mps() else (False,):
            name = size + (", MPS" if mps else "")
            more.append(("engines", name, partial(_engines, arguments, images, size, mps, on_gpu)))
    return gpu.run_command(arguments, more)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m handlers.bench.gpu", description=__doc__.split("\n")[0])
    _add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
