"""What merging costs and earns on this machine, as JSON.

python -m mpm_ops.bench model --image PICTURE [--out X.json] [--plot X.png]       # ours beside everybody else's
python -m mpm_ops.bench labels --checkpoint checkpoint.pth --images DIR_OR_FILE   # labelling pixels
python -m mpm_ops.bench merge                                                     # merging alone
python -m mpm_ops.bench gpu                                                       # merging and networks on a GPU
"""

import sys

from . import answer, gpu, labels, merge, model


def main() -> int:
    return answer("python -m mpm_ops.bench", __doc__.split("\n")[0], (model, labels, merge, gpu))


if __name__ == "__main__":
    sys.exit(main())
