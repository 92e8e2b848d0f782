"""The manifests of a distributed load test, as kubectl renders them."""

import os
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPONENT = Path(__file__).resolve().parents[2] / "k8s" / "components" / "loadtest"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: segmenter\n"
        f"components: [{os.path.relpath(COMPONENT, folder.resolve())}]\n"
    )
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        env={**os.environ, "KUBECONFIG": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert rendered.returncode == 0, rendered.stderr
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(rendered.stdout)}


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return spec


def arguments(manifest: dict[str, Any]) -> dict[str, str]:
    """Options of the job's command."""
    return {name: value for name, _, value in (each.partition("=") for each in pod(manifest)["containers"][0]["args"])}


@pytest.mark.parametrize("job", ["loadtest", "loadtest-worker"])
def test_locust_takes_the_arguments(manifests: dict[tuple[str, str], dict[str, Any]], job: str) -> None:
    container = pod(manifests["Job", job])["containers"][0]
    assert container["command"] == ["mpm", "loadtest", "run"]
    listed = subprocess.run(
        [sys.executable, *container["command"][1:], *container["args"], "--list"], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert "SegmentUser" in listed.stdout


def test_as_many_workers_are_expected_as_come(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    workers = manifests["Job", "loadtest-worker"]["spec"]
    found = arguments(manifests["Job", "loadtest"])
    assert int(found["--expect-workers"]) == workers["parallelism"] == workers["completions"]
    assert "--master" in found


def test_a_service_can_spread_the_load(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = arguments(manifests["Job", "loadtest"])
    assert found["--connection-seconds"] == "0"
    host = str(urllib.parse.urlsplit(found["--metrics"]).hostname)
    assert manifests["Service", host]["spec"]["clusterIP"] == "None"  # all pods


def test_workers_find_the_master(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    service = manifests["Service", "loadtest-master"]
    labels = manifests["Job", "loadtest"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    found = arguments(manifests["Job", "loadtest-worker"])
    assert found["--master-host"] == "loadtest-master"
    assert "--worker" in found
    assert service["spec"]["ports"][0]["port"] == 5557  # locust's own


@pytest.mark.parametrize("job", ["loadtest", "loadtest-worker"])
def test_nothing_is_allowed_that_is_not_needed(manifests: dict[tuple[str, str], dict[str, Any]], job: str) -> None:
    spec = pod(manifests["Job", job])
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (mount,) = container["volumeMounts"]
    assert container["workingDir"] == mount["mountPath"]  # where pictures are painted
    assert manifests["Job", job]["spec"]["activeDeadlineSeconds"] <= 3600
