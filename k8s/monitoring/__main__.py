"""Watch servers on this machine: a Prometheus with the project's rules, and links to the dashboards' queries.

python -m k8s.monitoring [--target 127.0.0.1:8090] [--out build/monitor]
"""

import argparse
import signal
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from .boards import BOARDS, concrete
from .prometheus import Prometheus

_RATE = "20s"  # ten scrapes: curves appear soon after the start
_SHOWN = "15m"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", help="host:port of a metrics port, repeatable (127.0.0.1:8090)")
    parser.add_argument("--port", type=int, default=9090, help="Prometheus's (9090)")
    parser.add_argument("--out", type=Path, default=Path("build/monitor"), help="folder for data and log")
    options = parser.parse_args(arguments)
    targets = options.target or ["127.0.0.1:8090"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Prometheus(targets, options.out, scrape_seconds=2, port=options.port) as prometheus:
            print(f"Prometheus on {prometheus.url}, watching {', '.join(targets)}; alerts: {prometheus.url}/alerts")
            print("The dashboards' panels as graphs of Prometheus (docker/compose/compose.yml has Grafana):")
            for board in BOARDS:
                print(f"  {board.title}: {graph_url(prometheus.url, board.uid)}", flush=True)
            while True:
                time.sleep(60)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


def graph_url(prometheus: str, uid: str) -> str:
    """Prometheus's graph page with every query of a board."""
    (board,) = (board for board in BOARDS if board.uid == uid)
    queries = [query.expr for panel in board.panels for query in panel.queries]
    fields = {
        f"g{i}.{name}": value
        for i, expr in enumerate(queries)
        for name, value in (("expr", concrete(expr, rate=_RATE)), ("tab", "0"), ("range_input", _SHOWN))
    }
    return f"{prometheus}/graph?{urllib.parse.urlencode(fields)}"


if __name__ == "__main__":
    sys.exit(main())
