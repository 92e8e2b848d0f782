"""Package a checkpoint as a TorchServe model archive."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from handlers.config import CONFIG_KEY, ServingConfig

from .checkpoints import check_model, copy_model, say_nothing

# TorchServe takes the one class that this file defines; the code lives in the installed package.
_HANDLER = '''"""Serves the Segmenter in this archive."""

from handlers.servers.torchserve import SegmenterHandler


class Handler(SegmenterHandler):
    pass
'''
_RESPONSE_SECONDS = 120  # at least, for TorchServe's worker to answer; it is killed after that
_RESPONSE_MARGIN_SECONDS = 20
_MAX_RESPONSE_SECONDS = 10**6  # a deadline may be infinite, Java's integers aren't


def build_archive(
    checkpoint: Path,
    *,
    name: str,
    out: Path,
    serving: Mapping[str, Any],
    batch_size: int = 128,
    max_delay_ms: int = 5,
    tell: Callable[[str], None] = say_nothing,
) -> Path:
    """Write `NAME.mar` into a model store; of the checkpoint it holds the weights alone.

    Args:
        checkpoint: of one of MODELS, or its folder, with `classes.csv`, where there is one, beside it.
        name: under which the model is served.
        out: the model store; made if missing.
        serving: fields of `handlers.config.ServingConfig`.
        batch_size: requests in flight at most; they join while others compute.
        max_delay_ms: how long it waits for them.
        tell: is told what the model is, in a few lines.

    Returns:
        Path of the archive.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the configuration can't be served; nothing is written.
    """
    if batch_size < 1 or max_delay_ms < 1:
        raise ValueError(f"batch_size and max_delay_ms: expected at least 1, got {batch_size} and {max_delay_ms}")
    checkpoint, config, model = check_model(name, checkpoint, serving)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch_name:  # /tmp may be memory
        scratch = Path(scratch_name)
        files = scratch / "files"
        tell(copy_model(checkpoint, model, files))
        (scratch / "handler.py").write_text(_HANDLER)
        (scratch / "model-config.yaml").write_text(
            yaml.safe_dump(_model_config(serving, config, batch_size, max_delay_ms))
        )
        _run_archiver(
            scratch,
            f"--model-name={name}",
            "--version=1.0",
            f"--handler={scratch / 'handler.py'}",
            f"--config-file={scratch / 'model-config.yaml'}",
            "--extra-files=" + ",".join(str(path) for path in sorted(files.iterdir())),
            f"--export-path={scratch}",
        )
        return Path(shutil.move(scratch / f"{name}.mar", out / f"{name}.mar"))


def _model_config(
    serving: Mapping[str, Any], config: ServingConfig, batch_size: int, max_delay_ms: int
) -> dict[str, Any]:
    longest = min(max(config.deadline_seconds, config.stall_seconds), _MAX_RESPONSE_SECONDS)
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "continuousBatching": True,
        "batchSize": batch_size,
        "maxBatchDelay": max_delay_ms,
        "responseTimeout": max(_RESPONSE_SECONDS, math.ceil(longest) + _RESPONSE_MARGIN_SECONDS),
        "startupTimeout": 300,
        CONFIG_KEY: dict(serving),
    }


def _run_archiver(scratch: Path, *arguments: str) -> None:
    # A process with a temp folder of its own: the archiver empties and reuses TMPDIR/NAME.
    workspace = scratch / "workspace"
    workspace.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", *arguments]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(workspace)}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"torch-model-archiver failed: {done.stderr.strip().splitlines()[-1]}")
