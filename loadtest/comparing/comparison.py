"""What two deployments made of the same pictures: how far their masks agree, class by class, and what failed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .deployments import Answer, CompareError, Deployment
from .worst import Worst


@dataclass(frozen=True, slots=True)
class Compared:
    """One picture on both deployments.

    Attributes:
        agreement: share of its pixels with the same class; None unless both gave masks of one size.
        old_error, new_error: why one gave no mask, or not one of the other's size.
        old_ms, new_ms: of every repeat that was answered.
    """

    name: str
    agreement: float | None
    pixels: int
    old_error: str
    new_error: str
    old_ms: tuple[float, ...]
    new_ms: tuple[float, ...]


@dataclass(slots=True)
class Comparison:
    """Everything seen so far; `pairs` counts pixels by class of the old and of the new mask."""

    pictures: list[Compared] = field(default_factory=list)
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    def summary(self) -> dict[str, float]:
        """The figures that limits can be set on, and counts.

        Raises:
            CompareError: no picture has a mask from both.
        """
        compared = [picture for picture in self.pictures if picture.agreement is not None]
        if not compared:
            raise CompareError(f"no picture could be compared; {self._first_failure()}")
        pixels = sum(self.pairs.values())
        old, new = ([ms for picture in compared for ms in getattr(picture, f"{role}_ms")] for role in ("old", "new"))
        ms = {
            f"{role}_p{q}_ms": float(np.percentile(each, q))
            for role, each in (("old", old), ("new", new))
            for q in (50, 99)
        }
        return {
            "agreement": sum(count for (before, after), count in self.pairs.items() if before == after) / pixels,
            "worst_agreement": min(picture.agreement or 0.0 for picture in compared),
            "p50_ratio": ms["new_p50_ms"] / ms["old_p50_ms"],
            "p99_ratio": ms["new_p99_ms"] / ms["old_p99_ms"],
            "errors": sum(bool(picture.new_error and not picture.old_error) for picture in self.pictures),
            "errors_of_old": sum(bool(picture.old_error and not picture.new_error) for picture in self.pictures),
            "errors_of_both": sum(bool(picture.old_error and picture.new_error) for picture in self.pictures),
            "compared": len(compared),
            "answers": len(new),
            **ms,
        }

    def classes(self) -> list[dict[str, Any]]:
        """Per class, most pixels first: its pixels before and after, their overlap, and where most that left went."""
        before, after, left = Counter[int](), Counter[int](), dict[int, Counter[int]]()
        for (old, new), count in self.pairs.items():
            before[old] += count
            after[new] += count
            if old != new:
                left.setdefault(old, Counter())[new] += count
        found = []
        for index in sorted(before.keys() | after.keys(), key=lambda index: -before[index]):
            shared = self.pairs[index, index]
            went = left[index].most_common(1)[0] if index in left else None
            found.append(
                {
                    "class": index,
                    "old_pixels": before[index],
                    "new_pixels": after[index],
                    "overlap": shared / (before[index] + after[index] - shared),
                    "went_to": went[0] if went else None,
                    "went_share": went[1] / before[index] if went else 0.0,
                }
            )
        return found

    def _first_failure(self) -> str:
        first = self.pictures[0]
        return f"{first.name}: old {first.old_error or 'answered'}; new {first.new_error or 'answered'}"


def compare_picture(
    name: str, old: Sequence[Answer], new: Sequence[Answer], pairs: Counter[tuple[int, int]]
) -> Compared:
    """Compare the last answers of both, and add their pixels to `pairs`; any failed repeat fails the picture."""
    old_error, new_error = (next((answer.error for answer in answers if answer.error), "") for answers in (old, new))
    before, after = old[-1].labels, new[-1].labels
    agreement, pixels = None, 0
    if not old_error and not new_error and before is not None and after is not None:
        if before.shape != after.shape:
            sizes = (f"{mask.shape[1]}x{mask.shape[0]}" for mask in (before, after))
            new_error = "a mask of another size: old {}, new {}".format(*sizes)
        else:
            agreement, pixels = float((before == after).mean()), before.size
            both = before.astype(np.int64).ravel() << 16 | after.ravel()
            for pair, count in zip(*np.unique(both, return_counts=True), strict=True):
                pairs[int(pair) >> 16, int(pair) & 0xFFFF] += int(count)
    times = [tuple(round(1000 * answer.seconds, 3) for answer in each if not answer.error) for each in (old, new)]
    return Compared(name, agreement, pixels, old_error, new_error, times[0], times[1])


def compare(
    old: Deployment, new: Deployment, files: Sequence[Path], repeats: int, worst: Worst | None = None
) -> Comparison:
    """Ask both for every picture, taking turns at who is first, because the second finds warmer caches."""
    found = Comparison()
    for deployment in (old, new):
        deployment.ask(files[0].read_bytes())  # opens the connection
    for i, file in enumerate(files):
        picture = file.read_bytes()
        answers: dict[Deployment, list[Answer]] = {old: [], new: []}
        for repeat in range(repeats):
            for deployment in (old, new) if (i + repeat) % 2 == 0 else (new, old):
                answers[deployment].append(deployment.ask(picture))
        compared = compare_picture(file.name, answers[old], answers[new], found.pairs)
        found.pictures.append(compared)
        if worst and compared.agreement is not None and compared.agreement < 1:
            worst.offer(compared.agreement, file, answers[old][-1], answers[new][-1])
    return found
