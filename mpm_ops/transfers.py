"""To the device and back beside its computing: every thread that copies has a stream of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def use_own_stream(device: torch.device) -> None:
    """Let what this thread does on a GPU from now on run beside what others do there; nothing elsewhere.

    What another thread computed must be complete before this one reads it.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, complete when this returns; only this thread waits.

    Through pinned memory, because the driver copies from other memory in pieces and holds up everybody.
    """
    if device.type != "cuda":
        return x.to(device)
    there = x.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return there


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Join what other threads uploaded; their memory is not used again before this thread's stream has read it."""
    for part in parts:
        if part.is_cuda:
            part.record_stream(torch.cuda.current_stream(part.device))
    return torch.stack(list(parts))


def fetch(x: Tensor) -> Callable[[], Tensor]:
    """Start copying a few numbers to the host; the call that is returned waits for them, and nothing here does.

    It waits for nothing that is launched later, so the device may have other work when they are read.
    """
    if not x.is_cuda:
        return lambda: x
    here = x.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return here

    return wait
