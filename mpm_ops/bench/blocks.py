"""Where the time of a batch goes: every block, merging, decoding and copying back, with and without merging.

Batches are random windows, so that their lengths differ as in traffic; figures are means over batches, with their
standard errors, each batch computed by all mergers in turn. The blocks run one by one on torch: the servers' runtimes
are faster, and can't be taken apart.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm_ops import load_segmenter, reconstruct
from mpm_ops.merging import make_merger
from mpm_ops.runtime.eager import DTYPES, TorchRuntime
from mpm_ops.segmenter import Segmenter

from . import model_shapes, write_report
from .injected import Injected
from .model import DEMO, SIZES, build, imposed_lengths, read_windows
from .timing import Laps, Timer

Profile = tuple[dict[str, float], dict[str, float]]  # milliseconds, and tokens
LEAST_AGREEMENT = 0.95  # of patches with those of float32, in half precision


@torch.inference_mode()
def profile(
    model: Segmenter, runtime: TorchRuntime, windows: Tensor, injected: Injected | None
) -> tuple[Tensor, Profile]:
    """Logits [B, N, K] of a batch, milliseconds of every step, and the mean tokens of each block, special ones too."""
    laps, tokens = Laps(Timer(windows.device)), dict[str, float]()
    batch = runtime.embed(windows)
    laps.lap("embed")
    for stage in model.stages:
        for part in stage.parts:
            block = f"block {part // 2}"
            merger = stage.merger if part == stage.parts[-1] else None
            batch = runtime.run_blocks(replace(stage, parts=range(part, part + 1), merger=merger), batch)
            tokens.setdefault(block, float(np.mean(batch.tokens.lengths)))
            laps.lap(block)
        if stage.merger is None:
            break
        before, batch = batch, stage.merger.launch(batch)()
        laps.lap("merge")
        if injected:
            batch = injected.apply(batch, before, stage.index, getattr(stage.merger, "align", 1))
            laps.lap("imposing lengths")
    logits = runtime.decode(batch, counts=stage.decoder_counts)
    laps.lap("decode")
    if batch.merge_maps:  # once more, to see it alone
        for row, merge_map in zip(logits, batch.merge_maps, strict=True):
            reconstruct(row, merge_map)
        laps.lap("of it copying back")
    found = laps.milliseconds()
    found["total"] -= found.pop("imposing lengths", 0.0) + found.get("of it copying back", 0.0)
    return logits, (found, tokens)


def measure(
    model: Segmenter,
    windows: Sequence[Tensor],
    mergers: Sequence[str],
    *,
    precision: str,
    batch: int,
    batches: int,
    imposed: bool,
) -> list[dict[str, Any]]:
    """Of each merger: milliseconds and tokens of every step, and images a second, as [mean, standard error].

    Args:
        windows: [1, 3, S, S] each, of which batches are drawn; the first batch warms up.
        imposed: lengths of MPM are those of `imposed_lengths`.
    """
    runtime = TorchRuntime(model, precision, attention="auto" if model.encoder.pos_embed.is_cuda else None)
    chosen = [make_merger(text, model.tower) for text in mergers]
    injected = [imposed_lengths(merger) if imposed else None for merger in chosen]
    rounds: list[list[Profile]] = [[] for _ in chosen]
    draw = random.Random(0)
    for number in range(batches + 1):
        drawn = torch.cat(draw.sample(windows, batch)).to(model.encoder.pos_embed.device)
        for merger, lengths, known in zip(chosen, injected, rounds, strict=True):
            model.merger = merger
            logits, found = profile(model, runtime, drawn, lengths)
            if number:
                known.append(found)
            elif not lengths:
                _check_parity(model, drawn[:1], logits[:1])
    results = []
    for merger, known in zip(chosen, rounds, strict=True):
        steps = {step: _mean([laps[step] for laps, _ in known]) for step in known[0][0]}
        tokens = {block: round(float(np.mean([of[block] for _, of in known])), 1) for block in known[0][1]}
        images = _mean([1000 * batch / laps["total"] for laps, _ in known])
        results.append({"merger": str(merger), "images_per_second": images, "ms": steps, "tokens": tokens})
    return results


def _check_parity(model: Segmenter, window: Tensor, logits: Tensor) -> None:
    expected = model.window_logits(window).flatten(2).mT
    agree = float((expected.argmax(2) == logits.argmax(2)).float().mean())
    if agree < LEAST_AGREEMENT:
        raise RuntimeError(f"parity: {model.merger} labels {1 - agree:.2%} otherwise block by block; no figures")


def _mean(values: Sequence[float]) -> list[float]:
    """Mean, and its standard error; 0 of one value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [float(f"{np.mean(values):.4g}"), float(f"{error:.2g}")]


def add_command(commands: Any) -> None:
    """Add `blocks` to the commands of `mpm bench`."""
    command = commands.add_parser("blocks", help="where a batch's time goes: blocks, merging, decoding, copying back")
    command.add_argument("--checkpoint", type=Path, default=DEMO)
    command.add_argument("--images", type=Path, required=True, help="a folder of different pictures")
    command.add_argument("--size", choices=SIZES, default="Ti", help="other than the checkpoint's: random weights")
    command.add_argument("--mergers", nargs="+", default=["none", "mpm:2,5"], help="as in load_segmenter(merger=...)")
    command.add_argument("--precision", choices=DTYPES, default="fp32")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--batch", type=int, default=32, help="random windows computed together")
    command.add_argument("--batches", type=int, default=4)
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    demo = load_segmenter(arguments.checkpoint)
    windows = read_windows(arguments.images, demo, 4 * arguments.batch + 64)
    if arguments.batch > len(windows) or arguments.batch < 1 or arguments.batches < 1:
        raise ValueError(
            f"batch: expected 1 to {len(windows)}, the windows of {arguments.images}, and a batch or more"
        )
    model = build(arguments.size, demo)
    how = {name: getattr(arguments, name) for name in ("precision", "batch", "batches")}
    results = measure(model.to(arguments.device), windows, arguments.mergers, imposed=model is not demo, **how)
    for result in results:
        print("{}: {} images a second, standard error {}".format(result["merger"], *result["images_per_second"]))
        for step, (mean, error) in result["ms"].items():
            print(f"  {step:20} {mean:10.3f} ms, standard error {error:8.3f}   {result['tokens'].get(step, '')}")
    write_report(arguments.out, how | {"size": arguments.size, "results": results}, shapes=model_shapes(model))
    return 0
