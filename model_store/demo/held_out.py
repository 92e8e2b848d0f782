"""Pictures that are never trained on, and a quick score on them while training runs."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpm_ops.evaluate import mean_iou
from mpm_ops.windows import InferenceConfig, cut_windows, plan_windows

from .losses import enlarge
from .pictures import IGNORE, read_pair

Pair = tuple[Path, Path]


def hold_out(pairs: Sequence[Pair], num_each: int) -> tuple[list[Pair], list[Pair]]:
    """Split off a stretch from the middle of each sequence, whose frames resemble their neighbours.

    Args:
        pairs: pictures and labels, sorted; a picture's name begins with its sequence and an underscore.
        num_each: pictures of each sequence to hold out, at most half of them.

    Returns:
        What is trained on, and what is held out.
    """
    sequences: dict[str, list[Pair]] = {}
    for pair in pairs:
        sequences.setdefault(pair[0].name.split("_")[0], []).append(pair)
    kept, held = [], []
    for sequence in sequences.values():
        num = min(num_each, len(sequence) // 2)
        first = (len(sequence) - num) // 2
        held += sequence[first : first + num]
        kept += sequence[:first] + sequence[first + num :]
    return kept, held


class HeldOut:
    """Windows of the held-out pictures on the device, and the truth."""

    def __init__(self, pairs: Sequence[Pair], inference: InferenceConfig, device: str) -> None:
        self.pictures = []
        for image, labels in map(read_pair, pairs):
            plan = plan_windows(labels.shape[0], labels.shape[1], inference)
            windows = cut_windows(image, plan, inference).to(device)
            self.pictures.append((plan, windows, torch.from_numpy(labels).long().to(device)))

    @torch.inference_mode()
    def score(self, network: nn.Module) -> float:
        """Mean IoU of a network that gives logits of any resolution, by official inference; NaN without pictures."""
        if not self.pictures:
            return float("nan")
        confusion = torch.zeros(IGNORE * (IGNORE + 1), device=self.pictures[0][2].device)
        for plan, windows, labels in self.pictures:
            with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
                logits = network(windows)
            size = plan.window_size
            frame = logits.new_zeros((1, IGNORE, *plan.frame_size), dtype=torch.float32)
            count = torch.zeros_like(frame[:, :1])
            origins = ((top, left) for top in plan.tops for left in plan.lefts)
            for window, (top, left) in zip(enlarge(logits.float(), (size, size)), origins, strict=True):
                frame[:, :, top : top + size, left : left + size] += window
                count[:, :, top : top + size, left : left + size] += 1
            merged: Tensor = F.interpolate(frame / count, plan.original_size, mode="bilinear", align_corners=False)
            pairs = labels * IGNORE + merged[0].argmax(0)
            confusion += torch.bincount(pairs.flatten(), minlength=len(confusion))
        counted = confusion.view(IGNORE + 1, IGNORE)[:IGNORE].double().cpu()
        return float(mean_iou(torch.stack([counted.diagonal(), counted.sum(1), counted.sum(0)]).numpy()))
