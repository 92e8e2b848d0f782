"""What merging costs and earns on this machine, as JSON.

python -m mpm_ops.bench model --image PICTURE [--out X.json] [--plot X.png]       # ours beside everybody else's
python -m mpm_ops.bench labels --checkpoint checkpoint.pth --images DIR_OR_FILE   # labelling pixels
python -m mpm_ops.bench merge                                                     # merging alone
python -m mpm_ops.bench gpu                                                       # merging and networks on a GPU
"""

import argparse
import sys

from . import gpu, labels, merge, model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mpm_ops.bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for question in (model, labels, merge, gpu):
        question.add_command(commands)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
