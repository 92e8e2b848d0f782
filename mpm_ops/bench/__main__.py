"""What merging costs and earns on this machine, as JSON.

python -m mpm_ops.bench model --images DIR [--out X.json]    # on a CPU: ours beside everybody else's, merging, labels
python -m mpm_ops.bench blocks --images DIR                  # where a batch's time goes, block by block
python -m mpm_ops.bench gpu                                  # merging and networks on a GPU
"""

import sys

from . import answer, blocks, gpu, model


def main() -> int:
    return answer("python -m mpm_ops.bench", __doc__.split("\n")[0], (model, blocks, gpu))


if __name__ == "__main__":
    sys.exit(main())
