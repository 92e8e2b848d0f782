"""`python -m loadtest COMMAND …` is `mpm loadtest COMMAND …`."""

import sys
from collections.abc import Sequence

from handlers import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    return cli.main(["loadtest", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
