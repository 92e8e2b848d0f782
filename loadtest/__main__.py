"""python -m loadtest COMMAND …; without one it lists them."""

import signal
import sys
from collections.abc import Sequence

import click

from .cli import commands, invoke


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    group = click.Group("loadtest", commands=commands(), help="Load tests of a served model.")
    return invoke(group, "python -m loadtest", argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started has to be stopped
    sys.exit(main())
