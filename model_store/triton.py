"""Package a checkpoint as a model in a Triton model repository."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from handlers.api.formats import FORMATS, MASKS
from handlers.engine.loading import warm_up_picture

from .checkpoints import check_model, copy_model, say_nothing

_MODEL = '''"""Serves the Segmenter in this folder; the code lives in the installed package."""

from handlers.servers.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# One input, so that a raw body needs no description. Batches of one keep requests in Triton's queue, where its
# limits hold, until the engine has room; the engine groups windows itself. Two versions: a new one loads and
# takes over while the one before still answers. Priority 1 goes before 2.
_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
version_policy {{ latest {{ num_versions: 2 }} }}
input [ {{ name: "IMAGE" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [
{outputs}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{
  preferred_batch_size: [ 1 ]
  priority_levels: 2
  default_priority_level: 1
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {queue_timeout_us}
    allow_timeout_override: true
    max_queue_size: {max_queue_size}
  }}
}}
parameters {{ key: "max_inflight" value {{ string_value: "{max_inflight}" }} }}
"""
_MAX_BATCH_SIZE = 16  # pictures that a client may put into one request
_QUEUE_TIMEOUT_US = 10_000_000


def build_model(
    checkpoint: Path,
    *,
    name: str,
    out: Path,
    serving: Mapping[str, Any],
    version: int = 1,
    max_inflight: int = 32,
    max_queue_size: int = 64,
    tell: Callable[[str], None] = say_nothing,
) -> Path:
    """Write a version of a model into a model repository: OUT/NAME/VERSION, with config.pbtxt and warm-up data.

    Of the checkpoint it holds the weights alone.

    Args:
        checkpoint: of one of MODELS, or its folder, with `classes.csv`, where there is one, beside it.
        name: under which the model is served.
        out: the model repository; made if missing.
        serving: fields of `handlers.config.ServingConfig`.
        version: other versions stay beside it; the same one is replaced.
        max_inflight: pictures in the engine at most; more wait in Triton's queue.
        max_queue_size: requests of a priority that may wait there; more are refused.
        tell: is told what the model is, in a few lines.

    Returns:
        The version's folder.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the configuration can't be served; nothing is written.
    """
    for field, value in (("version", version), ("batch_size", max_inflight), ("max_queue_size", max_queue_size)):
        if value < 1:
            raise ValueError(f"{field}: expected at least 1, got {value}")
    checkpoint, _, model = check_model(name, checkpoint, serving)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch_name:
        scratch = Path(scratch_name) / str(version)
        tell(copy_model(checkpoint, model, scratch))
        (scratch / "serving.yaml").write_text(yaml.safe_dump(dict(serving)))
        (scratch / "model.py").write_text(_MODEL)

        folder = out / name
        (folder / "warmup").mkdir(parents=True, exist_ok=True)
        (folder / "warmup" / "noise.jpg").write_bytes(warm_up_picture())
        (folder / "config.pbtxt").write_text(
            _CONFIG.format(
                name=name,
                max_batch_size=min(_MAX_BATCH_SIZE, max_inflight),
                outputs=_outputs(model.config.n_cls),
                queue_timeout_us=_QUEUE_TIMEOUT_US,
                max_queue_size=max_queue_size,
                max_inflight=max_inflight,
            )
        )
        shutil.rmtree(folder / str(version), ignore_errors=True)
        return Path(shutil.move(scratch, folder / str(version)))


def _outputs(num_classes: int) -> str:
    """Triton's outputs: class ids where a format has an array of them, encoded bytes elsewhere."""
    ids = f"data_type: {'TYPE_UINT8' if num_classes <= 256 else 'TYPE_UINT16'} dims: [ -1, -1 ]"
    kinds = {FORMATS[name].output: FORMATS[name].array is not None for name in MASKS}
    return ",\n".join(
        f'  {{ name: "{output}" {ids if is_array else "data_type: TYPE_STRING dims: [ 1 ]"} }}'
        for output, is_array in sorted(kinds.items())
    )
