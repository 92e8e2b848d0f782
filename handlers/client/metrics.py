"""A server's metrics: a page in Prometheus' text format, read and added up."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from .transport import fetch

Key = tuple[str, tuple[tuple[str, str], ...]]
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{((?:[^\"}]|\"(?:[^\"\\]|\\.)*\")*)\})? +([^ ]+)(?: .*)?")
_LABEL = re.compile(r"(\w+)=\"((?:[^\"\\]|\\.)*)\"")


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of a metrics page in Prometheus' text format, by name and sorted labels."""

    values: Mapping[Key, float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a page; buckets of histograms are left out.

        Raises:
            ValueError: a line is no sample.
        """
        values: dict[Key, float] = {}
        for line in text.splitlines():
            if not line or line.startswith("#") or "_bucket{" in line:
                continue
            sample = _SAMPLE.fullmatch(line)
            if not sample:
                raise ValueError(f"metrics: expected a sample in Prometheus' text format, got {line[:80]!r}")
            values[sample[1], tuple(sorted(_LABEL.findall(sample[2] or "")))] = float(sample[3])
        return cls(values)

    @classmethod
    def sum(cls, pages: Iterable["Metrics"]) -> Self:
        """Add the pages of several servers up."""
        values: dict[Key, float] = {}
        for page in pages:
            for key, value in page.values.items():
                values[key] = values.get(key, 0.0) + value
        return cls(values)

    def total(self, name: str, **labels: str) -> float:
        """Sum of all series of a name that have these labels; 0 if there is none."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.values.items() if found == name and wanted <= set(has))

    def labels(self, name: str, label: str) -> list[str]:
        """Values of a label, sorted."""
        return sorted({dict(has)[label] for found, has in self.values if found == name and label in dict(has)})


def read_metrics(url: str, timeout_seconds: float = 5.0) -> Metrics:
    """Read a metrics page once, over a connection of its own and without proxies.

    Raises:
        OSError: no answer, or another status than 200.
        ValueError: the URL is not one of HTTP, or its page not in Prometheus' text format.
    """
    answer = fetch(url, timeout_seconds=timeout_seconds)
    if answer.status != 200:
        raise OSError(f"{url}: status {answer.status}")
    return Metrics.parse(answer.body.decode())
