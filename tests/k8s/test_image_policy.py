"""The policy for images, evaluated as the API server does: on what it matches, whatever holds pods."""

from typing import Any

import pytest
import yaml
from rendering import K8S, manifests

cel = pytest.importorskip("cel")

PINNED = f"registry.corp.net/mpm@sha256:{'0a' * 32}"
POLICY = yaml.safe_load((K8S / "components/image-digests/validatingadmissionpolicy.yaml").read_text())["spec"]


def admits(new: dict[str, Any], old: dict[str, Any] | None = None) -> bool:
    """Whether an object passes, created or in the place of an old one."""
    context = {"object": new, "oldObject": old or {}, "request": {"operation": "UPDATE" if old else "CREATE"}}
    if not all(cel.evaluate(condition["expression"], context) for condition in POLICY["matchConditions"]):
        return True
    values: dict[str, Any] = {}
    for variable in POLICY["variables"]:
        values[variable["name"]] = cel.evaluate(variable["expression"], context)
    return all(cel.evaluate(each["expression"], context | {"variables": values}) for each in POLICY["validations"])


def held(kind: str, pod: dict[str, Any]) -> dict[str, Any]:
    """An object of a kind that holds a pod."""
    spec = pod if kind == "Pod" else {"template": {"spec": pod}}
    if kind == "CronJob":
        spec = {"schedule": "* * * * *", "jobTemplate": {"spec": spec}}
    return {"kind": kind, "metadata": {"name": "a"}, "spec": spec}


@pytest.mark.parametrize("kind", ["Pod", "Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob"])
def test_every_image_of_every_kind_is_pinned(kind: str) -> None:
    good = {"containers": [{"image": PINNED}], "volumes": [{"emptyDir": {}}, {"image": {"reference": PINNED}}]}
    assert admits(held(kind, good))
    for image in ("mpm", "mpm:1", "mpm@sha256:zz", f"{PINNED}0", f"mpm:latest#{PINNED[4:]}@", PINNED.upper()):
        for containers in ("containers", "initContainers", "ephemeralContainers"):
            assert not admits(held(kind, good | {containers: [{"image": PINNED}, {"image": image}]})), image
        assert not admits(held(kind, good | {"volumes": [{"image": {"reference": image}}]}))


def test_what_was_there_may_go_and_be_counted() -> None:
    """A Deployment from before the policy: metadata may change, its deletion ends, and its images may not stay."""
    old = held("Deployment", {"containers": [{"image": "mpm:1"}]})
    assert admits(old | {"metadata": {"name": "a", "labels": {"b": "c"}}}, old)
    assert admits(old | {"metadata": {"deletionTimestamp": "now"}, "spec": {"paused": True}}, old)
    assert not admits(held("Deployment", {"containers": [{"image": "mpm:2"}]}), old)


def test_it_matches_whatever_holds_pods_and_comes_first() -> None:
    found = manifests("overlays/h100-sxm/torchserve")
    matched = {name for rule in POLICY["matchConstraints"]["resourceRules"] for name in rule["resources"]}
    assert matched == {
        *("pods", "pods/ephemeralcontainers", "replicationcontrollers", "deployments", "statefulsets", "daemonsets"),
        *("jobs", "cronjobs"),
    }
    admission = [d for d in found.documents if d["metadata"].get("labels", {}).get("app.kubernetes.io/component")]
    first = [d["kind"] for d in admission if d["metadata"]["labels"]["app.kubernetes.io/component"] == "admission"]
    assert first == ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
    assert "apply -l app.kubernetes.io/component=admission" in (K8S / "README.md").read_text()
