"""What windows wait for."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """Windows that can share a group: those of one merger, at the same stage.

    Attributes:
        stage: that they wait for.
        merger: as metrics name it: the schedule of plain MPM such as "2,5", "off", or a merger's text.
        num_stages: into which the merger cuts the network.
    """

    stage: int
    merger: str
    num_stages: int

    @property
    def merges(self) -> bool:
        """The stage ends with a merge: it is not the last."""
        return self.stage + 1 < self.num_stages

    @property
    def next(self) -> "Lane":
        return replace(self, stage=self.stage + 1)
