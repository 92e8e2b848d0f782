"""What ran where, for whoever compares figures."""

import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = (
    "mpm-segmenter",
    "locust",
    "gevent",
    "grpcio",
    "torch",
    "openvino",
    "torchserve",
    "nvidia-pytriton",
)


def describe_machine() -> str:
    """Processor and usable cores, such as `AMD EPYC, 2 cores`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{model}, {cores} cores"


def installed_versions() -> dict[str, str]:
    """Of Python, and of what is installed here among what matters."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
