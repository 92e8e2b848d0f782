"""Build what a server loads.

python -m model_store build --target torchserve --checkpoint checkpoint.pth --name NAME --out DIR
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from mpm_ops.stages import parse_schedule

from .torchserve import build_archive


def read_serving_config(path: Path) -> dict[str, Any]:
    """Fields of `handlers.config.ServingConfig` from a YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model_store", description=__doc__.split("\n")[0])
    build = parser.add_subparsers(required=True).add_parser("build", help="package a checkpoint for a server")
    build.add_argument("--target", choices=["torchserve"], required=True)
    build.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pth with variant.yml beside it")
    build.add_argument("--name", required=True, help="under which the model is served")
    build.add_argument("--out", type=Path, required=True, help="the model store; made if missing")
    build.add_argument("--schedule", help="blocks before which tokens merge (2,5), or off")
    build.add_argument("--align", type=int, help="token counts after a merge are multiples of this (1)")
    build.add_argument("--batching", choices=["continuous", "synchronous"], default="continuous")
    build.add_argument("--batch-size", type=int, default=128, help="requests handed over at once (128)")
    build.add_argument("--max-delay-ms", type=int, default=5, help="how long to wait for them (5)")
    build.add_argument("--metrics-port", type=int, help="where Prometheus finds the model's metrics (nowhere)")
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
        archive = build_archive(
            arguments.checkpoint,
            name=arguments.name,
            out=arguments.out,
            serving=serving,
            batching=arguments.batching,
            batch_size=arguments.batch_size,
            max_delay_ms=arguments.max_delay_ms,
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built {archive}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
