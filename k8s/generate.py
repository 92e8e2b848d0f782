"""Write the files that are made from others: the operator's rules and Grafana's dashboards.

python -m k8s.generate
"""

from pathlib import Path

import yaml

from .monitoring.boards import BOARDS
from .monitoring.grafana import RUNBOOK, RUNBOOK_UID, render, render_runbook

_FOLDER = Path(__file__).resolve().parent
PROMETHEUS_RULE = _FOLDER / "components" / "monitoring" / "prometheusrule.yaml"
DASHBOARDS = _FOLDER / "monitoring" / "dashboards"


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay readable."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=">" if len(text) > 100 else None)


_Dumper.add_representer(str, _represent)


def prometheus_rule() -> str:
    """The rules and alerts of `monitoring/rules.yml` as prometheus-operator takes them."""
    rules = yaml.safe_load((_FOLDER / "monitoring" / "rules.yml").read_text())
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "mpm", "labels": {"app.kubernetes.io/name": "segmenter"}},
        "spec": rules,
    }
    text: str = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=100)
    return "# Made from k8s/monitoring/rules.yml by `python -m k8s.generate`.\n" + text


def dashboards() -> dict[str, str]:
    """Grafana's JSON of every board, by its uid."""
    return {board.uid: render(board) for board in BOARDS} | {RUNBOOK_UID: render_runbook(RUNBOOK.read_text())}


def main() -> None:
    PROMETHEUS_RULE.write_text(prometheus_rule())
    DASHBOARDS.mkdir(exist_ok=True)
    for uid, text in dashboards().items():
        (DASHBOARDS / f"{uid}.json").write_text(text)


if __name__ == "__main__":
    main()
