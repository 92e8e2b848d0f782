"""What merging costs and earns on this machine, as JSON.

    python -m mpm_ops.bench model --checkpoint checkpoint.pth --images DIR_OR_FILE [--out result.json]
    python -m mpm_ops.bench labels --checkpoint checkpoint.pth --images DIR_OR_FILE [--out result.json]
    python -m mpm_ops.bench merge [--out result.json]

Everything that is compared runs in turn, so that a change of the machine's speed meets all alike:
quote the ratios, not the milliseconds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import bench_gpu, bench_labels, bench_merge
from .checkpoint import load_segmenter
from .labels import label_map
from .segmenter import Segmenter
from .stages import parse_schedule
from .windows import cut_windows, plan_windows

Seconds = dict[str, float]


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: device, versions, threads, commit."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def check_parity(model: Segmenter, images: Sequence[np.ndarray]) -> None:
    """A picture's windows must give the same logits alone and in a batch with others.

    Raises:
        RuntimeError: they do not; figures would compare different work.
    """
    windows = torch.cat([cut_windows(image, _plan(model, image), model.inference) for image in images[:2]])
    together = model.window_logits(windows)
    alone = torch.cat([model.window_logits(window[None]) for window in windows])
    if not torch.allclose(together, alone, atol=1e-4):
        worst = float((together - alone).abs().max())
        raise RuntimeError(f"parity: logits of a window change by {worst:.2e} with its batch; no figures are reported")


@torch.inference_mode()
def time_picture(model: Segmenter, image: np.ndarray) -> tuple[Seconds, tuple[int, ...]]:
    """Seconds of each step for one picture, and its tokens at the start and after each merge."""
    plan = _plan(model, image)
    start = perf_counter()
    windows = cut_windows(image, plan, model.inference)
    cut = perf_counter()
    merging = 0.0
    batch = model.embed(windows)
    special = model.encoder.num_special * plan.num_windows
    tokens = [len(batch.tokens.values) - special]
    for stage in model.stages:
        batch = model.run_blocks(stage, batch)
        if stage.merges:
            before_merge = perf_counter()
            batch = model.merge(batch)
            merging += perf_counter() - before_merge
            tokens.append(len(batch.tokens.values) - special)
    logits = model.decode(batch)
    computed = perf_counter()
    grid = -(-plan.window_size // model.config.patch_size)
    label_map(logits.transpose(1, 2).unflatten(2, (grid, grid)), plan, model.config.patch_size)
    labeled = perf_counter()
    seconds = {
        "windows": cut - start,
        "network": computed - cut - merging,
        "merge": merging,
        "labels": labeled - computed,
        "total": labeled - start,
    }
    return seconds, tuple(tokens)


def bench_model(
    checkpoint: Path, images: Sequence[np.ndarray], schedules: Sequence[str], aligns: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Time every schedule and align on every picture, in turn; medians over pictures and repeats.

    The first variant is the one that ratios refer to.
    """
    variants = [(schedule, align) for schedule in schedules for align in (aligns if schedule != "off" else [1])]
    models = [load_segmenter(checkpoint, parse_schedule(schedule), align) for schedule, align in variants]
    for model in models:
        check_parity(model, images)
    samples: list[list[Seconds]] = [[] for _ in models]
    tokens: list[list[tuple[int, ...]]] = [[] for _ in models]
    for _ in range(repeats):
        for image in images:
            for i, model in enumerate(models):
                seconds, counts = time_picture(model, image)
                samples[i].append(seconds)
                tokens[i].append(counts)
    base = [sample["total"] for sample in samples[0]]
    return [
        {
            "schedule": schedule,
            "align": align,
            "median_ms": {step: _median_ms([s[step] for s in samples[i]]) for step in samples[i][0]},
            "speedup": round(statistics.median(b / s["total"] for b, s in zip(base, samples[i], strict=True)), 3),
            "merge_share": round(sum(s["merge"] for s in samples[i]) / sum(s["total"] for s in samples[i]), 4),
            "mean_tokens": np.mean(tokens[i], axis=0).round(1).tolist(),
        }
        for i, (schedule, align) in enumerate(variants)
    ]


def read_images(path: Path) -> list[np.ndarray]:
    """The picture, or all pictures of a folder, as uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file, or the folder is empty.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: no pictures")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mpm_ops.bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    bench_labels.add_command(commands)
    bench_merge.add_command(commands)
    bench_gpu.add_command(commands)
    model = commands.add_parser("model", help="one picture at a time through the library")
    model.add_argument("--checkpoint", type=Path, required=True)
    model.add_argument("--images", type=Path, required=True, help="a picture or a folder of pictures")
    model.add_argument("--schedules", nargs="+", default=["off", "2,5"], help="the first is what ratios refer to")
    model.add_argument("--aligns", nargs="+", type=int, default=[1, 16])
    model.add_argument("--repeats", type=int, default=5)
    model.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if hasattr(arguments, "run"):
        return int(arguments.run(arguments))
    try:
        images = read_images(arguments.images)
        results = bench_model(arguments.checkpoint, images, arguments.schedules, arguments.aligns, arguments.repeats)
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    for result in results:
        steps = "  ".join(f"{step} {ms:.1f}" for step, ms in result["median_ms"].items())
        print(
            f"{result['schedule']:>6} align {result['align']:<3} {result['speedup']:.2f}x   ms: {steps}   "
            f"merging {100 * result['merge_share']:.1f} %   tokens {result['mean_tokens']}"
        )
    report = {"environment": environment(), "pictures": len(images), "repeats": arguments.repeats, "results": results}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _plan(model: Segmenter, image: np.ndarray) -> Any:
    return plan_windows(image.shape[0], image.shape[1], model.inference)


def _median_ms(seconds: Sequence[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
