"""The command `handlers.launch.health` under its old name."""

import sys

from handlers.launch.health import main

if __name__ == "__main__":
    sys.exit(main())
