"""Configuration of a served model; imports nothing of the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# Those of `mpm_ops.runtime`, whose import takes seconds and 200 MB: launchers and checks read configurations too.
RUNTIMES = ("torch", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16")

CONFIG_KEY = "mpm"  # our section in the configuration files of servers

_GONE = {
    "padded": "windows are grouped by length, and padded only where the runtime needs it",
    "jpeg_draft": "pictures are always decoded at their whole size",
}
_GRAPH_BYTES = 4 * 2**30  # on a GPU, unless told otherwise
_MERGER = re.compile(r"\w+(:[^:]+)?")
_MAX_PORT = 65_535
_MAX_INT = 2**31 - 1  # of Java, and so of a length in TorchServe


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How a model is served.

    Attributes:
        schedule: encoder blocks before which tokens merge; empty for no merging.
        align: token counts after a merge are multiples of this; 1 merges all pairs.
        merger: another way to merge, such as "tome:r=46", in place of `schedule` and `align`; its name and parameters
            are those of `mpm_ops.merging.make_merger`. Empty for none.
        runtime: what the network runs on, "auto" or one of `mpm_ops.runtime.RUNTIMES`.
        precision: "auto", or one of `mpm_ops.runtime.PRECISIONS`.
        device: "auto" for a GPU where there is one, or torch's name of a device, such as cpu or cuda:1.
        graph_mib: memory for captured graphs on a GPU, see `mpm_ops.runtime.graphs`; 0 captures none, and "auto" takes
            4096 on a GPU, unless `deterministic` leaves bits no choice.
        inference: fields of `mpm_ops.InferenceConfig` that override the checkpoint's.
        max_image_bytes: larger pictures are refused; the server in front may have a limit of its own.
        max_image_pixels: larger pictures are refused before they are decoded.
        allowed_schedules: schedules that a request may ask for, beside `schedule`.
        allowed_mergers: mergers that a request may ask for, beside those.
        deterministic: compute every window alone, so that no mate can move the last bits of its answer.
        max_batch_tokens: tokens computed together.
        max_group_windows: windows computed together.
        max_group_delay_ms: how long a window waits for mates while the device has other work.
        bulk_patience_seconds: by how much a bulk request counts as younger than it is.
        max_inflight_tokens: requests that would exceed it, before merging, are refused; it is less on a device that
            would not get through so many before the deadline.
        max_inflight_mib: memory for pictures, that is bodies, pixels and what decoding and drawing them takes;
            requests that would exceed it are refused. Together with TorchServe's own it fits into 4 GiB.
        deadline_seconds: requests that take longer are answered with an error.
        stall_seconds: a group that takes longer means that the device hangs, and ends the process.
        codec_threads: threads that decode pictures, and as many that encode replies.
        torch_threads: threads of the network's operators; 0 for the cores that this process may use, see
            `mpm_ops.cpus.usable_cores`, or fewer where the variable MPM_CORES says so.
        streams: groups computed side by side on a CPU, where enough waits, on an equal part of its threads each;
            "auto" for one a core where the runtime has streams (openvino), 1 for none.
        metrics_port: where Prometheus finds this model's metrics; 0 for nowhere.
        metrics_host: address of that port.
        agreement_fraction: of pictures that an idle device also computes without merging, to compare; 0 for none.
        agreement_min_fraction: the same, whatever the load.
    """

    schedule: tuple[int, ...] = (2, 5)
    align: int = 1
    merger: str = ""
    runtime: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    graph_mib: int | str = "auto"
    inference: Mapping[str, Any] = field(default_factory=dict)
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 64_000_000
    allowed_schedules: tuple[tuple[int, ...], ...] = ((),)
    allowed_mergers: tuple[str, ...] = ()
    deterministic: bool = False
    max_batch_tokens: int = 16_384
    max_group_windows: int = 8
    max_group_delay_ms: float = 20
    bulk_patience_seconds: float = 10
    max_inflight_tokens: int = 65_536
    max_inflight_mib: int = 384
    deadline_seconds: float = 60
    stall_seconds: float = 100
    codec_threads: int = 2
    torch_threads: int = 0
    streams: int | str = "auto"
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    agreement_fraction: float = 0.01
    agreement_min_fraction: float = 0.001

    def __post_init__(self) -> None:
        for name in (
            "align",
            "max_image_bytes",
            "max_image_pixels",
            "max_batch_tokens",
            "max_group_windows",
            "max_inflight_tokens",
            "max_inflight_mib",
            "codec_threads",
        ):
            _check_integer(name, getattr(self, name), minimum=1)
        for name in ("torch_threads", "metrics_port"):
            _check_integer(name, getattr(self, name), minimum=0)
        if self.graph_mib != "auto":
            _check_integer("graph_mib", self.graph_mib, minimum=0, other="auto")
        if self.streams != "auto":
            _check_integer("streams", self.streams, minimum=1, other="auto")
        if self.metrics_port > _MAX_PORT:
            raise ValueError(f"metrics_port: expected at most {_MAX_PORT}, got {self.metrics_port}")
        if not isinstance(self.metrics_host, str) or not self.metrics_host:
            raise ValueError(f"metrics_host: expected an address such as 127.0.0.1, got {self.metrics_host!r}")
        for name in ("agreement_fraction", "agreement_min_fraction"):
            _check_fraction(name, getattr(self, name))
        for name in ("max_group_delay_ms", "bulk_patience_seconds", "deadline_seconds", "stall_seconds"):
            _check_duration(name, getattr(self, name))
        for name, known in (("runtime", RUNTIMES), ("precision", PRECISIONS)):
            if getattr(self, name) not in ("auto", *known):
                raise ValueError(f"{name}: expected one of auto, {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or one such as cuda:1, got {self.device!r}")
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic: expected true or false, got {self.deterministic!r}")
        if self.graph_mib not in ("auto", 0) and self.deterministic:
            raise ValueError(f"graph_mib: expected 0 with deterministic, got {self.graph_mib}")
        _check_schedule("schedule", self.schedule)
        if not isinstance(self.allowed_schedules, tuple):
            raise ValueError(f"allowed_schedules: expected a list of schedules, got {self.allowed_schedules!r}")
        for schedule in self.allowed_schedules:
            _check_schedule("allowed_schedules", schedule)
        if self.merger != "":
            _check_merger("merger", self.merger)
        if not isinstance(self.allowed_mergers, tuple):
            raise ValueError(f"allowed_mergers: expected a list of mergers, got {self.allowed_mergers!r}")
        for merger in self.allowed_mergers:
            _check_merger("allowed_mergers", merger)
        if not isinstance(self.inference, Mapping):
            raise ValueError(f"inference: expected a mapping, got {self.inference!r}")

    def graph_bytes(self, device_type: str) -> int:
        """What captured graphs may take on a device such as "cuda"."""
        if isinstance(self.graph_mib, int):
            return self.graph_mib * 2**20
        return _GRAPH_BYTES if device_type == "cuda" and not self.deterministic else 0

    @property
    def merging(self) -> dict[str, Any]:
        """Arguments of `mpm_ops.load_segmenter` that say how tokens merge."""
        return {"merger": self.merger} if self.merger else {"schedule": self.schedule, "align": self.align}

    @property
    def max_body_bytes(self) -> int:
        """What a server in front should let through: up to there the engine says what is wrong with a picture."""
        return min(self.max_image_bytes + 2**20, _MAX_INT)

    @property
    def max_reply_bytes(self) -> int:
        """No reply is longer. That is enough for the largest view of nothing but noise."""
        return min(4 * self.max_image_pixels + 2**20, _MAX_INT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "ServingConfig":
        """Build from plain data, as YAML gives it.

        Raises:
            ValueError: a key is unknown, or a value is not what its field expects.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"expected a mapping of fields, got {values!r}")
        for key in values:
            if key in _GONE:
                raise ValueError(f"{key}: no longer a field: {_GONE[key]}; remove it and build the model again")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        values = dict(values)
        if "merger" in values and (beside := [name for name in ("schedule", "align") if name in values]):
            raise ValueError(f"merger: expected without {' and '.join(beside)}, got {values['merger']!r} beside them")
        for name in ("schedule", "allowed_schedules", "allowed_mergers"):
            if name in values:
                values[name] = _as_tuples(values[name])
        return cls(**values)


def read_serving_config(path: Path) -> dict[str, Any]:
    """Fields of `ServingConfig` from a YAML file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def _check_integer(name: str, value: Any, *, minimum: int, other: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        expected = f"{other} or an integer" if other else "an integer"
        raise ValueError(f"{name}: expected {expected} >= {minimum}, got {value!r}")


def _check_duration(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


def _check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number within 0..1, got {value!r}")


def _check_schedule(name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        raise ValueError(f"{name}: expected block numbers, got {value!r}")
    for block in value:
        _check_integer(name, block, minimum=0)


def _check_merger(name: str, value: Any) -> None:
    """As far as can be told without the network."""
    if not isinstance(value, str) or not _MERGER.fullmatch(value):
        raise ValueError(f"{name}: expected a name and its parameters such as tome:r=46, got {value!r}")


def _as_tuples(value: Any) -> Any:
    """YAML's lists, however deep, as tuples."""
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
