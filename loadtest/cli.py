"""The commands of `mpm loadtest`."""

import os
import sys
from pathlib import Path

import click

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def commands() -> dict[str, click.Command]:
    """Every command by its name."""
    from . import capacity, compare, masks, page, search

    return {
        "run": _run,
        "search": search.command,
        "capacity": capacity.command,
        "compare": compare.command,
        "masks": masks.command,
        "report": page.command,
        "paint": _paint,
    }


class _Commands(click.Group):
    """`mpm loadtest`, whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return commands().get(cmd_name)


group = _Commands("loadtest", help="Load tests of a served model.")


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def _run(arguments: tuple[str, ...]) -> None:
    """Start locust with this package's locustfile; all arguments are locust's."""
    from .masks import environment

    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments]
    os.execve(command[0], command, environment())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; left as it is if it has files.")
def _paint(out: Path) -> None:
    """Paint road scenes to send, from empty to crowded."""
    from .pictures import ensure_pictures

    ensure_pictures(out)
