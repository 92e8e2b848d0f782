"""How long windows become, and what computing them costs: measured with a real model, kept as JSON."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.bench import read_images
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import WindowBatch
from mpm_ops.windows import cut_windows, plan_windows

from .grouping import GroupCost

Lengths = list[tuple[int, ...]]  # of each window, its tokens in every stage, special ones included


def read_windows(model: Segmenter, folder: Path, most: int) -> list[Tensor]:
    """Windows of pictures spread evenly over a folder, each [3, H, W], at most `most` (0 for all)."""
    images = read_images(folder)
    plans = [plan_windows(image.shape[0], image.shape[1], model.inference) for image in images]
    total = sum(plan.num_windows for plan in plans)
    step = max(1.0, total / most) if most else 1.0
    chosen = [int(i * step) for i in range(int(len(images) / step))] or [0]
    windows = [window for i in chosen for window in cut_windows(images[i], plans[i], model.inference)]
    return windows[:most] if most else windows


@torch.inference_mode()
def measure_lengths(model: Segmenter, windows: Sequence[Tensor], aligns: Sequence[int]) -> dict[int, Lengths]:
    """Run windows up to their last merge, once for each align; what comes before the first merge is shared."""
    found: dict[int, Lengths] = {align: [] for align in aligns}
    for window in windows:
        embedded = model.run_blocks(model.stages[0], model.embed(window[None]))
        for align in aligns:
            batch = embedded
            lengths = [len(batch.tokens.values)]
            for stage in model.stages[:-1]:
                if stage.index:
                    batch = model.run_blocks(stage, batch)
                batch = batch.merged(num_special=model.encoder.num_special, align=align)
                lengths.append(len(batch.tokens.values))
            found[align].append(tuple(lengths))
    return found


@torch.inference_mode()
def measure_costs(model: Segmenter, tokens: int, repeats: int = 5) -> tuple[GroupCost, ...]:
    """What a group costs in every stage, its merge or decoding included.

    Args:
        tokens: of a window before its first merge, special ones included.
    """
    costs = []
    generator = torch.Generator().manual_seed(0)
    for stage in model.stages:
        samples = []
        for num_windows in (1, 4):
            for length in {tokens, tokens if stage.index == 0 else tokens // 2}:
                values = torch.randn(num_windows, length, model.config.d_model, generator=generator)
                maps = None if stage.index == 0 else (_spread(tokens, length, model.encoder.num_special),) * num_windows
                batch = WindowBatch(PackedTokens.from_batch(values), maps)
                pixels = torch.zeros(num_windows, 3, model.inference.window_size, model.inference.window_size)
                seconds = []
                for _ in range(repeats):
                    start = perf_counter()
                    entered = model.embed(pixels) if stage.index == 0 else batch
                    left = model.run_blocks(stage, entered)
                    model.merge(left) if stage.merges else model.decode(left)
                    seconds.append(perf_counter() - start)
                samples.append((num_windows, length, statistics.median(seconds)))
        costs.append(GroupCost.fit(samples))
    return tuple(costs)


def _spread(tokens: int, length: int, num_special: int) -> Tensor:
    """A merge map that shares `tokens` patches evenly among `length` tokens."""
    patches, kept = tokens - num_special, length - num_special
    return torch.from_numpy(np.arange(patches) * kept // patches)
