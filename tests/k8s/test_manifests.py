"""Overlays and components render, fit the schemas of two versions of Kubernetes, and say what they are meant to."""

import functools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils
from prometheus_client import CollectorRegistry
from rendering import COMPONENTS, K8S, OVERLAYS, ROOT, manifests, render, render_overlay, render_with

from handlers.monitoring.binaries import MissingToolError, find_tool
from handlers.monitoring.boards import BOARDS
from handlers.monitoring.grafana import RUNBOOK_UID
from handlers.observe.metrics import Metrics
from k8s.check import problems
from k8s.generate import PROMETHEUS_RULE, prometheus_rule
from k8s.manifests import Manifest, Manifests, pod_of, server_of

KUBERNETES = ("1.32", "1.37")  # the oldest that we take care of, and the newest whose schemas are at hand
CUSTOM = (
    "BackendTrafficPolicy",
    "Gateway",
    "HTTPRoute",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "SecurityPolicy",
)
CRDS = Path(os.environ.get("MPM_CRDS", ROOT.parent / "shared" / "facts" / "crds"))


@pytest.fixture(scope="module", autouse=True)
def _schemas_are_read_once() -> None:
    utils.schema_contents = functools.cache(utils.schema_contents)  # tens of megabytes of JSON at each validation


@pytest.fixture(scope="module")
def documents() -> list[Manifest]:
    """All that overlays and components render to, each once."""
    texts = [*map(render, OVERLAYS), *map(render_with, COMPONENTS)]
    found = [document for text in texts for document in Manifests.parse(text).documents]
    return list({json.dumps(document, sort_keys=True): document for document in found}.values())


@pytest.mark.parametrize("version", KUBERNETES)
def test_everything_fits_its_schema(documents: list[Manifest], version: str) -> None:
    validated = set()
    for document in documents:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(dict(document), version, strict=True)
            validated.add(document["kind"])
    assert len(validated) > 10


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_resources_fit_their_schemas(documents: list[Manifest], kind: str) -> None:
    mine = [document for document in documents if document["kind"] == kind]
    assert mine
    for document in mine:
        path = CRDS / f"{kind.lower()}_{document['apiVersion'].partition('/')[2]}.json"
        if not path.is_file():
            pytest.skip(f"no schema of {kind} in {CRDS}; set MPM_CRDS")
        jsonschema.Draft202012Validator(_schema(path)).validate(document)


@functools.cache
def _schema(path: Path) -> Any:
    return json.loads(path.read_text()) | {"additionalProperties": False}


def test_schemas_notice(documents: list[Manifest]) -> None:
    """An unknown field, deep inside, is an error in either kind of schema."""
    deployment = yaml.safe_load(json.dumps(next(d for d in documents if d["kind"] == "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="livenessprobe"):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)
    path = CRDS / "scaledobject_v1alpha1.json"
    if not path.is_file():
        pytest.skip(f"no schema of ScaledObject in {CRDS}; set MPM_CRDS")
    scaler = yaml.safe_load(json.dumps(next(d for d in documents if d["kind"] == "ScaledObject")))
    scaler["spec"]["minReplicas"] = 2
    with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
        jsonschema.Draft202012Validator(_schema(path)).validate(scaler)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_have_no_problem(overlay: str) -> None:
    assert problems(manifests(overlay)) == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_have_no_problem(component: str) -> None:
    assert problems(Manifests.parse(render_with(component))) == []


@pytest.mark.parametrize(
    ("overlay", "resource", "cpu", "products", "codec_threads", "inflight_mib"),
    [
        ("h100-sxm", "nvidia.com/gpu", "8", ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3-SHARED"], 6, 2048),
        ("h100-pcie", "nvidia.com/gpu", "6", ["NVIDIA-H100-PCIe", "NVIDIA-H100-PCIe-SHARED"], 6, 2048),
        ("h100-nvl", "nvidia.com/gpu", "8", ["NVIDIA-H100-NVL", "NVIDIA-H100-NVL-SHARED"], 6, 2048),
        ("h100-mig-1g.10gb", "nvidia.com/mig-1g.10gb", "2", ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"], 2, 512),
    ],
)
@pytest.mark.parametrize("server", ["torchserve", "triton"])
def test_overlays_differ_as_they_should(
    overlay: str, server: str, resource: str, cpu: str, products: list[str], codec_threads: int, inflight_mib: int
) -> None:
    """A patch that another one overrides renders without a word."""
    found = manifests(f"overlays/{overlay}/{server}")
    (deployment,) = found.servers
    requests = server_of(deployment)["resources"]["requests"]
    assert requests["cpu"] == cpu
    assert [name for name in requests if name.startswith("nvidia.com")] == [resource]
    affinity = pod_of(deployment)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert affinity["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == products
    config = found.serving(deployment)
    assert config is not None
    assert (config.codec_threads, config.max_inflight_mib) == (codec_threads, inflight_mib)
    assert deployment["metadata"]["labels"]["app.kubernetes.io/component"] == server


def test_a_changed_setting_rolls_the_pods() -> None:
    configs = {}
    for overlay in ("overlays/h100-sxm/triton", "overlays/h100-mig-1g.10gb/triton"):
        (deployment,) = manifests(overlay).servers
        (name,) = {v["configMap"]["name"] for v in pod_of(deployment)["volumes"] if "configMap" in v}
        configs[overlay] = name
    assert len(set(configs.values())) == 2


def test_a_canary_is_a_server_of_its_own_beside_the_same_route() -> None:
    found = manifests("overlays/h100-sxm/canary")
    stable, canary = found.servers
    assert (stable["metadata"]["name"], canary["metadata"]["name"]) == ("segmenter", "segmenter-canary")
    args = [next(c for c in pod_of(each)["initContainers"] if c["name"] == "model")["args"] for each in found.servers]
    assert [set(mine) - set(theirs) for mine, theirs in (args, args[::-1])] == [{"--schedule=2,5"}, {"--schedule=4,8"}]
    (route,) = found.of("HTTPRoute")
    weights = {backend["name"]: backend["weight"] for backend in route["spec"]["rules"][0]["backendRefs"]}
    assert weights == {"segmenter": 100, "segmenter-canary": 0}


def test_a_shadow_gets_copies_and_answers_nobody() -> None:
    (route,) = Manifests.parse(render_with("shadow")).of("HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert [backend["name"] for backend in rule["backendRefs"]] == ["segmenter"]
    encoding, mirror = rule["filters"]
    assert encoding["requestHeaderModifier"] == {"remove": ["Content-Encoding"]}
    assert mirror["requestMirror"]["backendRef"]["name"] == "segmenter-canary"


@pytest.mark.parametrize("server", ["torchserve", "triton"])
def test_another_namespace_and_name(server: str) -> None:
    """They are all that is left; what keeps the name `segmenter` lies in the namespace."""
    text = render_with("names", server)
    assert problems(Manifests.parse(text)) == []
    found = Manifests.parse(text)
    assert found.names("Namespace") == found.names("PriorityClass") == {"vision"}
    assert found.names("ValidatingAdmissionPolicyBinding") == {"vision-image-digests"}
    assert "names" not in found.names("ConfigMap"), "it is for kustomize alone"
    texts = [line for line in text.splitlines() if "app.kubernetes.io/name" not in line]
    assert not [
        line for line in texts if re.search(r"(--name=|/predictions/|/v2/models/|namespace=\")segmenter", line)
    ]
    (rule,) = found.of("PrometheusRule")
    links = [alert["annotations"]["runbook_url"] for alert in rule["spec"]["groups"][1]["rules"]]
    assert all(link.startswith("https://grafana.example.com/d/") for link in links)


def test_a_namespace_that_is_only_half_changed_is_found() -> None:
    found = problems(Manifests.parse(render_overlay("namespace: vision\nresources: [../h100-sxm/torchserve]")))
    for kind in ("ScaledObject", "PriorityClass", "ValidatingAdmissionPolicyBinding"):
        assert any(line.startswith(f"names: {kind}") for line in found), found


def test_no_server_is_more_than_its_port_from_the_management() -> None:
    """Both launchers keep management on loopback, whatever --host says; nothing in the manifests opens it."""
    for overlay in OVERLAYS:
        for server in manifests(overlay).servers:
            words = " ".join(server_of(server)["args"])
            assert set(re.findall(r"--([\w-]*(?:host|port))=", words)) <= {
                "host",
                "port",
                "grpc-port",
                "triton-metrics-port",
            }


def test_the_example_of_the_readme_renders_and_may_be_released() -> None:
    text = (K8S / "README.md").read_text()
    (overlay,) = re.findall(r"<<END\n(.*?)\nEND\n", text, re.DOTALL)
    model, names = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    overlay = overlay.replace("$IMAGE", "registry.example.com/mpm").replace("${DIGEST#*@}", f"sha256:{'0a' * 32}")
    found = Manifests.parse(render_overlay(f"{overlay}\n{model.replace('2,5', '3,6')}"))
    assert problems(found, release=True) == []
    (server,) = found.servers
    assert [c["name"] for c in pod_of(server)["initContainers"]] == ["cache", "model"]
    assert "--schedule=3,6" in pod_of(server)["initContainers"][1]["args"]
    assert any("persistentVolumeClaim" in volume for volume in pod_of(server)["volumes"])
    other = Manifests.parse(render_overlay(overlay.replace("namespace: segmenter\n", "") + f"\n{names}"))
    assert problems(other, release=True) == []
    assert other.names("Namespace") == {"vision"}


# What is made from other files


def test_the_rules_are_those_of_the_alerts() -> None:
    assert PROMETHEUS_RULE.read_text() == prometheus_rule(), "run `python -m k8s.generate`"
    (rule,) = manifests("overlays/h100-sxm/torchserve").of("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((K8S / "monitoring" / "rules.yml").read_text())


def test_every_board_is_in_the_dashboards() -> None:
    found = manifests("overlays/h100-sxm/torchserve").of("ConfigMap")
    (config,) = [config for config in found if config["metadata"]["name"] == "mpm-dashboards"]
    assert set(config["data"]) == {f"{uid}.json" for uid in (RUNBOOK_UID, *(board.uid for board in BOARDS))}
    for name, text in config["data"].items():
        assert text == (K8S / "monitoring" / "dashboards" / name).read_text()
    assert sum(map(len, config["data"].values())) < 2**19, "a ConfigMap holds a megabyte"


def test_the_rules_find_the_monitor_s_job() -> None:
    (monitor,) = manifests("overlays/h100-sxm/torchserve").of("PodMonitor")
    job = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
    patterns = set(re.findall(r'job=~"(.*?)"', (K8S / "monitoring" / "rules.yml").read_text()))
    assert patterns
    assert all(re.fullmatch(pattern, job) for pattern in patterns)


# The signal that scales


@pytest.fixture(scope="module")
def query() -> str:
    (scaler,) = manifests("overlays/h100-sxm/torchserve").of("ScaledObject")
    return str(scaler["spec"]["triggers"][0]["metadata"]["query"])


def test_both_autoscalers_ask_the_same(query: str) -> None:
    values = yaml.safe_load((K8S / "components" / "hpa" / "prometheus-adapter.yml").read_text())
    (rule,) = values["rules"]["external"]
    (scaler,) = Manifests.parse(render_with("hpa")).of("HorizontalPodAutoscaler")
    metric = scaler["spec"]["metrics"][0]["external"]
    labels = {"namespace": scaler["metadata"]["namespace"]} | metric["metric"]["selector"]["matchLabels"]
    matchers = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    assert rule["metricsQuery"].replace("<<.LabelMatchers>>", matchers) == query
    assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}}, "what the matchers come from"
    assert metric["metric"]["name"] == rule["name"]["as"]
    (trigger,) = manifests("overlays/h100-sxm/torchserve").of("ScaledObject")[0]["spec"]["triggers"]
    assert metric["target"]["averageValue"] == f"{1000 * float(trigger['metadata']['threshold']):.0f}m"


def test_its_metrics_are_exported(query: str) -> None:
    registry: CollectorRegistry = Metrics("segmenter", grid=32, info={"schedule": "2,5"}).registry
    exported = {sample.name for family in registry.collect() for sample in family.samples}
    named = set(re.findall(r"mpm_\w+", query))
    assert named == {"mpm_waiting_tokens", "mpm_capacity_tokens_per_second"}
    assert named <= exported


def test_it_counts_the_seconds_of_work_that_wait(query: str, tmp_path: Path) -> None:
    """Evaluated by Prometheus: two busy replicas, an idle one that never computed, a canary; nothing; and nobody."""
    try:
        promtool = find_tool("promtool")
    except MissingToolError as error:
        pytest.skip(str(error))

    def series(name: str, pod: str, value: float, track: str = "stable") -> dict[str, str]:
        labels = f'namespace="segmenter", track="{track}", pod="{pod}", model="segmenter"'
        return {"series": f"{name}{{{labels}}}", "values": f"{value}x20"}

    def case(input_series: list[dict[str, str]], expected: list[float]) -> dict[str, Any]:
        samples = [{"labels": "{}", "value": value} for value in expected]
        asked = {"expr": query, "eval_time": "4m", "exp_samples": samples}
        return {"interval": "15s", "input_series": input_series, "promql_expr_test": [asked]}

    waiting, capacity = "mpm_waiting_tokens", "mpm_capacity_tokens_per_second"
    busy = [series(waiting, "a", 20_000), series(waiting, "b", 60_000), series(waiting, "c", 0)]
    busy += [series(capacity, "a", 100_000), series(capacity, "b", 100_000), series(capacity, "c", 0)]
    busy += [series(waiting, "d", 9_000_000, "canary"), series(capacity, "d", 1, "canary")]
    new = [series(waiting, "a", 0), series(capacity, "a", 0)]
    tests = {"tests": [case(busy, [0.8]), case(new, [0.0]), case([], [])]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [str(promtool), "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
