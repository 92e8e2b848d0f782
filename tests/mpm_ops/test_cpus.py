"""The quota of a container, as cgroups of both versions tell it."""

from pathlib import Path

import pytest

from mpm_ops import cpus
from mpm_ops.cpus import cpu_quota

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu,cpuacct"
INSIDE_V2 = "0::/\n"
INSIDE_V1 = "9:memory:/docker/abc\n5:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"


def quota(root: Path, own: str, files: dict[str, str]) -> float | None:
    """Of a machine with these cgroups: what /proc/self/cgroup says, and files by their paths."""
    for path, text in (files | {"proc/self/cgroup": own}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return cpu_quota(root)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (INSIDE_V2, {f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
        (INSIDE_V2, {f"{V2}/cpu.max": "max 100000\n"}, None),
        (INSIDE_V2, {}, None),
        ("0::/a.slice/b\n", {f"{V2}/a.slice/b/cpu.max": "400000 100000", f"{V2}/a.slice/cpu.max": "200000 50000"}, 4),
        ("0::/a.slice/b\n", {f"{V2}/a.slice/b/cpu.max": "max 100000", f"{V2}/a.slice/cpu.max": "300000 100000"}, 3),
        (INSIDE_V1, {f"{V1}/cpu.cfs_quota_us": "50000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 0.5),
        (INSIDE_V1, {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, None),
        (
            "5:cpu:/docker/abc\n",
            {
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "800000",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        (
            "5:cpuset:/a\n",
            {"sys/fs/cgroup/cpuset/a/cpu.cfs_quota_us": "1", "sys/fs/cgroup/cpuset/a/cpu.cfs_period_us": "1"},
            None,
        ),
        (INSIDE_V2, {f"{V2}/cpu.max": "nonsense"}, None),
    ],
)
def test_quota(tmp_path: Path, own: str, files: dict[str, str], expected: float | None) -> None:
    assert quota(tmp_path, own, files) == expected


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "quota", "expected"), [(64, None, 64), (64, 4.0, 4), (64, 1.9, 1), (64, 0.5, 1), (2, 4.0, 2)]
)
def test_usable_cores(found: int, quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(range(found)))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpus.usable_cores() == expected
