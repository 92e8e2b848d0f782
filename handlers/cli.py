"""The command `mpm`: serve, build, segment, evaluate, measure and watch.

Imports nothing of the model before a command needs it: `mpm serve` stays as the launcher, and should be small.
"""

import math
import re
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from handlers.config import PRECISIONS, RUNTIMES, read_serving_config

GROUP = "mpm.commands"  # entry points of packages that import this one
DEMO = Path(__file__).resolve().parents[1] / "model_store" / "demo" / "checkpoint.pth"
QUESTIONS = ("model", "blocks", "codec", "end-to-end", "servers", "gpu")  # of `bench`
METRICS_PORT = 8090  # of the Makefile, the images and the manifests
PATH = click.Path(path_type=Path)
PORT = click.IntRange(0, 65_535)
port_option = partial(click.option, type=PORT, metavar="PORT")

_STORES = {"torchserve": Path("build/model_store"), "triton": Path("build/model_repository")}
_PORTS = {"torchserve": 8080, "triton": 8000}
_SAMPLE = Path("build/samples/street.jpg")
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
_FORMATS = ("png", "json", "npy", "grey", "overlay", "tokens", "confidence")


class _Commands(click.Group):
    """The commands below, and those that other packages offer, which are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(offered.name for offered in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if own := super().get_command(ctx, cmd_name):
            return own  # without reading what every installed package offers
        return next((offered.load() for offered in entry_points(group=GROUP, name=cmd_name)), None)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog='Completion: eval "$(_MPM_COMPLETE=bash_source mpm)", or zsh_source, or fish_source.',
)
@click.version_option(package_name="mpm-segmenter")
def commands() -> None:
    """Segmenter, served faster by merging tokens.

    The status is 0; 1 where the answer is no: a server ended, a picture was refused, a promise was broken; 2 for bad
    input.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its status; what it refuses is a line on standard error.

    Args:
        argv: its arguments; those of this process by default.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started has to be stopped
    try:
        returned = commands.main(None if argv is None else list(argv), "mpm", standalone_mode=False)
    except click.Abort:  # Ctrl-C; a RuntimeError
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except ModuleNotFoundError as error:
        print(f"{error}; see the extras of mpm-segmenter in its README", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return returned if isinstance(returned, int) else 0


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a model is served that is built of a checkpoint: options of `build` and of `serve`."""
    for option in (
        click.option("--config", type=PATH, help="YAML with more fields of handlers.config.ServingConfig."),
        port_option("--metrics-port", help="Where Prometheus finds the model's metrics (nowhere)."),
        click.option("--align", type=int, help="Token counts after a merge are multiples of this (1)."),
        click.option("--merger", help="Another way to merge, such as tome:r=46, instead of a schedule."),
        click.option("--schedule", help="Blocks before which tokens merge (2,5), or off."),
        click.option("--name", help="Name under which the model is served (segmenter)."),
    ):
        command = option(command)
    return command


def _is_seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"expected seconds >= 0, got {value}")
    return value


@commands.command()
@click.argument("model", required=False, type=PATH)
@click.option(
    "--server", type=click.Choice(["torchserve", "triton"]), help="Default: what MODEL is built for, else torchserve."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@port_option("--port", help="HTTP (8080 on TorchServe, 8000 on Triton); 0 takes a free one.")
@port_option("--grpc-port", help="gRPC, on Triton (8001).")
@port_option("--triton-metrics-port", help="Triton's own metrics, with what its queue refused (nowhere).")
@click.option("--admin-secret-file", type=PATH, help="Triton: file that gets the secret of this start (none).")
@port_option("--ready-port", default=0, help="Answers 200 while requests should be sent here, else 503 (none).")
@click.option(
    "--lame-duck-seconds",
    type=float,
    default=0.0,
    callback=_is_seconds,
    metavar="SECONDS",
    help="From SIGTERM until requests are refused: what a proxy needs to see the 503 (0).",
)
@click.option("--no-edge", is_flag=True, help="Nothing strict in front of the server: for trusted clients only.")
@click.option(
    "--cors-origin", multiple=True, metavar="URL", help="Whose pages may call from browsers; * for all (none)."
)
@click.option("--no-page", is_flag=True, help="No page for people at the root.")
@click.option("--sample", type=PATH, help="Picture named in the examples that are printed when ready.")
@model_options
@click.option("--out", type=PATH, help="Folder to build into, whose other models are served too (one of its own).")
def serve(
    model: Path | None,
    server: str | None,
    host: str,
    port: int | None,
    ready_port: int,
    lame_duck_seconds: float,
    no_edge: bool,
    no_page: bool,
    cors_origin: tuple[str, ...],
    sample: Path | None,
    grpc_port: int | None,
    triton_metrics_port: int | None,
    admin_secret_file: Path | None,
    **build: Any,
) -> int:
    """Serve a model until Ctrl-C or SIGTERM.

    MODEL is a checkpoint or its folder, which is built before, or a model store or repository that `mpm build` made.
    Without it the demo model is served.
    """
    if model and not model.exists():
        raise click.UsageError(f"MODEL: expected a checkpoint or what `mpm build` made, got {model}: no such file")
    server = server or ("triton" if model and any(model.glob("*/config.pbtxt")) else "torchserve")
    if server != "triton" and {grpc_port, triton_metrics_port, admin_secret_file} != {None}:
        raise click.UsageError("--grpc-port, --triton-metrics-port, --admin-secret-file: expected with Triton only")
    if cors_origin and no_edge:
        raise click.UsageError("--cors-origin: expected with the edge, leave out --no-edge")
    if no_page and no_edge:
        raise click.UsageError("--no-page: expected with the edge, leave out --no-edge, which has no page")
    given = {name: value for name, value in build.items() if value is not None}
    if model is None or model.is_file() or any(path.suffix in _WEIGHTS for path in model.iterdir()):
        checkpoint = {"checkpoint": model} if model else {}
        alone = [] if "out" in given else ["--alone"]
        model = given.setdefault("out", _STORES[server])
        if status := _run("build", {"target": server, **checkpoint, **given}, *alone):
            return status
        if sample is None:
            sample = _SAMPLE
            if not sample.is_file() and (status := _run("samples", {"out": sample.parent})):
                return status
    elif given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names}: expected with a checkpoint, got {model}, which is built already")

    from handlers.launch.edge import Front
    from handlers.launch.processes import Server, run_in_foreground

    start: Callable[..., Server]
    where: dict[str, Any] = {"host": host, "port": _PORTS[server] if port is None else port}
    if server == "torchserve":
        from handlers.launch.torchserve import TorchServe

        start = partial(TorchServe, model, **where)
    else:
        from handlers.launch.triton import Triton

        start = partial(
            Triton,
            model,
            **where,
            grpc_port=8001 if grpc_port is None else grpc_port,
            metrics_port=triton_metrics_port or 0,
            admin_secret_file=admin_secret_file,
        )
    return run_in_foreground(
        start,
        front=None
        if no_edge
        else lambda: Front(
            **where, server=server, origins=cors_origin, has_page=not no_page, examples=_examples(sample)
        ),
        sample=str(sample or "photo.jpg"),
        host=host,
        ready_port=ready_port,
        lame_duck_seconds=lame_duck_seconds,
    )


def _examples(sample: Path | None) -> list[Path]:
    """Pictures for the page: the one that was named, or those that we painted."""
    if sample not in (None, _SAMPLE):
        return [sample.resolve()] if sample.is_file() else []
    return sorted(_SAMPLE.parent.resolve().glob("*.jpg"))


def _run(command: str, options: Mapping[str, Any], *flags: str) -> int:
    """Run a command in a process of its own, whose memory is free afterwards, and return its status."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return subprocess.run([sys.executable, "-P", "-m", "handlers", command, *given, *flags]).returncode


@commands.command()
@click.argument("url")
@click.option("--timeout", default=20.0, metavar="SECONDS", show_default=True, help="For everything.")
@click.option("--metrics", metavar="URL", help="Of the model's metrics (port 8090 of the server's host); '' for none.")
def health(url: str, timeout: float, metrics: str | None) -> int:
    """Ask a served model for the mask of a tiny picture.

    URL is http://HOST:PORT/predictions/NAME (TorchServe) or http://HOST:PORT/v2/models/NAME (Triton). An overloaded
    model that computes is alive, which its metrics tell.
    """
    from handlers.launch.health import UnhealthyError, check_model

    if metrics is None:
        host = urllib.parse.urlsplit(url).hostname
        metrics = f"http://{host}:{METRICS_PORT}/metrics" if host else ""
    try:
        check_model(url, timeout_seconds=timeout, metrics_url=metrics)
    except UnhealthyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Formats(click.ParamType):
    name = "FORMAT,..."

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(str(value).split(",")))
        if unknown := [name for name in chosen if name not in _FORMATS]:
            self.fail(f"expected some of {', '.join(_FORMATS)}, got {unknown[0]!r}", parameter, context)
        return chosen


class _Share(click.ParamType):
    name = "INDEX/COUNT"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(value))
        if not found or int(found[1]) >= int(found[2]):
            self.fail(f"expected one such as 0/16 to 15/16, got {value!r}", parameter, context)
        return int(found[1]), int(found[2])


@commands.command()
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE|FOLDER|PATTERN...")
@click.option("--out", type=PATH, default=Path("masks"), show_default=True, help="Folder; made if missing.")
@click.option("--url", help="A served model, asked instead: .../predictions/NAME, .../v2/models/NAME, grpc://...")
@click.option("--checkpoint", type=PATH, help="With variant.yml beside it; else the demo model.")
@click.option("--format", "forms", type=_Formats(), default="png", show_default=True, help=", ".join(_FORMATS))
@click.option("--shard", type=_Share(), default="0/1", help="Only one of so many parts, by the pictures' names: 3/16.")
@click.option("--resume", is_flag=True, help="Leave out pictures whose answers are there.")
@click.option("--schedule", help="Blocks before which tokens merge (2,5), or off.")
@click.option("--align", type=int, help="Token counts after a merge are multiples of this (1).")
@click.option("--merger", help="Another way to merge, such as tome:r=46, instead of a schedule.")
@click.option("--fit", type=click.Choice(["shorter", "longer"]), help="Side of a long picture that decides (shorter).")
@click.option("--runtime", type=click.Choice(["auto", *RUNTIMES]), help="What computes (auto).")
@click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), help="Of the network (auto).")
@click.option("--device", help="auto, cpu, cuda or one such as cuda:1 (auto).")
@click.option("--config", type=PATH, help="YAML with more fields of handlers.config.ServingConfig.")
def segment(
    pictures: tuple[str, ...],
    out: Path,
    url: str | None,
    forms: tuple[str, ...],
    shard: tuple[int, int],
    resume: bool,
    schedule: str | None,
    merger: str | None,
    fit: str | None,
    checkpoint: Path | None,
    **own: Any,
) -> int:
    """Write the masks of pictures, of folders with all that is below them, and of patterns such as '**/*.jpg'.

    OUT/NAME.png holds class ids, with the classes' colours; OUT keeps the folders below FOLDER. The model is loaded
    into this process, or asked at --url. Each file is written whole or not at all. A picture that is refused is named
    in the end, and the status is then 1. Ctrl-C and --resume take it up where it was.
    """
    from handlers.folder import Shard, asking_engine, asking_server, segment_pictures

    given = [name for name, value in {"checkpoint": checkpoint, **own}.items() if value is not None]
    if url and given:
        raise click.UsageError(f"--{given[0]}: expected without --url, where the server has a model")
    if url:
        asking = asking_server(url, forms, {"schedule": schedule, "merger": merger, "fit": fit, "priority": "bulk"})
    else:
        config = own.pop("config")
        fields = {"schedule": schedule, "merger": merger, **own}
        fields = {name: value for name, value in fields.items() if value is not None}
        asking = asking_engine(
            checkpoint or DEMO, forms, (read_serving_config(config) if config else {}) | fields, fit
        )
    return segment_pictures(pictures, out, asking, forms, shard=Shard(*shard), resume=resume)


@commands.command()
@click.option("--dataset", required=True, metavar="NAME", help="ade20k, camvid, cityscapes or pascal_context.")
@click.option("--root", type=PATH, required=True, help="Folder of the dataset.")
@click.option("--split", default="val", show_default=True)
@click.option("--checkpoint", type=PATH, required=True, help="With variant.yml beside it.")
@click.option("--schedule", "schedules", multiple=True, help="2,5 for one; repeat to compare (2,5).")
@click.option("--align", default=1, show_default=True, help="Token counts after a merge are multiples of this.")
@click.option("--merger", "mergers", multiple=True, help="tome:r=46, algm ...; repeat to compare.")
@click.option("--sweep", is_flag=True, help="Many mergers: schedules early to late, keep, ToMe, ALGM, by region.")
@click.option(
    "--light", "lights", multiple=True, type=float, default=[1.0], help="0.3 for night; repeat to compare (1)."
)
@click.option("--runtime", type=click.Choice(["auto", *RUNTIMES]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--im-size", type=int, help="Pictures are resized to this short side (the checkpoint's).")
@click.option("--window-stride", type=int, help="Pixels between windows; Segmenter's own evaluation: window - 32.")
@click.option("--skip", default=0, help="Leave out so many pictures at the start (0).")
@click.option("--most", type=click.IntRange(1), help="Take at most so many pictures, evenly chosen (all).")
@click.option("--times", type=PATH, help="Show milliseconds of a report of `mpm bench model` beside.")
@click.option("--out", type=PATH, help="Folder for scores.json; started again, it goes on where it was stopped.")
@click.option("--plot", "plot_file", type=PATH, help="Draw the curves into a PNG or SVG.")
def evaluate(im_size: int | None, window_stride: int | None, **options: Any) -> None:
    """What merging changes and saves: scores, agreement with the unmerged network, tokens, GFLOPs, images a second."""
    from mpm_ops.evaluate import compare

    inference = {"im_size": im_size, "window_stride": window_stride}
    compare(inference={name: value for name, value in inference.items() if value is not None}, **options)


class _Bench(click.Command):
    """Completes the options of a question, for which it has to import what measures."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from handlers.bench.__main__ import options

        given = ctx.params.get("arguments") or ("",)
        return [CompletionItem(option) for option in options(given[0]) if option.startswith(incomplete)]


def _question(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    return [] if ctx.params.get("arguments") else [name for name in QUESTIONS if name.startswith(incomplete)]


@commands.command(cls=_Bench, context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="QUESTION ...", shell_complete=_question)
def bench(arguments: tuple[str, ...]) -> int:
    """Measure speed: model, blocks, codec, end-to-end, servers or gpu.

    `mpm bench QUESTION --help` lists the options of each.
    """
    from handlers.bench.__main__ import main as answer

    return answer(arguments)


@commands.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="--server SERVER ...")
def edge(arguments: tuple[str, ...]) -> int:
    """Put strict HTTP in front of a server that runs elsewhere, in a process or container of its own.

    `mpm edge --help` lists the options. `mpm serve` has one already.
    """
    from handlers.edge.__main__ import main as run_edge

    return run_edge(arguments)
