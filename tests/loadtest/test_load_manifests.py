"""The manifests of a distributed load test, as kubectl renders them."""

import os
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.options import make_parser

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


def test_as_many_workers_are_expected_as_come(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    arguments = make_parser().parse_args(pod(manifests["Job", "loadtest"])["containers"][0]["args"])
    workers = manifests["Job", "loadtest-worker"]["spec"]
    assert arguments.workers == workers["parallelism"] == workers["completions"]
    assert arguments.bind.endswith(":5557")


def test_a_service_can_spread_the_load(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    arguments = make_parser().parse_args(pod(manifests["Job", "loadtest"])["containers"][0]["args"])
    assert arguments.connection_seconds == 0
    (metrics,) = arguments.metrics
    assert manifests["Service", urllib.parse.urlsplit(metrics).hostname]["spec"]["clusterIP"] == "None"  # all pods


def test_workers_find_the_master(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    service = manifests["Service", "loadtest-master"]
    labels = manifests["Job", "loadtest"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (argument,) = [
        argument
        for argument in pod(manifests["Job", "loadtest-worker"])["containers"][0]["args"]
        if argument.startswith("--master=")
    ]
    assert argument == f"--master=loadtest-master:{service['spec']['ports'][0]['port']}"


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
    written = [
        argument.partition("=")[2] for argument in container["args"] if argument.startswith(("--out", "--paint"))
    ]
    assert written
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(path.startswith(f"{mounts[0]}/") for path in written)
    assert manifests["Job", job]["spec"]["activeDeadlineSeconds"] <= 3600
