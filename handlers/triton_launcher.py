"""The command `handlers.launch.triton` under its old name."""

import sys

from handlers.launch.triton import main

if __name__ == "__main__":
    sys.exit(main())
