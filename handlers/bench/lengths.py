"""How long windows become, and what computing them costs: measured with a real model, kept as JSON."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from handlers.engine.grouping import GroupCost
from mpm_ops import Segmenter
from mpm_ops.bench import read_images
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch
from mpm_ops.windows import cut_windows, plan_windows

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
    """What a group costs in every stage, its merge or decoding included; the least of some runs, as others share
    the machine.

    Args:
        tokens: of a window before its first merge, special ones included.
    """
    return tuple(_measure_cost(model, stage, tokens, repeats) for stage in model.stages)


def _measure_cost(model: Segmenter, stage: Stage, tokens: int, repeats: int) -> GroupCost:
    shapes = [(1, tokens), (4, tokens)]
    if stage.index:
        shapes += [(1, tokens // 2), (4, tokens // 2)]
    inference, special = model.inference, model.encoder.num_special
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for _ in range(repeats):
        for num_windows, length in shapes:  # in turn, so that a busy moment meets all alike
            pixels = torch.zeros(num_windows, 3, inference.window_size, inference.window_size)
            values = torch.randn(num_windows, length, model.config.d_model)
            maps = (_spread(tokens, length, special),) * num_windows if stage.index else None
            entered = WindowBatch(PackedTokens.from_batch(values), maps)
            start = perf_counter()
            left = model.run_blocks(stage, entered if stage.index else model.embed(pixels))
            model.merge(left) if stage.merges else model.decode(left)
            seconds[num_windows, length].append(perf_counter() - start)
    return GroupCost.fit([(*shape, min(times)) for shape, times in seconds.items()])


def _spread(tokens: int, length: int, num_special: int) -> Tensor:
    """A merge map that shares `tokens` patches evenly among `length` tokens."""
    patches, kept = tokens - num_special, length - num_special
    return torch.from_numpy(np.arange(patches) * kept // patches)
