"""Watch running servers on one machine: Prometheus, Alertmanager, and pictures of the dashboards' panels.

python -m handlers.monitoring [--target 127.0.0.1:8090] [--out build/monitor]
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from .binaries import MissingToolError
from .boards import BOARDS
from .pictures import draw_board
from .prometheus import Prometheus

_DRAW_SECONDS = 15
_SHOWN_SECONDS = 15 * 60  # of the past, at most


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m handlers.monitoring", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", help="host:port of a metrics port, any number (127.0.0.1:8090)")
    parser.add_argument("--port", type=int, default=9090, help="Prometheus's (9090)")
    parser.add_argument("--out", type=Path, default=Path("build/monitor"), help="folder for data and pictures")
    arguments = parser.parse_args()
    targets = arguments.target or ["127.0.0.1:8090"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = arguments.out.resolve()
    try:
        with Prometheus(targets, out, scrape_seconds=2, port=arguments.port) as prometheus:
            alertmanager = f"http://127.0.0.1:{prometheus.alertmanager_port}"
            print(f"Prometheus on {prometheus.url}, Alertmanager on {alertmanager}, watching {', '.join(targets)}")
            print(f"Pictures of the dashboards' panels (not Grafana), every {_DRAW_SECONDS} s:", flush=True)
            for board in BOARDS:
                print(f"  {out / board.uid}.png", flush=True)
            started = time.time()
            while True:
                time.sleep(_DRAW_SECONDS)
                end = time.time()
                for board in BOARDS:
                    start = max(started, end - _SHOWN_SECONDS)
                    draw_board(board, prometheus, out / f"{board.uid}.png", start=start, end=end)
    except KeyboardInterrupt:
        return 0
    except (MissingToolError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
