"""Commands of `mpm` that make what servers load."""

import shutil
from pathlib import Path
from typing import Any

import click

from handlers.cli import DEMO, PATH, model_options
from handlers.config import read_serving_config

_OWN = {"torchserve": ("max_delay_ms",), "triton": ("model_version",)}


@click.command()
@click.option("--target", type=click.Choice(["torchserve", "triton"]), required=True, help="The server.")
@click.option("--checkpoint", type=PATH, default=DEMO, help="A checkpoint or its folder (the demo's).")
@click.option("--out", type=PATH, required=True, help="The model store or repository; made if missing.")
@model_options
@click.option("--batch-size", type=int, help="Requests in flight at most (TorchServe 128, Triton 32).")
@click.option("--max-delay-ms", type=int, help="Of TorchServe: how long to wait for requests (5).")
@click.option("--model-version", type=int, help="Of Triton: others stay beside it (1).")
@click.option("--alone", is_flag=True, help="Remove other models from OUT, once this one is built.")
def build(
    target: str,
    checkpoint: Path,
    out: Path,
    name: str | None,
    config: Path | None,
    schedule: str | None,
    merger: str | None,
    align: int | None,
    metrics_port: int | None,
    batch_size: int | None,
    alone: bool,
    **own: int | None,
) -> None:
    """Package a checkpoint for a server."""
    for server, names in _OWN.items():
        for option in names:
            if server != target and own[option] is not None:
                raise ValueError(f"--{option.replace('_', '-')}: expected with --target {server} only")
    from mpm_ops.stages import parse_schedule

    from .torchserve import build_archive
    from .triton import build_model

    serving = read_serving_config(config) if config else {}
    given: dict[str, Any] = {"schedule": list(parse_schedule(schedule)) if schedule is not None else None}
    given |= {"align": align, "merger": merger, "metrics_port": metrics_port}
    serving |= {field: value for field, value in given.items() if value is not None}
    name = "segmenter" if name is None else name
    common: dict[str, Any] = {"name": name, "out": out, "serving": serving}
    limits = {"max_inflight" if target == "triton" else "batch_size": batch_size, "version": own["model_version"]}
    limits |= {"max_delay_ms": own["max_delay_ms"]}
    common |= {field: value for field, value in limits.items() if value is not None}
    told: list[str] = []
    built = (build_model if target == "triton" else build_archive)(checkpoint, **common, tell=told.append)
    print(f"built {built}", *told, f"  next:    mpm serve {out}", sep="\n")
    if alone:
        remove_others(out, name)


@click.command()
@click.option("--out", type=PATH, required=True, help="Folder; made if missing.")
def samples(out: Path) -> None:
    """Paint sample pictures to try a server with."""
    from .demo.samples import paint_samples

    for path in paint_samples(out):
        print(path)


def remove_others(store: Path, name: str) -> None:
    """Leave one model in a store or repository: other archives and folders of models are removed, nothing else is."""
    for path in store.iterdir():
        if path.suffix == ".mar" and path.stem != name:
            path.unlink()
        elif (path / "config.pbtxt").is_file() and path.name != name:
            shutil.rmtree(path)
