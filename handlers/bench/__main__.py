"""What this project measures: `mpm bench`, one module for each question."""

import re
import sys
from collections.abc import Sequence

from mpm_ops.bench import answer, blocks, model, parsers

from . import codec, end_to_end, gpu, servers

PROGRAM, DESCRIPTION = "mpm bench", "What merging and serving cost and earn on this machine."
QUESTIONS = (model, blocks, codec, end_to_end, servers, gpu)


def options(question: str) -> list[str]:
    """What may follow a question, such as --images; nothing for what is none."""
    found = parsers(PROGRAM, DESCRIPTION, QUESTIONS)[1].get(question)
    return re.findall(r"--[\w-]+", found.format_usage()) if found else []


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question of a command line; that of this process by default."""
    return answer(PROGRAM, DESCRIPTION, QUESTIONS, argv)


if __name__ == "__main__":
    sys.exit(main())
