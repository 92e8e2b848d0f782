"""What a padded group costs on this device, measured when serving starts."""

from statistics import median

import torch

from mpm_ops import Segmenter
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch

from .clock import DeviceClock
from .grouping import GroupCost

_ROUNDS = 5


@torch.inference_mode()
def measure_cost(model: Segmenter, *, longest: int, max_group_windows: int) -> GroupCost:
    """Time one encoder block on groups of several shapes; the ratio between shapes is what matters to the planner.

    Shapes take turns, and each counts with its median: a busy moment meets one run of several shapes, not several
    runs of one.

    Args:
        model: on the device that will serve.
        longest: tokens of a window before merging.
        max_group_windows: windows computed together.
    """
    device = model.encoder.pos_embed.device
    clock = DeviceClock(device)
    block = Stage(index=1, parts=range(2))
    shapes = [
        (count, length) for count in (1, max(2, max_group_windows)) for length in (max(1, longest // 2), longest)
    ]
    taken: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for _ in range(1 + _ROUNDS):
        for shape in shapes:
            tokens = PackedTokens.from_batch(torch.zeros(*shape, model.config.d_model, device=device))
            start = clock.mark()
            model.run_blocks(block, WindowBatch(tokens))
            taken[shape].append(clock.seconds(start, clock.mark()))
    return GroupCost.fit([(*shape, median(seconds[1:])) for shape, seconds in taken.items()])
