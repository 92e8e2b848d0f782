"""How many cores this process may use, whatever OMP_NUM_THREADS says."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """Cores that this process may run on, and no more than its container's quota, beyond which threads would be
    stopped in turn until its next period."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return found if quota is None else max(1, min(found, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that this process may use at most, as `docker run --cpus` and limits of pods set it.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        The smallest quota of its cgroup and those above, of version 2 or 1; None where there is none.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = [quota for line in lines for folder in _folders(root, line) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(root: Path, line: str) -> Iterator[Path]:
    """A cgroup's folder and those above it; its path may be the machine's where the container's mount begins below."""
    _, controllers, path = line.split(":", 2)
    mounted = root / "sys/fs/cgroup"
    if controllers:
        if "cpu" not in controllers.split(","):
            return
        mounted = next((mounted / name for name in (controllers, "cpu") if (mounted / name).is_dir()), mounted)
    own = PurePosixPath(path.lstrip("/"))
    yield from (mounted / part for part in (own, *own.parents))


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
        return None
