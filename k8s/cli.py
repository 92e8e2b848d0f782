"""Commands of `mpm` for a fleet: manifests checked, servers watched."""

import re
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from handlers.cli import METRICS_PORT, PATH, port_option

_RATE = "20s"  # ten scrapes: curves appear soon after the start
_SHOWN = "15m"


def _version(_: object, __: object, text: str) -> tuple[int, int]:
    found = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+)?", text)
    if not found:
        raise click.BadParameter(f"expected a version such as 1.32, got {text!r}")
    return int(found[1]), int(found[2])


@click.command("check-manifests")
@click.option("--release", is_flag=True, help="Every image by its digest, and no host or registry of an example.")
@click.option("--kubernetes", default="1.35", show_default=True, callback=_version, help="The cluster's version.")
def check_manifests(release: bool, kubernetes: tuple[int, int]) -> int:
    """Find what is wrong with manifests on standard input.

    kubectl kustomize k8s/overlays/h100-sxm/torchserve | mpm check-manifests

    Each problem is a line, and the status is 1 if there is any.
    """
    from .check import problems
    from .manifests import Manifests

    found = problems(Manifests.parse(sys.stdin.read()), release=release, kubernetes=kubernetes)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def _several(kind: type) -> Callable[[object, click.Parameter, str | None], list[float] | None]:
    def parse(_: object, __: object, text: str | None) -> list[float] | None:
        try:
            found = [kind(each) for each in text.split(",")] if text is not None else None
        except ValueError:
            found = [0]
        if found is not None and not all(each > 0 for each in found):
            raise click.BadParameter(f"expected numbers > 0, separated by commas, got {text!r}")
        return found

    return parse


@click.command()
@click.option("--day", type=PATH, required=True, help="File of lines HH:MM,PICTURES_PER_SECOND.")
@click.option("--rate", required=True, help="Of one replica: pictures per second, or what `capacity --out` wrote.")
@click.option("--min", "low", callback=_several(int), help="Fewest replicas, one or more values.")
@click.option("--max", "high", callback=_several(int), help="Most replicas.")
@click.option("--waiting", callback=_several(float), help="Threshold of the seconds that wait.")
@click.option("--use", callback=_several(float), help="Threshold of the replicas in use.")
@click.option("--start-seconds", default=60.0, show_default=True, help="From a pod to its first answer.")
@click.option("--queue-seconds", default=0.2, show_default=True, help="Of work held before requests are refused.")
@click.option("--refused", default=0.001, show_default=True, help="Share of requests that may be.")
@click.option("--write", type=PATH, help="Folder for a component with the choice.")
def simulate(
    day: Path, rate: str, start_seconds: float, queue_seconds: float, refused: float, write: Path | None, **tried: Any
) -> int:
    """Simulate a day of the autoscaler of manifests on standard input: GPU-hours, and refused requests.

    The cheapest choice that keeps --refused is written as a component for the overlay; the status is 1 if none does.
    """
    from .manifests import Manifests
    from .simulate import Scaler, choose, component, read_day, read_rate

    given = Scaler.of(Manifests.parse(sys.stdin.read()))
    per_replica, cores = read_rate(rate)
    load = [pictures / per_replica for pictures in read_day(day)]
    values = {name: values or [getattr(given, name)] for name, values in tried.items()}
    limits = {"refused": refused, "start_seconds": start_seconds, "queue_seconds": queue_seconds}
    chosen = choose(given, load, values, **limits)
    if chosen is None:
        print(f"none refuses {refused:g} or less: more replicas, less use, or a shorter start", file=sys.stderr)
        return 1
    if write:
        write.mkdir(parents=True, exist_ok=True)
        (write / "kustomization.yaml").write_text(component(chosen, cores))
    return 0


@click.command()
@click.option("--target", "targets", multiple=True, default=[f"127.0.0.1:{METRICS_PORT}"], show_default=True,
              metavar="HOST:PORT", help="A metrics port; repeatable.")  # fmt: skip
@port_option("--port", default=9090, show_default=True, help="Prometheus's.")
@click.option("--out", type=PATH, default=Path("build/monitor"), show_default=True, help="Folder for data and log.")
def monitor(targets: tuple[str, ...], port: int, out: Path) -> int:
    """Watch servers on this machine with Prometheus.

    It has the project's rules; links to the dashboards' queries are printed.
    """
    from .monitoring.boards import BOARDS
    from .monitoring.prometheus import Prometheus

    try:
        with Prometheus(targets, out, scrape_seconds=2, port=port) as prometheus:
            print(f"Prometheus on {prometheus.url}, watching {', '.join(targets)}; alerts: {prometheus.url}/alerts")
            print("The dashboards' panels as graphs of Prometheus (docker/compose/compose.yml has Grafana):")
            for board in BOARDS:
                print(f"  {board.title}: {graph_url(prometheus.url, board.uid)}", flush=True)
            while True:
                time.sleep(60)
    except KeyboardInterrupt:
        return 0


def graph_url(prometheus: str, uid: str) -> str:
    """Prometheus's graph page with every query of a board."""
    from .monitoring.boards import BOARDS, concrete

    (board,) = (board for board in BOARDS if board.uid == uid)
    queries = [query.expr for panel in board.panels for query in panel.queries]
    fields = {
        f"g{i}.{name}": value
        for i, expr in enumerate(queries)
        for name, value in (("expr", concrete(expr, rate=_RATE)), ("tab", "0"), ("range_input", _SHOWN))
    }
    return f"{prometheus}/graph?{urllib.parse.urlencode(fields)}"
