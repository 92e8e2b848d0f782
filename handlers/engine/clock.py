"""Times on the device that computes: on a GPU, when work ran there, not when it was launched."""

from time import monotonic
from typing import Any

import torch


class DeviceClock:
    """Takes marks in the order of the device's work.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now, in the device's stream of work; costs no synchronisation."""
        if not self._on_cuda:
            return monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # which need not be the process's current device
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks; waits until the device has passed the second."""
        if not self._on_cuda:
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000
