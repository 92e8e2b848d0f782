"""Memory of a server on this machine: of its front end and its workers, which its metrics do not tell of.

Resident memory, which the kernel counts as it goes. Pages that processes share count once for each; proportional
sizes would not, but to add them up holds a process's memory lock for milliseconds, and that is latency.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Of a process and all it started, at one time.

    Attributes:
        at: seconds since the epoch.
        mib: by the names of the processes.
    """

    at: float
    mib: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.mib.values())


def read_memory(pid: int) -> MemorySample:
    """What a process and its descendants have in memory.

    Raises:
        ProcessLookupError: there is no such process.
    """
    at, page = time.time(), os.sysconf("SC_PAGE_SIZE")
    mib: dict[str, float] = defaultdict(float)
    for process, name in _tree(pid):
        try:
            resident = int((_PROC / str(process) / "statm").read_text().split()[1])
        except OSError:  # ended since
            continue
        mib[name] += resident * page / _MIB
    return MemorySample(at, dict(mib))


def find_server(port: int) -> int | None:
    """The process that listens on a port here, as far as this user may see; None if there is none."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in _processes() if sockets else ():
        try:
            if any(os.readlink(link) in sockets for link in (_PROC / str(process) / "fd").iterdir()):
                return process
        except OSError:  # another user's, or ended since
            continue
    return None


def check_pid(pid: int) -> None:
    if not (_PROC / str(pid)).is_dir():
        raise ValueError(f"server-pid: expected a process of this machine, got {pid}")


def _tree(root: int) -> Iterator[tuple[int, str]]:
    """The process and its descendants, with their names."""
    names, children = {}, dict[int, list[int]]()
    for process in _processes():
        try:
            stat = (_PROC / str(process) / "stat").read_text(errors="replace")
        except OSError:
            continue
        before, _, after = stat.rpartition(")")  # a name may hold brackets itself
        names[process] = before.partition("(")[2]
        children.setdefault(int(after.split()[1]), []).append(process)
    if root not in names:
        raise ProcessLookupError(f"process {root} is not there")
    found = [root]
    for process in found:
        found += children.get(process, [])
        yield process, names[process]


def _processes() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()]


def _listening(port: int) -> Iterator[str]:
    """Inodes of sockets that listen there, by the kernel's tables."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in map(str.split, lines):
            if row[3] == _LISTEN and int(row[1].rpartition(":")[2], 16) == port:
                yield row[9]
