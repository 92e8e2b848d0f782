"""The commands of this package, as functions of their arguments."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from .masks import environment

Command = Callable[[Sequence[str] | None], int]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def commands() -> dict[str, click.Command]:
    """Every command by its name; `invoke` runs one."""
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


def invoke(command: click.Command, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one line on standard error.

    Args:
        name: as whoever typed it knows it, for its help.
        argv: its arguments; those of this process by default.

    Returns:
        The exit status: 0, 2 for bad input, or what the command returned.
    """
    try:
        returned = command.main(list(sys.argv[1:] if argv is None else argv), name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 2
    return returned if isinstance(returned, int) else 0


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def _run(arguments: tuple[str, ...]) -> None:
    """Start locust with this package's locustfile; all arguments are locust's."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments]
    os.execve(command[0], command, environment())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; left as it is if it has files.")
def _paint(out: Path) -> None:
    """Paint road scenes to send, from empty to crowded."""
    from .pictures import ensure_pictures

    ensure_pictures(out)
