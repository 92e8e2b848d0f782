"""What serving costs and earns on this machine, measured.

python -m handlers.bench grouping --checkpoint checkpoint.pth --images DIR [DIR...]       # padding, groups, waiting
python -m handlers.bench codec --checkpoint checkpoint.pth --images DIR_OR_FILE           # decoding and encoding
python -m handlers.bench end-to-end --checkpoint checkpoint.pth --images DIR_OR_FILE      # engine against its steps
python -m handlers.bench servers --checkpoint checkpoint.pth --images DIR_OR_FILE         # TorchServe and Triton
python -m handlers.bench observation --checkpoint checkpoint.pth --images DIR             # metrics and samples
"""

import sys

from mpm_ops.bench import answer

from . import codec, end_to_end, grouping, observation, servers


def main() -> int:
    questions = (grouping, codec, end_to_end, servers, observation)
    return answer("python -m handlers.bench", __doc__.split("\n")[0], questions)


if __name__ == "__main__":
    sys.exit(main())
