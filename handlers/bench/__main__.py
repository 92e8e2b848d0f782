"""What serving costs and earns on this machine, measured.

python -m handlers.bench codec --checkpoint checkpoint.pth --images DIR_OR_FILE           # decoding and encoding
python -m handlers.bench end-to-end --checkpoint checkpoint.pth --images DIR_OR_FILE      # engine against its steps
python -m handlers.bench servers --checkpoint checkpoint.pth --images DIR_OR_FILE         # TorchServe and Triton
"""

import sys

from mpm_ops.bench import answer

from . import codec, end_to_end, servers


def main() -> int:
    questions = (codec, end_to_end, servers)
    return answer("python -m handlers.bench", __doc__.split("\n")[0], questions)


if __name__ == "__main__":
    sys.exit(main())
