"""Overlays and components render, fit the schemas of two versions of Kubernetes, and say what they are meant to."""

import functools
import json
import math
import os
import re
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from debian_tools import MissingToolError, find_tool
from kubernetes_validate import utils
from prometheus_client import CollectorRegistry
from rendering import COMPONENTS, K8S, OVERLAYS, ROOT, manifests, render, render_overlay, render_with

from handlers.cli import main
from handlers.observe.metrics import Metrics
from k8s.check import problems
from k8s.generate import PROMETHEUS_RULE, prometheus_rule
from k8s.manifests import Manifest, Manifests, pod_of, running_of, server_of
from k8s.monitoring.boards import BOARDS
from k8s.monitoring.grafana import RUNBOOK_UID

KUBERNETES = ("1.32", "1.37")  # the oldest that we take care of, and the newest whose schemas are at hand
CUSTOM = (
    "BackendTrafficPolicy",
    "GRPCRoute",
    "Gateway",
    "HTTPRoute",
    "InferenceService",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "SecurityPolicy",
    "ServingRuntime",
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
        ("h100-sxm-shared", "nvidia.com/gpu", "5", ["NVIDIA-H100-80GB-HBM3-SHARED"], 4, 1024),
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


def test_requests_of_cores_rest_on_what_was_measured() -> None:
    """The README's tables, from the figures of engines side by side."""
    measured = json.loads((ROOT / "mpm_ops" / "bench" / "h200.json").read_text())["sections"]
    (section,) = [each for each in measured if each["kind"] == "engines" and each["size"] == "Ti"]
    rates = {
        run["processes"]: run["pictures_per_second"]
        for run in section["engines"]
        if run["network"] == "real" and run["source"] == "jpeg"
    }
    text = (K8S / "README.md").read_text()

    def row(title: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if re.match(rf"\| {title} \|", line)]
        return [cell.strip() for cell in line.split("|")[2:-1]]

    assert row("engines") == [str(number) for number in rates]
    assert row("pictures per second") == [f"{rate:,.0f}" for rate in rates.values()]
    assert row("of each") == [f"{rate / number:.0f}" for number, rate in rates.items()]
    core_ms = 1000 * section["cpus"] / rates[4]
    assert f"{core_ms:.1f} ms" in text
    cores = [float(cell.removesuffix(" cores")) for cell in row(r"engine: rate . 6\.6 ms")]
    fed = [float(cell) for cell in row("pictures per second that it feeds")]
    assert fed[0] == pytest.approx(rates[1], abs=1)
    assert fed[2] == pytest.approx(rates[4] / 4, abs=1)
    assert cores == [pytest.approx(rate * core_ms / 1000, abs=0.06) for rate in fed]
    asked = [int(cell.strip("*")) for cell in row(r"\*\*request\*\*")]
    assert all(request >= engine + 0.5 for request, engine in zip(asked, cores, strict=True))
    for overlay, request in zip(("h100-sxm", "h100-pcie", "h100-sxm-shared", "h100-mig-1g.10gb"), asked, strict=True):
        (deployment,) = manifests(f"overlays/{overlay}/triton").servers
        assert server_of(deployment)["resources"]["requests"]["cpu"] == str(request)


def test_a_shared_gpu_is_what_the_plugin_makes_of_it() -> None:
    (config,) = yaml.safe_load_all((K8S / "overlays/h100-sxm-shared/device-plugin.yaml").read_text())
    kubernetes_validate.validate(config, KUBERNETES[0], strict=True)
    text = (K8S / "README.md").read_text()
    assert f'"config": {{"name": "{config["metadata"]["name"]}"}}' in text
    (name,) = config["data"]
    assert f"nvidia.com/device-plugin.config={name}" in text
    (sharing,) = yaml.safe_load(config["data"][name])["sharing"].items()
    (deployment,) = manifests("overlays/h100-sxm-shared/triton").servers
    terms = pod_of(deployment)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    labels = {e["key"]: e["values"] for e in terms["nodeSelectorTerms"][0]["matchExpressions"]}
    assert (sharing[0], labels["nvidia.com/gpu.sharing-strategy"]) == ("timeSlicing", ["time-slicing"])
    assert sharing[1]["failRequestsGreaterThanOne"]
    assert sharing[1]["resources"] == [{"name": "nvidia.com/gpu", "replicas": 4}]
    config_of_pods = manifests("overlays/h100-sxm-shared/triton").serving(deployment)
    assert config_of_pods is not None
    assert 4 * int(config_of_pods.graph_mib) < 80 * 2**10 / 4, "a GPU's memory, of which networks need the rest"


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
def test_clients_reach_the_edge_and_not_its_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a canary too, and with other names, after which it has to come; the command takes its arguments."""
    lines = [f"resources: [../h100-sxm/{server}, ../../base/canary/{server}]", "namespace: vision"]
    lines += ["configMapGenerator:", "- {name: names, literals: [namespace=vision, model=roads, grafana=https://a]}"]
    lines += ["components: [../h100-sxm/node, ../../components/names, ../../components/edge]"]
    found = Manifests.parse(render_overlay("\n".join(lines)))
    assert problems(found) == []
    for deployment in found.servers:
        pod = pod_of(deployment)
        (edge,) = pod["containers"]
        assert pod["initContainers"][-1]["name"] == "server"
        assert pod["initContainers"][-1]["restartPolicy"] == "Always"
        assert edge["image"] == pod["initContainers"][-1]["image"] == f"mpm-segmenter-{server}"
        named = {port["name"]: c["name"] for c in running_of(pod) for port in c["ports"]}
        assert named["http"] == "edge"
        assert "grpc" not in named
    services = [port["name"] for service in found.of("Service") for port in service["spec"]["ports"]]
    assert services == ["http", "http"]
    (monitor,) = found.of("PodMonitor")
    assert "edge-metrics" in {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    listened: list[tuple[str, int]] = []

    def serve(coroutine: Coroutine[Any, Any, None]) -> None:
        coroutine.close()

    monkeypatch.setattr("handlers.launch.processes.listen", lambda *address: listened.append(address))
    monkeypatch.setattr("asyncio.run", serve)
    assert main([*edge["command"][1:], *edge["args"]]) == 0
    assert listened == [("0.0.0.0", port["containerPort"]) for port in edge["ports"]]


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
    overlay = overlay.replace("$IMAGE", "registry.corp.net/mpm").replace("${DIGEST#*@}", f"sha256:{'0a' * 32}")
    left = "\n".join(problems(Manifests.parse(render_overlay(overlay)), release=True))
    assert re.findall("got '(.*)'", left) == ["YOUR-GATEWAY", "YOUR-GATEWAY-S", "segmenter.example.com"]
    overlay = overlay.replace("example.com", "corp.net").replace("YOUR-GATEWAY", "edge").replace("edge-S", "edge")
    names = names.replace("example.com", "corp.net")
    components, _, patch = model.replace("2,5", "3,6").partition("patches:\n")
    found = Manifests.parse(render_overlay(f"{components}{overlay}\n{patch}"))
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
def queries() -> list[str]:
    """Of the work that waits, and of the replicas in use."""
    (scaler,) = manifests("overlays/h100-sxm/torchserve").of("ScaledObject")
    return [str(trigger["metadata"]["query"]) for trigger in scaler["spec"]["triggers"]]


def test_both_autoscalers_ask_the_same() -> None:
    values = yaml.safe_load((K8S / "components" / "hpa" / "prometheus-adapter.yml").read_text())
    (scaler,) = Manifests.parse(render_with("hpa")).of("HorizontalPodAutoscaler")
    (keda,) = manifests("overlays/h100-sxm/torchserve").of("ScaledObject")
    of_both = zip(values["rules"]["external"], scaler["spec"]["metrics"], keda["spec"]["triggers"], strict=True)
    for rule, metric, trigger in of_both:
        asked = metric["external"]
        labels = {"namespace": scaler["metadata"]["namespace"]} | asked["metric"]["selector"]["matchLabels"]
        matchers = ", ".join(f'{name}="{value}"' for name, value in labels.items())
        assert rule["metricsQuery"].replace("<<.LabelMatchers>>", matchers) == trigger["metadata"]["query"]
        assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}}, "where matchers come from"
        assert asked["metric"]["name"] == rule["name"]["as"]
        assert asked["target"]["averageValue"] == f"{1000 * float(trigger['metadata']['threshold']):.0f}m"
    ours = keda["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert ours == scaler["spec"]["behavior"]


def test_their_metrics_are_exported(queries: list[str]) -> None:
    registry: CollectorRegistry = Metrics("segmenter", grid=32, info={"schedule": "2,5"}).registry
    exported = {sample.name for family in registry.collect() for sample in family.samples}
    exported |= {f"{family.name}_total" for family in registry.collect() if family.type == "counter"}
    named = set(re.findall(r"mpm_\w+", " ".join(queries)))
    assert named == {"mpm_waiting_tokens", "mpm_capacity_tokens_per_second", "mpm_tokens_total"}
    assert named <= exported


def test_they_count_seconds_that_wait_and_replicas_in_use(queries: list[str], tmp_path: Path) -> None:
    """Evaluated by Prometheus: two busy replicas, an idle one that never computed, a canary; no work yet; nobody; and
    capacities that are no numbers, all or one of them."""
    try:
        promtool = find_tool("promtool")
    except MissingToolError as error:
        pytest.skip(str(error))

    def series(pod: str, waiting: float, per_second: float, capacity: float, track: str = "stable") -> list[Any]:
        labels = f'namespace="segmenter", track="{track}", pod="{pod}", model="segmenter"'
        counted = f'{{{labels}, point="in", stage="0"}}'
        return [
            {"series": f"mpm_waiting_tokens{{{labels}}}", "values": f"{waiting}x20"},
            {"series": f"mpm_capacity_tokens_per_second{{{labels}}}", "values": f"{capacity}x20"},
            {"series": f"mpm_tokens_total{counted}", "values": f"0+{15 * per_second}x20"},
            {"series": f"mpm_tokens_total{counted.replace('in', 'out')}", "values": "0+9000000x20"},
        ]

    def case(input_series: list[Any], *expected: float) -> dict[str, Any]:
        asked = [
            {"expr": query, "eval_time": "4m", "exp_samples": [{"labels": "{}", "value": value}] if expected else []}
            for query, value in zip(queries, expected or (0, 0), strict=True)
        ]
        return {"interval": "15s", "input_series": input_series, "promql_expr_test": asked}

    busy = series("a", 20_000, 90_000, 100_000) + series("b", 60_000, 110_000, 100_000) + series("c", 0, 0, 0)
    busy += series("d", 9_000_000, 9_000_000, 1, "canary")
    unknown = series("a", 20_000, 90_000, math.nan)
    tests = [
        case(busy, 0.8, 2),
        case(series("a", 0, 0, 0), 0, 0),
        case([]),
        case(unknown),
        case(series("a", 0, 0, 0) + series("b", 0, 0, math.nan)),
        case(busy + series("e", 0, 0, math.nan), 0.8, 2),
        case(series("a", math.nan, 0, 100_000) + series("b", 1, 0, 100_000))
        | {"promql_expr_test": [{"expr": queries[0], "eval_time": "4m", "exp_samples": []}]},
    ]
    text = yaml.safe_dump({"tests": tests})
    (tmp_path / "tests.yml").write_text(re.sub(r"(0\+)?nanx20", " ".join(["NaN"] * 21), text))
    done = subprocess.run(
        [str(promtool), "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
