"""What this project measures: `mpm bench`, one module for each question."""

import sys
from collections.abc import Sequence

from mpm_ops.bench import answer, blocks, model

from . import codec, end_to_end, gpu, servers


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question of a command line; that of this process by default."""
    questions = (model, blocks, codec, end_to_end, servers, gpu)
    return answer("mpm bench", "What merging and serving cost and earn on this machine.", questions, argv)


if __name__ == "__main__":
    sys.exit(main())
