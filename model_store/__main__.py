"""Build what a server loads.

python -m model_store build --target torchserve|triton --checkpoint checkpoint.pth --name NAME --out DIR
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from mpm_ops.stages import parse_schedule

from .torchserve import build_archive
from .triton import build_model


def read_serving_config(path: Path) -> dict[str, Any]:
    """Fields of `handlers.config.ServingConfig` from a YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def remove_others(store: Path, name: str) -> None:
    """Leave one model in a store or repository: other archives and folders of models are removed, nothing else is."""
    for path in store.iterdir():
        if path.suffix == ".mar" and path.stem != name:
            path.unlink()
        elif (path / "config.pbtxt").is_file() and path.name != name:
            shutil.rmtree(path)


def _build(arguments: argparse.Namespace, serving: dict[str, Any]) -> Path:
    own = {"torchserve": ("max_delay_ms",), "triton": ("model_version",)}
    for target, names in own.items():
        for name in names:
            if target != arguments.target and getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected with --target {target} only")
    default_batch_size = 32 if arguments.target == "triton" else 128
    batch_size = default_batch_size if arguments.batch_size is None else arguments.batch_size
    common: dict[str, Any] = {"name": arguments.name, "out": arguments.out, "serving": serving}
    if arguments.target == "triton":
        version = 1 if arguments.model_version is None else arguments.model_version
        return build_model(arguments.checkpoint, **common, version=version, max_inflight=batch_size)
    return build_archive(
        arguments.checkpoint,
        **common,
        batch_size=batch_size,
        max_delay_ms=5 if arguments.max_delay_ms is None else arguments.max_delay_ms,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model_store", description=__doc__.split("\n")[0])
    build = parser.add_subparsers(required=True).add_parser("build", help="package a checkpoint for a server")
    build.add_argument("--target", choices=["torchserve", "triton"], required=True)
    build.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pth with variant.yml beside it")
    build.add_argument("--name", required=True, help="under which the model is served")
    build.add_argument("--out", type=Path, required=True, help="the model store or repository; made if missing")
    build.add_argument("--schedule", help="blocks before which tokens merge (2,5), or off")
    build.add_argument("--align", type=int, help="token counts after a merge are multiples of this (1)")
    build.add_argument("--batch-size", type=int, help="requests in flight at most (TorchServe 128, Triton 32)")
    build.add_argument("--max-delay-ms", type=int, help="of TorchServe: how long to wait for requests (5)")
    build.add_argument("--model-version", type=int, help="of Triton: others stay beside it (1)")
    build.add_argument("--metrics-port", type=int, help="where Prometheus finds the model's metrics (nowhere)")
    build.add_argument("--alone", action="store_true", help="remove other models from OUT, once this one is built")
    build.add_argument("--config", type=Path, help="YAML with more fields of handlers.config.ServingConfig")
    arguments = parser.parse_args()

    try:
        serving = read_serving_config(arguments.config) if arguments.config else {}
        if arguments.schedule is not None:
            serving["schedule"] = list(parse_schedule(arguments.schedule))
        if arguments.align is not None:
            serving["align"] = arguments.align
        if arguments.metrics_port is not None:
            serving["metrics_port"] = arguments.metrics_port
        built = _build(arguments, serving)
        if arguments.alone:
            remove_others(arguments.out, arguments.name)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {built}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
