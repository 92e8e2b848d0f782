"""Write the manifests that are made from other files.

python -m k8s.generate
"""

from pathlib import Path

import yaml

_FOLDER = Path(__file__).resolve().parent
PROMETHEUS_RULE = _FOLDER / "components" / "monitoring" / "prometheusrule.yaml"


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


def main() -> None:
    PROMETHEUS_RULE.write_text(prometheus_rule())


if __name__ == "__main__":
    main()
