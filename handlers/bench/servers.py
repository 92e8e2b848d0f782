"""What is served to a lone client and to several at once, merger by merger, on the same server under the same load."""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import product
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

from .load import ask, run_clients

MODEL = "bench"
SERVERS = ("torchserve", "triton")
MERGERS = ("none", "mpm:2,5", "mpm:1,2,4,6,keep=0.75,weighted,proportional")
_UNLIMITED = 2**24  # tokens: what is refused would not be timed, whatever pictures are sent


def bench_servers(
    checkpoint: Path,
    images: Path,
    mergers: Sequence[str],
    *,
    servers: Sequence[str],
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    serving: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Load servers of one model in turn, from another process, with the same encoded pictures.

    Args:
        images: a picture or a folder of pictures, sent as they are.
        mergers: that requests ask for; the first one is what the others are compared with.
        servers: of SERVERS.
        clients: how many ask at a time.
        seconds: of each round; every row gets `rounds` of them, taking turns.
        serving: further fields of `handlers.config.ServingConfig`.

    Raises:
        RuntimeError: a server gives another mask than the library, or refuses; no figures are reported.
    """
    files = sorted(path for path in images.iterdir() if path.is_file()) if images.is_dir() else [images]
    pictures = [file.read_bytes() for file in files]
    if not pictures:
        raise FileNotFoundError(f"{images}: no pictures, which may be {OFFERED}")
    serving = {"max_inflight_tokens": _UNLIMITED, **serving, "merger": mergers[0], "allowed_mergers": list(mergers)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        if "torchserve" in servers:
            build_archive(checkpoint, name=MODEL, out=folder / "store", serving=serving)
            torchserve = stack.enter_context(TorchServe(folder / "store", log=folder / "torchserve.log"))
            torchserve.wait_ready()
            urls["torchserve"] = f"{torchserve.url}/predictions/{MODEL}"
        if "triton" in servers:
            build_model(checkpoint, name=MODEL, out=folder / "repository", serving=serving)
            triton = stack.enter_context(Triton(folder / "repository", log=folder / "triton.log", exit_seconds=2))
            triton.wait_ready()
            urls["triton"] = f"{triton.url}/v2/models/{MODEL}"
            urls["triton grpc"] = f"grpc://{triton.grpc_url}/{MODEL}"
        for merger in mergers:
            _check_parity(checkpoint, merger, pictures, urls)
        process = multiprocessing.get_context("spawn")
        load = stack.enter_context(ProcessPoolExecutor(1, mp_context=process))
        rows = []
        for num_clients in clients:
            runs: dict[tuple[str, str], list[tuple[list[float], float]]] = {key: [] for key in product(urls, mergers)}
            for _ in range(rounds):
                pictures = pictures[len(pictures) // rounds :] + pictures[: len(pictures) // rounds]
                for (way, merger), found in runs.items():
                    asked = load.submit(run_clients, urls[way], pictures, num_clients, seconds, merger)
                    found.append(asked.result())
            rows += [_summary(way, merger, num_clients, found) for (way, merger), found in runs.items()]
    for row in rows:
        key = (row["way"], row["clients"], mergers[0])
        base = next(other for other in rows if (other["way"], other["clients"], other["merger"]) == key)
        row["rps_ratio"] = round(row["rps"] / base["rps"], 3)
        row["p50_ratio"] = round(base["ms_p50"] / row["ms_p50"], 3)
    return rows


def _check_parity(checkpoint: Path, merger: str, pictures: Sequence[bytes], urls: Mapping[str, str]) -> None:
    model = load_segmenter(checkpoint, merger=merger, runtime="auto")  # as it is served
    classes = load_classes(checkpoint.parent, model.config.n_cls)
    for picture in pictures[:4]:
        image = decode_image(picture, max_bytes=len(picture), max_pixels=10**9)
        mask = encode_mask_png(model.segment(image), classes)
        for way, url in urls.items():
            with connect(url) as client:
                if ask(client, picture, merger) != mask:
                    raise RuntimeError(f"parity: {way} does not give the library's mask; no figures are reported")


def _summary(way: str, merger: str, num_clients: int, runs: Sequence[tuple[list[float], float]]) -> dict[str, Any]:
    latencies = [latency for found, _ in runs for latency in found]
    return {
        "way": way,
        "merger": merger,
        "clients": num_clients,
        "requests": len(latencies),
        "rps": round(statistics.median(len(found) / elapsed for found, elapsed in runs), 2),
        **{f"ms_p{q}": percentile_ms(latencies, q) for q in (50, 99)},
    }


def add_command(commands: Any) -> None:
    """Add `servers` to the commands of `mpm bench`."""
    command = commands.add_parser("servers", help="what servers hold, with and without merging")
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    command.add_argument(
        "--mergers", nargs="+", default=list(MERGERS), help="the first is what others are compared with"
    )
    command.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    command.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8], help="at a time: alone, and saturating (1 8)"
    )
    command.add_argument("--seconds", type=float, default=10, help="of each round (10)")
    command.add_argument("--rounds", type=int, default=2, help="of each row, in turn (2)")
    command.add_argument("--threads", type=int, default=0, help="of the network's operators; 0 for the usable cores")
    command.add_argument("--streams", default="auto", help="groups computed side by side, see ServingConfig (auto)")
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    streams = int(arguments.streams) if arguments.streams.isdigit() else arguments.streams
    rows = bench_servers(
        arguments.checkpoint,
        arguments.images,
        arguments.mergers,
        servers=arguments.servers,
        clients=arguments.clients,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        serving={"torch_threads": arguments.threads, "streams": streams},
    )
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    shapes = model_shapes(load_segmenter(arguments.checkpoint))
    shapes["pictures"] = [image.shape for image in read_images(arguments.images)]
    write_report(arguments.out, {"servers": rows}, shapes=shapes)
    return 0
