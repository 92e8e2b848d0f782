"""The command `handlers.launch.torchserve` under its old name."""

import sys

from handlers.launch.torchserve import main

if __name__ == "__main__":
    sys.exit(main())
