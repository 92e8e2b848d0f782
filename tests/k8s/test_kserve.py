"""KServe's runtime is the server of the other overlays, and its model scales by the same signal."""

import json
import shlex
from typing import Any

import promql_parser as promql
import pytest
from rendering import manifests, render_overlay

from handlers.cli import serve
from k8s.check import is_single_series, problems
from k8s.manifests import Manifest, Manifests, pod_of, quantity, server_of
from model_store.cli import build

FOUND = "overlays/kserve"
OWN = ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "securityContext", "resources", "ports")


def only(kind: str) -> Manifest:
    (found,) = manifests(FOUND).of(kind)
    return found


@pytest.fixture(scope="module")
def other() -> Manifest:
    """The Deployment of Triton on the same GPUs."""
    (deployment,) = manifests("overlays/h100-sxm/triton").servers
    return deployment


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    """As KServe makes it for the model: it fills in the name, wherever it stands."""
    (found,) = only("ServingRuntime")["spec"]["containers"]
    filled: dict[str, Any] = json.loads(
        json.dumps(found).replace("{{.Name}}", only("InferenceService")["metadata"]["name"])
    )
    return filled


@pytest.mark.parametrize("field", OWN)
def test_the_container_is_the_server(container: dict[str, Any], other: Manifest, field: str) -> None:
    ours = server_of(other)[field]
    if field == "resources":
        ours = {kind: {k: v for k, v in amounts.items() if k != "ephemeral-storage"} for kind, amounts in ours.items()}
    assert container[field] == ours


def test_it_builds_and_serves_with_the_same_arguments(container: dict[str, Any], other: Manifest) -> None:
    shell, options, script = container["command"]
    assert (shell, options) == ("sh", "-ec")
    building, serving = (shlex.split(line) for line in script.replace("\\\n", "").strip().splitlines())
    assert building[:2] == ["mpm", "build"]
    assert serving[:3] == ["exec", "mpm", "serve"], "what is told to end has to be the launcher"
    (model,) = [c for c in pod_of(other)["initContainers"] if c["name"] == "model"]
    assert set(building[2:]) - {"--alone"} == {w.replace("/checkpoint/", "/mnt/models/") for w in model["args"]}
    assert serving[4:] == server_of(other)["args"]
    assert build.make_context("build", building[2:]).params["alone"]
    assert serve.make_context("serve", serving[3:]).params["no_edge"]


def test_it_has_the_volumes_and_the_nodes(container: dict[str, Any], other: Manifest) -> None:
    spec, pod = only("ServingRuntime")["spec"], pod_of(other)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    config = volumes.pop("serving")["configMap"]["name"]
    assert config.startswith("serving-"), "with the hash of its content"
    assert config in manifests(FOUND).names("ConfigMap")
    assert volumes == {v["name"]: v for v in pod["volumes"] if v["name"] in volumes}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {m["mountPath"] for m in server_of(other)["volumeMounts"]} | {"/config"}
    assert spec["affinity"] == pod["affinity"]
    assert spec["tolerations"][-1] in pod["tolerations"]


def test_the_model_asks_for_the_runtime_and_rolls_as_the_others(other: Manifest) -> None:
    predictor, runtime = only("InferenceService")["spec"]["predictor"], only("ServingRuntime")
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [
        {k: v for k, v in each.items() if k != "autoSelect"} for each in runtime["spec"]["supportedModelFormats"]
    ]
    assert model["modelFormat"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert predictor["deploymentStrategy"] == other["spec"]["strategy"]
    for field in ("securityContext", "terminationGracePeriodSeconds", "serviceAccountName", "priorityClassName"):
        assert predictor[field] == pod_of(other)[field]
    assert predictor["timeout"] >= 60


def test_its_replicas_follow_their_use() -> None:
    predictor = only("InferenceService")["spec"]["predictor"]
    (scaler,) = manifests("overlays/h100-sxm/triton").of("ScaledObject")
    use = scaler["spec"]["triggers"][1]["metadata"]
    (metric,) = [each["external"] for each in predictor["autoScaling"]["metrics"]]
    assert metric["metric"]["query"] == use["query"].replace(', track="stable"', "")
    assert metric["metric"]["serverAddress"] == use["serverAddress"]
    assert is_single_series(promql.parse(metric["metric"]["query"]))
    assert metric["target"] == {"type": "Value", "value": use["threshold"]}
    ours = scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert predictor["autoScaling"]["behavior"] == ours
    hard = only("ResourceQuota")["spec"]["hard"]
    assert quantity(hard["requests.nvidia.com/gpu"]) > predictor["maxReplicas"]


def test_its_image_is_pinned_as_the_others() -> None:
    pin = f"{{name: mpm-segmenter-triton, newName: registry.corp.net/mpm, digest: 'sha256:{'0a' * 32}'}}"
    (runtime,) = Manifests.parse(render_overlay(f"resources: [../kserve]\nimages: [{pin}]")).of("ServingRuntime")
    assert runtime["spec"]["containers"][0]["image"] == f"registry.corp.net/mpm@sha256:{'0a' * 32}"


def test_a_monitor_of_another_model_is_found() -> None:
    text = json.dumps([*manifests(FOUND).documents]).replace(
        'inferenceservice": "segmenter"', 'inferenceservice": "a"'
    )
    found = problems(Manifests(tuple(json.loads(text))))
    assert found == ["selectors: PodMonitor/mpm: selector: matches no pod"]
