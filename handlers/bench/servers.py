"""TorchServe and Triton before the same engine: requests per second and latency under the same load."""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from handlers.api.containers import OFFERED
from handlers.api.decode import decode_image
from handlers.api.formats.png import encode_mask_png
from handlers.client import connect
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from model_store.torchserve import build_archive
from model_store.triton import build_model
from mpm_ops import load_segmenter
from mpm_ops.bench import model_shapes, percentile_ms, read_images, write_report
from mpm_ops.classes import load_classes
from mpm_ops.stages import parse_schedule

from .load import ask, run_clients

MODEL = "bench"
_UNLIMITED = 2**24  # tokens: what is refused would not be timed, whatever pictures are sent


def bench_servers(
    checkpoint: Path,
    images: Path,
    schedule: Sequence[int],
    *,
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    serving: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Load both servers in turn, from another process, with the same encoded pictures.

    Args:
        images: a picture or a folder of pictures, sent as they are.
        clients: how many ask at a time, one row each.
        seconds: of each round; every server gets `rounds` of them, taking turns.
        serving: further fields of `handlers.config.ServingConfig`.

    Raises:
        RuntimeError: a server gives another mask than the library, or refuses; no figures are reported.
    """
    files = sorted(path for path in images.iterdir() if path.is_file()) if images.is_dir() else [images]
    pictures = [file.read_bytes() for file in files]
    if not pictures:
        raise FileNotFoundError(f"{images}: no pictures, which may be {OFFERED}")
    serving = {"max_inflight_tokens": _UNLIMITED, **serving, "schedule": list(schedule)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        build_archive(checkpoint, name=MODEL, out=folder / "store", serving=serving)
        build_model(checkpoint, name=MODEL, out=folder / "repository", serving=serving)
        torchserve = stack.enter_context(TorchServe(folder / "store", log=folder / "torchserve.log"))
        triton = stack.enter_context(Triton(folder / "repository", log=folder / "triton.log", exit_seconds=2))
        urls = {
            "torchserve": f"{torchserve.url}/predictions/{MODEL}",
            "triton": f"{triton.url}/v2/models/{MODEL}",
            "triton grpc": f"grpc://{triton.grpc_url}/{MODEL}",
        }
        for server in (torchserve, triton):
            server.wait_ready()
        _check_parity(checkpoint, schedule, pictures, urls)
        process = multiprocessing.get_context("spawn")
        load = stack.enter_context(ProcessPoolExecutor(1, mp_context=process))
        rows = []
        for num_clients in clients:
            runs: dict[str, list[tuple[list[float], float]]] = {way: [] for way in urls}
            for _ in range(rounds):
                for way, url in urls.items():
                    asked = load.submit(run_clients, url, pictures, num_clients, seconds)
                    runs[way].append(asked.result())
            rows += [_summary(way, num_clients, found) for way, found in runs.items()]
    return rows


def _check_parity(
    checkpoint: Path, schedule: Sequence[int], pictures: Sequence[bytes], urls: Mapping[str, str]
) -> None:
    model = load_segmenter(checkpoint, schedule, runtime="auto")  # as it is served
    classes = load_classes(checkpoint.parent, model.config.n_cls)
    for picture in pictures[:4]:
        image = decode_image(picture, max_bytes=len(picture), max_pixels=10**9)
        mask = encode_mask_png(model.segment(image), classes)
        for way, url in urls.items():
            with connect(url) as client:
                if ask(client, picture) != mask:
                    raise RuntimeError(f"parity: {way} does not give the library's mask; no figures are reported")


def _summary(way: str, num_clients: int, runs: Sequence[tuple[list[float], float]]) -> dict[str, Any]:
    latencies = [latency for found, _ in runs for latency in found]
    return {
        "way": way,
        "clients": num_clients,
        "requests": len(latencies),
        "rps": round(statistics.median(len(found) / elapsed for found, elapsed in runs), 2),
        **{f"ms_p{q}": percentile_ms(latencies, q) for q in (50, 99)},
    }


def add_command(commands: Any) -> None:
    """Add `servers` to the commands of `mpm bench`."""
    command = commands.add_parser("servers", help="TorchServe and Triton under the same load")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument("--schedule", default="2,5")
    command.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    command.add_argument("--seconds", type=float, default=10, help="of each round (10)")
    command.add_argument("--rounds", type=int, default=2, help="of each server, in turn (2)")
    command.add_argument("--threads", type=int, default=0, help="of the network's operators; 0 leaves torch's default")
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    schedule = parse_schedule(arguments.schedule)
    rows = bench_servers(
        arguments.checkpoint,
        arguments.images,
        schedule,
        clients=arguments.clients,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        serving={"torch_threads": arguments.threads},
    )
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    shapes = model_shapes(load_segmenter(arguments.checkpoint, schedule))
    shapes["pictures"] = [image.shape for image in read_images(arguments.images)]
    write_report(arguments.out, {"servers": rows}, shapes=shapes)
    return 0
