"""The commands of `mpm loadtest`."""

import importlib
import os
import sys
from pathlib import Path

import click

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class _Commands(click.Group):
    """`mpm loadtest`, whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["capacity", "compare", "masks", "report", "run", "search"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f".{ {'report': 'page', 'run': 'cli'}.get(cmd_name, cmd_name) }", __package__)
        command: click.Command = module.command
        return command


group = _Commands("loadtest", help="Load tests of a served model.")


@click.command("run", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Start locust with this package's locustfile; all arguments are locust's."""
    from .masks import environment

    os.execve(sys.executable, [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments], environment())
