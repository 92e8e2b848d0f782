"""Rendered manifests, and how to read them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import yaml

from handlers.config import ServingConfig

Manifest = Mapping[str, Any]

_QUANTITY = re.compile(r"[+-]?(\d+|\d+\.\d*|\.\d+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)?")
_SUFFIXES = {
    s: Decimal(10) ** e for s, e in zip(("n", "u", "m", "", "k", "M", "G", "T"), range(-9, 15, 3), strict=True)
}
_SUFFIXES |= {f"{s}i": Decimal(2) ** (10 * e) for e, s in enumerate("KMGT", 1)}


@dataclass(frozen=True, slots=True)
class Manifests:
    """What one overlay renders to."""

    documents: tuple[Manifest, ...]

    @classmethod
    def parse(cls, text: str) -> "Manifests":
        """From YAML; documents without a kind or a name are refused.

        Raises:
            ValueError: the text isn't YAML, or holds something else than manifests.
        """
        try:
            documents = tuple(document for document in yaml.load_all(text, yaml.CSafeLoader) if document)
        except yaml.YAMLError as error:
            raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from None
        for document in documents:
            if not isinstance(document, dict) or "kind" not in document or "name" not in document.get("metadata", {}):
                raise ValueError(f"expected manifests with kind and metadata.name, got {str(document)[:80]!r}")
        if not documents:
            raise ValueError("expected manifests, got nothing")
        return cls(documents)

    def of(self, *kinds: str) -> list[Manifest]:
        return [document for document in self.documents if document["kind"] in kinds]

    def names(self, kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in self.of(kind)}

    @property
    def workloads(self) -> list[Manifest]:
        return self.of("Deployment", "StatefulSet", "Job")

    @property
    def servers(self) -> list[Manifest]:
        """The Deployments that segment."""
        return [w for w in self.of("Deployment") if any(c["name"] == "server" for c in running_of(pod_of(w)))]

    def selected_by(self, selector: Mapping[str, Any]) -> list[Manifest]:
        """Workloads whose pods a label selector matches."""
        return [w for w in self.workloads if matches(selector, labels_of(w))]

    def serving(self, server: Manifest) -> ServingConfig | None:
        """How a Deployment's model is served, if its ConfigMap is among the manifests.

        Raises:
            ValueError: a field of serving.yml is unknown or wrong.
        """
        for volume in pod_of(server).get("volumes", []):
            for config in self.of("ConfigMap"):
                if config["metadata"]["name"] == volume.get("configMap", {}).get("name"):
                    text = config.get("data", {}).get("serving.yml")
                    if text is not None:
                        return ServingConfig.from_mapping(yaml.safe_load(text) or {})
        return None


def pod_of(workload: Manifest) -> Mapping[str, Any]:
    pod: Mapping[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def labels_of(workload: Manifest) -> Mapping[str, str]:
    labels: Mapping[str, str] = workload["spec"]["template"]["metadata"].get("labels", {})
    return labels


def containers_of(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def running_of(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Containers and sidecars, which are init containers that are started again when they end."""
    sidecars = [c for c in pod.get("initContainers", []) if c.get("restartPolicy") == "Always"]
    return [*sidecars, *pod["containers"]]


def server_of(workload: Manifest) -> Mapping[str, Any]:
    return next(container for container in running_of(pod_of(workload)) if container["name"] == "server")


def edge_of(workload: Manifest) -> Mapping[str, Any] | None:
    """What of `components/edge` is in front of the server; None where clients ask it itself."""
    return next((container for container in running_of(pod_of(workload)) if container["name"] == "edge"), None)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        found = labels.get(expression["key"])
        holds = {
            "In": found in expression.get("values", []),
            "NotIn": found not in expression.get("values", []),
            "Exists": found is not None,
            "DoesNotExist": found is None,
        }
        if not holds[expression["operator"]]:
            return False
    return True


def quantity(value: object) -> Decimal:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it is none.
    """
    found = _QUANTITY.fullmatch(str(value))
    if not found:
        raise ValueError(f"expected a quantity such as 500m, 2 or 16Gi, got {value!r}")
    number, suffix = found[1], found[2] or ""
    return Decimal(number) * _SUFFIXES[suffix] if suffix in _SUFFIXES else Decimal(f"{number}{suffix}")


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"
