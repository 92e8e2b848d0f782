"""Configuration of a served model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

CONFIG_KEY = "mpm"  # our section in the configuration files of servers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How a model is served.

    Attributes:
        schedule: encoder blocks before which tokens merge; empty for no merging.
        align: token counts after a merge are multiples of this; 1 merges all pairs.
        inference: fields of `mpm_ops.InferenceConfig` that override the checkpoint's.
        max_image_bytes: larger request bodies are refused.
        max_image_pixels: larger pictures are refused before they are decoded.
        max_batch_windows: windows computed together.
        codec_threads: threads that decode pictures, and as many that encode replies.
        torch_threads: threads of the network's operators; 0 leaves torch's default.
    """

    schedule: tuple[int, ...] = (2, 5)
    align: int = 1
    inference: Mapping[str, Any] = field(default_factory=dict)
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 64_000_000
    max_batch_windows: int = 8
    codec_threads: int = 2
    torch_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("align", "max_image_bytes", "max_image_pixels", "max_batch_windows", "codec_threads"):
            _check_integer(name, getattr(self, name), minimum=1)
        _check_integer("torch_threads", self.torch_threads, minimum=0)
        if not isinstance(self.schedule, tuple):
            raise ValueError(f"schedule: expected block numbers, got {self.schedule!r}")
        for block in self.schedule:
            _check_integer("schedule", block, minimum=0)
        if not isinstance(self.inference, Mapping):
            raise ValueError(f"inference: expected a mapping, got {self.inference!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "ServingConfig":
        """Build from plain data, as YAML gives it.

        Raises:
            ValueError: a key is unknown, or a value is not what its field expects.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        values = dict(values)
        if isinstance(values.get("schedule"), list):
            values["schedule"] = tuple(values["schedule"])
        return cls(**values)


def _check_integer(name: str, value: Any, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
