"""What windows wait for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """Windows that can share a group: the same schedule, at the same stage."""

    stage: int
    schedule: tuple[int, ...]
