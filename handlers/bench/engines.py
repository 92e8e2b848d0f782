"""How many engines a GPU needs: each is a process, whose threads share one interpreter lock.

Every process has an engine of its own and a client that always has pictures in flight. A network that costs nothing
tells what everything around the network takes.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm_ops import Segmenter, load_segmenter
from mpm_ops.bench.gpu_networks import PAPER, build
from mpm_ops.classes import Classes, default_colors, load_classes
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import Runtime
from mpm_ops.stages import Decoded, Stage, WindowBatch

NETWORKS = ("real", "free")
RAMP = 0.25  # of a loop's seconds, before counting
START_SECONDS = 180.0  # until all processes are warm
MEANS = (0.747, 0.79)  # shares of its tokens that a merge leaves, as on natural pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every process is given.

    Attributes:
        folder: of the demo checkpoint, the network for "Ti".
        size: "Ti", or one of the benchmark's networks, with random weights.
        device: torch's name.
        sources: encoded pictures by kind.
        windows: of a group.
        inflight: pictures of one process.
        graph_mib: see `ServingConfig`.
    """

    folder: Path
    size: str
    device: str
    sources: dict[str, list[bytes]]
    windows: int = 32
    inflight: int = 128
    graph_mib: int = 0


class FreeNetwork(Runtime):
    """A runtime that computes nothing: logits of the right shape, ready from the start."""

    name = "free"
    precision = "fp32"

    def __init__(self, model: Segmenter, most_windows: int) -> None:
        grid = -(-model.inference.window_size // model.config.patch_size)
        device = model.encoder.pos_embed.device
        generator = torch.Generator().manual_seed(0)
        self._special, self._patches = model.encoder.num_special, grid**2
        logits = torch.randn(grid // 4 or 1, grid // 4 or 1, model.config.n_cls, generator=generator)
        whole = torch.nn.functional.interpolate(logits.permute(2, 0, 1)[None], (grid, grid), mode="bilinear")
        self._logits = whole[0].flatten(1).T.repeat(most_windows, 1, 1).to(device)  # [B, N, K]
        self._values = torch.zeros(most_windows * (self._patches + self._special), 1, device=device)
        self._map = torch.zeros(self._patches, dtype=torch.int64, device=device)

    @classmethod
    def obstacle(cls, model: Segmenter) -> str | None:
        return None

    @classmethod
    def build(cls, model: Segmenter, precision: str, **options: Any) -> "FreeNetwork":
        return cls(model, 1)

    def run(self, stage: Stage, given: Tensor | WindowBatch) -> WindowBatch | Decoded:
        if isinstance(given, Tensor):
            given = self._batch([self._patches] * len(given), None)
        return given if stage.merges else Decoded.of(self._logits[: len(given.tokens.lengths)])

    def launch(
        self, stage: Stage, given: Tensor | WindowBatch, *, before_merge: Callable[[], None] = lambda: None
    ) -> Callable[[], WindowBatch] | Decoded:
        done = self.run(stage, given)
        if isinstance(done, Decoded):
            return done
        share = MEANS[0] if done.merge_maps is None else MEANS[1]
        lengths = [int(share * (length - self._special)) for length in done.tokens.lengths]
        return lambda: self._batch(lengths, (self._map,) * len(lengths))

    def _batch(self, lengths: Sequence[int], maps: tuple[Tensor, ...] | None) -> WindowBatch:
        with_special = tuple(self._special + length for length in lengths)
        return WindowBatch(PackedTokens(self._values[: sum(with_special)], with_special), maps)


def make_engine(load: Load, network: str, codec_threads: int) -> Any:
    """An engine on the real network, or on one that costs nothing."""
    from handlers.config import ServingConfig  # what this imports, a machine for kernels alone may lack
    from handlers.engine.engine import Engine

    device = torch.device(load.device)
    config = ServingConfig(
        device=load.device,
        max_group_windows=load.windows,
        max_batch_tokens=load.windows * 1025,
        max_inflight_tokens=16 * load.inflight * 1025,
        max_inflight_mib=8192,
        codec_threads=codec_threads,
        agreement_fraction=0,
        agreement_min_fraction=0,
        graph_mib=load.graph_mib,
    )
    if load.size == "Ti":
        model = load_segmenter(load.folder / "checkpoint.pth", (2, 5), device=device)
        classes = load_classes(load.folder, model.config.n_cls)
    else:
        model = build(PAPER, load.size, device)
        classes = Classes(tuple(f"class {i}" for i in range(model.config.n_cls)), default_colors(model.config.n_cls))
    if network == "real":
        return Engine(model, classes, config)
    return Engine(model, classes, config, runtime=FreeNetwork(model, load.windows))


def time_engines(
    load: Load, *, processes: Sequence[int], networks: Sequence[str], seconds: float, mps: bool = False,
    codec_threads: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Pictures a second of so many processes together, and the milliseconds that one picture takes among them.

    All processes are started once; those that are not asked wait.

    Args:
        load: what each process is given.
        processes: how many are asked at once.
        networks: of NETWORKS.
        seconds: of each loop.
        mps: run them under CUDA's Multi-Process Service, if it is installed.
        codec_threads: of each engine.

    Raises:
        RuntimeError: a process failed, or a picture was not answered.
    """
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        environment = stack.enter_context(multi_process_service()) if mps else {}
        workers = stack.enter_context(_workers(load, max(processes), networks, codec_threads, environment))
        for network in networks:
            for source in load.sources:
                for number in processes:
                    chosen = workers[:number]
                    start = time.monotonic() + 0.2  # the same clock in all processes
                    for worker in chosen:
                        worker.send((network, source, start, seconds))
                    found = [_receive(worker, START_SECONDS + 2 * seconds) for worker in chosen]
                    ms = 1000 * np.concatenate([one["seconds"] for one in found])
                    rates = [one["pictures"] / seconds for one in found]
                    rows.append(
                        {
                            "network": network, "source": source, "processes": number, "mps": mps,
                            "pictures_per_second": round(sum(rates), 1),
                            "p50_ms": round(float(np.percentile(ms, 50)), 2) if len(ms) else None,
                            "p99_ms": round(float(np.percentile(ms, 99)), 2) if len(ms) else None,
                            "of_each": [round(rate, 1) for rate in rates],
                        }
                    )  # fmt: skip
    return {
        "size": load.size, "cpus": os.cpu_count(), "inflight_of_each": load.inflight, "windows": load.windows,
        "codec_threads": codec_threads, "graph_mib": load.graph_mib, "engines": rows,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    mps = ", MPS" if row["mps"] else ""
    times = f"p50 {row['p50_ms']} ms  p99 {row['p99_ms']} ms"
    return (
        f"    {row['network']:<4} network, {row['source']:<5} {row['processes']} processes{mps:<5}"
        f" {row['pictures_per_second']:9.1f} pictures/s  {times}"
    )


def has_mps() -> bool:
    return shutil.which("nvidia-cuda-mps-control") is not None


@contextmanager
def multi_process_service() -> Iterator[dict[str, str]]:
    """CUDA's Multi-Process Service of our own, in a temporary folder; yields its clients' environment."""
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        ours = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in ours.values():
            Path(path).mkdir()
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | ours, check=True, timeout=30)
        try:
            yield ours
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"], env=os.environ | ours, input="quit -t 10\n", text=True, timeout=60
            )


@contextmanager
def _workers(
    load: Load, number: int, networks: Sequence[str], codec_threads: int, environment: dict[str, str]
) -> Iterator[list[Connection]]:
    """Processes that are warm, one connection each."""
    context = get_context("spawn")
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    pipes, processes = [], []
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, load, tuple(networks), codec_threads), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline = time.monotonic() + START_SECONDS
        for pipe in pipes:
            _receive(pipe, deadline - time.monotonic())
        yield pipes
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for pipe in pipes:
            pipe.close()  # which ends them
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
                process.join(20)


def _receive(worker: Connection, seconds: float) -> Any:
    if not worker.poll(max(0.0, seconds)):
        raise RuntimeError(f"engines: a process said nothing for {seconds:.0f} s")
    try:
        answer = worker.recv()
    except EOFError:
        raise RuntimeError("engines: a process ended; its error is above") from None
    if isinstance(answer, str):
        raise RuntimeError(f"engines: a process failed: {answer}")
    return answer


def _work(pipe: Connection, load: Load, networks: Sequence[str], codec_threads: int) -> None:
    """One process: its engines, then one loop for each message until the other end is closed."""
    from handlers.api.options import RequestOptions

    try:
        if load.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(load.device).index or 0)
        with ExitStack() as stack:
            engines = {
                network: stack.enter_context(closing(make_engine(load, network, codec_threads)))
                for network in networks
            }
            options = RequestOptions(request_id="bench")
            for engine in engines.values():
                for data in load.sources.values():
                    saturate(engine, data, options, load.inflight, time.monotonic(), 0.5)
            pipe.send({"ready": True})
            while True:
                network, source, start, seconds = pipe.recv()
                pipe.send(saturate(engines[network], load.sources[source], options, load.inflight, start, seconds))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def saturate(
    engine: Any, data: Sequence[bytes], options: Any, inflight: int, start: float, seconds: float
) -> dict[str, Any]:
    """Keep pictures in flight, from a moment on; those answered after a ramp and within so many seconds count."""
    flying: deque[tuple[Any, list[float]]] = deque()
    taken: list[float] = []
    time.sleep(max(0.0, start - time.monotonic()))
    begin = time.monotonic() + RAMP * seconds
    end, sent = begin + seconds, 0
    while (now := time.monotonic()) < end:
        while len(flying) < inflight:
            times = [time.monotonic()]
            answer = engine.submit(data[sent % len(data)], options)
            answer.add_done_callback(lambda _, times=times: times.append(time.monotonic()))
            flying.append((answer, times))
            sent += 1
        answer, times = flying.popleft()
        answer.result()
        now = time.monotonic()
        if begin <= now < end:
            taken.append(times[-1] - times[0])
    for answer, _ in flying:
        answer.result()
    return {"pictures": len(taken), "seconds": np.array(taken)}
