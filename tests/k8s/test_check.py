"""Every check fails on manifests that are broken in its way, and says where."""

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import promql_parser as promql
import pytest
from rendering import ROOT, manifests, render, render_with

from handlers.cli import main
from k8s.check import CHECKS, digests, is_single_series, problems
from k8s.manifests import Manifests, matches, pod_of, quantity, server_of

GONE = object()
SERVER = ("spec", "template", "spec", "containers", 0)
POD = ("spec", "template", "spec")
DEPLOYMENT = "Deployment/segmenter"
BINDING = "ValidatingAdmissionPolicyBinding"
BOUND = ("spec", "matchResources", "namespaceSelector")
RULE = ("spec", "rules", 0)
MODIFIER = (*RULE, "filters", 0, "requestHeaderModifier")
TRIGGER = ("spec", "triggers", 0, "metadata")
BATCH = ("batch", "pictures", "masks")
Path = tuple[str | int, ...]


def change(text: str, edits: list[tuple[str, Path, Any]]) -> Manifests:
    """Manifests with fields replaced, by kind and name, path and value; GONE removes one."""
    documents = copy.deepcopy(Manifests.parse(text).documents)
    for name, path, value in edits:
        (node,) = [d for d in documents if f"{d['kind']}/{d['metadata']['name']}" == name]
        target: Any = node
        for step in path[:-1]:
            target = target[step]
        if value is GONE:
            del target[path[-1]]
        else:
            target[path[-1]] = value
    return Manifests(documents)


# On the H100 overlay with a canary: the check, what is broken, and what it says
BROKEN: list[tuple[str, tuple[str, Path, Any], str]] = [
    (
        "selectors",
        (DEPLOYMENT, ("spec", "template", "metadata", "labels", "track"), "other"),
        "selector: expected labels of its own pods",
    ),
    (
        "selectors",
        (DEPLOYMENT, ("spec", "selector", "matchLabels", "track"), GONE),
        "also matches the pods of Deployment/segmenter-canary",
    ),
    ("selectors", ("Service/segmenter", ("spec", "selector", "track"), GONE), "got those of 2"),
    ("selectors", ("Service/segmenter", ("spec", "selector", "track"), "old"), "got those of 0"),
    (
        "selectors",
        ("PodDisruptionBudget/segmenter", ("spec", "selector", "matchLabels", "track"), "old"),
        "matches no pod",
    ),
    ("selectors", ("PodMonitor/mpm", ("spec", "selector", "matchLabels", "track"), "old"), "matches no pod"),
    (
        "selectors",
        ("NetworkPolicy/allow-gateway", ("spec", "podSelector", "matchLabels", "track"), "old"),
        "matches no pod",
    ),
    (
        "selectors",
        (DEPLOYMENT, (*POD, "topologySpreadConstraints", 1, "labelSelector", "matchLabels", "track"), "old"),
        "topologySpreadConstraints: expected labels",
    ),
    (
        "selectors",
        (DEPLOYMENT, (*POD, "topologySpreadConstraints", 0, "matchLabelKeys"), GONE),
        "expected matchLabelKeys",
    ),
    ("namespaces", ("Service/segmenter", ("metadata", "namespace"), GONE), "got None"),
    ("namespaces", ("ScaledObject/segmenter", ("metadata", "namespace"), "keda"), "got keda"),
    (
        "names",
        ("ScaledObject/segmenter", (*TRIGGER, "query"), 'sum(a{namespace="segmenter"}) / sum(b{namespace="other"})'),
        "expected namespace='segmenter' of every metric, got 'other'",
    ),
    (
        "names",
        ("ScaledObject/segmenter", (*TRIGGER, "query"), "sum(max_over_time(a[1m]))"),
        "of every metric, got None",
    ),
    (
        "names",
        ("ScaledObject/segmenter", (*TRIGGER, "query"), 'sum(-rate(a{namespace!="segmenter"}[1m]))'),
        "of every metric, got None",
    ),
    (
        "names",
        (f"{BINDING}/segmenter-image-digests", (*BOUND, "matchLabels"), {"kubernetes.io/metadata.name": "other"}),
        "expected the namespace segmenter",
    ),
    ("names", (f"{BINDING}/segmenter-image-digests", BOUND, GONE), "expected the namespace segmenter"),
    ("names", (f"{BINDING}/segmenter-image-digests", ("spec", "policyName"), "other"), "no ValidatingAdmissionPolicy"),
    ("names", (f"{BINDING}/segmenter-image-digests", ("metadata", "name"), "image-digests"), "begin with segmenter"),
    ("names", ("PriorityClass/segmenter", ("metadata", "name"), "serving"), "expected to begin with segmenter"),
    ("names", (DEPLOYMENT, (*POD, "initContainers", 2, "args", 2), "--name=other"), "expected the model 'other'"),
    (
        "names",
        (DEPLOYMENT, (*SERVER, "livenessProbe", "exec", "command", 3), "http://127.0.0.1:8080/predictions/a"),
        "livenessProbe: expected the model 'segmenter'",
    ),
    ("quantities", (DEPLOYMENT, (*SERVER, "resources", "limits", "memory"), "16Gib"), "got '16Gib'"),
    ("quantities", (DEPLOYMENT, (*SERVER, "resources", "requests", "cpu"), "8 cores"), "got '8 cores'"),
    (
        "quantities",
        (DEPLOYMENT, (*SERVER, "resources", "requests", "memory"), "17Gi"),
        "requests 17Gi, which is above its limit of 16Gi",
    ),
    ("quantities", (DEPLOYMENT, (*POD, "volumes", 0, "emptyDir", "sizeLimit"), "4GB"), "sizeLimit: expected"),
    ("quantities", ("ResourceQuota/segmenter", ("spec", "hard", "pods"), "many"), "pods: expected a quantity"),
    ("gpus", (DEPLOYMENT, (*SERVER, "resources", "limits", "nvidia.com/gpu"), "2"), "expected the same requests"),
    ("gpus", (DEPLOYMENT, (*SERVER, "resources", "requests", "nvidia.com/gpu"), GONE), "expected the same requests"),
    ("gpus", (DEPLOYMENT, (*POD, "tolerations"), GONE), "expected one for the taint"),
    ("gpus", (DEPLOYMENT, (*POD, "affinity"), GONE), "expected nvidia.com/gpu.product In"),
    ("gpus", (DEPLOYMENT, ("spec", "strategy", "rollingUpdate", "maxSurge"), 1), "expected maxSurge 0"),
    ("gpus", (DEPLOYMENT, ("spec", "strategy", "rollingUpdate", "maxUnavailable"), 0), "expected maxSurge 0"),
    ("ports", (DEPLOYMENT, (*SERVER, "readinessProbe", "httpGet", "port"), "metric"), "readinessProbe: port 'metric'"),
    (
        "ports",
        (DEPLOYMENT, (*SERVER, "livenessProbe", "exec", "command", 3), "http://127.0.0.1:8000/v2/models/segmenter"),
        "livenessProbe: port 8000",
    ),
    ("ports", (DEPLOYMENT, (*SERVER, "ports", 0, "containerPort"), 8081), "expected http, grpc and metrics"),
    ("ports", (DEPLOYMENT, (*SERVER, "ports", 0, "hostPort"), 8080), "expected no hostPort"),
    ("ports", ("Service/segmenter", ("spec", "ports", 0, "targetPort"), "web"), "targetPort 'web'"),
    ("ports", ("PodMonitor/mpm", ("spec", "podMetricsEndpoints", 0, "port"), "prometheus"), "port 'prometheus'"),
    (
        "ports",
        ("NetworkPolicy/allow-monitoring", ("spec", "ingress", 0, "ports", 0, "port"), "metric"),
        "port 'metric'",
    ),
    (
        "ports",
        ("HTTPRoute/segmenter", ("spec", "rules", 0, "backendRefs", 1, "name"), "canary"),
        "'canary': no such Service",
    ),
    ("ports", ("HTTPRoute/segmenter", ("spec", "rules", 0, "backendRefs", 0, "port"), 8080), "it has no port 8080"),
    (
        "routes",
        ("HTTPRoute/segmenter", (*RULE, "matches", 0, "method"), "POST"),
        "match for PUT /predictions/segmenter",
    ),
    (
        "routes",
        ("HTTPRoute/segmenter", (*RULE, "matches", 1, "method"), "PUT"),
        "match for POST /predictions/segmenter",
    ),
    ("routes", ("HTTPRoute/segmenter", (*RULE, "matches", 1, "path", "value"), "/"), "match for POST /predictions"),
    (
        "routes",
        (DEPLOYMENT, (*POD, "initContainers", 2, "args", 2), "--name=other"),
        "match for PUT /predictions/other",
    ),
    ("routes", ("HTTPRoute/segmenter", (*RULE, "filters"), []), "removes Content-Encoding"),
    ("routes", ("HTTPRoute/segmenter", (*MODIFIER, "remove"), ["Accept-Encoding"]), "removes Content-Encoding"),
    ("probes", (DEPLOYMENT, (*SERVER, "startupProbe", "failureThreshold"), 3), "expected 300 s"),
    (
        "probes",
        (DEPLOYMENT, (*SERVER, "livenessProbe"), {"httpGet": {"path": "/ping", "port": "http"}}),
        "livenessProbe: expected mpm health",
    ),
    ("probes", (DEPLOYMENT, (*SERVER, "livenessProbe", "timeoutSeconds"), 20), "expected --timeout below"),
    ("probes", (DEPLOYMENT, (*SERVER, "startupProbe", "timeoutSeconds"), GONE), "startupProbe: expected --timeout"),
    ("probes", (DEPLOYMENT, (*SERVER, "livenessProbe", "exec", "command", 2), "-v"), "expected --timeout below"),
    ("probes", (DEPLOYMENT, (*SERVER, "readinessProbe", "httpGet", "port"), "http"), "expected the engine's own port"),
    ("endings", (DEPLOYMENT, (*POD, "terminationGracePeriodSeconds"), 84), r"expected 85 \(preStop 15, lame"),
    ("endings", (DEPLOYMENT, (*SERVER, "lifecycle", "preStop", "sleep", "seconds"), 5), "expected to sleep 10 s"),
    ("endings", (DEPLOYMENT, (*SERVER, "lifecycle"), GONE), "expected to sleep 10 s"),
    ("endings", ("HTTPRoute/segmenter", ("spec", "rules", 0, "timeouts", "request"), "30s"), "timeouts.request"),
    ("disruptions", ("PodDisruptionBudget/segmenter", ("spec", "maxUnavailable"), 2), "expected below 2 replicas"),
    ("disruptions", ("PodDisruptionBudget/segmenter", ("spec", "maxUnavailable"), "51%"), "expected below 2 replicas"),
    ("disruptions", ("PodDisruptionBudget/segmenter", ("spec", "maxUnavailable"), 0), "nodes can't be drained"),
    ("disruptions", ("PodDisruptionBudget/segmenter", ("spec", "maxUnavailable"), "0%"), "nodes can't be drained"),
    (
        "disruptions",
        (DEPLOYMENT, (*POD, "tolerations", 0, "tolerationSeconds"), 300),
        "unreachable for 60 s .* got 300",
    ),
    ("disruptions", (DEPLOYMENT, (*POD, "tolerations", 1), {"key": "other"}), "not-ready for 60 s .* got none"),
    ("scaling", (DEPLOYMENT, ("spec", "replicas"), 3), "replicas: expected none"),
    ("scaling", ("ScaledObject/segmenter", ("spec", "scaleTargetRef", "name"), "server"), "no Deployment 'server'"),
    ("scaling", ("ScaledObject/segmenter", ("spec", "minReplicaCount"), 9), "1 <= fewest <= most"),
    ("scaling", ("ScaledObject/segmenter", ("spec", "minReplicaCount"), 0), "1 <= fewest <= most"),
    ("scaling", ("ScaledObject/segmenter", ("spec", "fallback"), GONE), "fallback: expected one"),
    ("scaling", ("ScaledObject/segmenter", (*TRIGGER, "ignoreNullValues"), GONE), "ignoreNullValues: expected"),
    ("scaling", ("ScaledObject/segmenter", (*TRIGGER, "threshold"), "0"), "threshold: expected a number > 0"),
    ("scaling", ("ScaledObject/segmenter", (*TRIGGER, "query"), "mpm_waiting_tokens"), "expected an aggregate"),
    ("scaling", ("ScaledObject/segmenter", (*TRIGGER, "query"), "sum(mpm_waiting_tokens"), "query: "),
    (
        "scaling",
        ("ResourceQuota/segmenter", ("spec", "hard", "requests.nvidia.com/gpu"), "8"),
        "expected 11 or more, for all replicas and those that still end in a rollout, got 8",
    ),
    ("scaling", ("ResourceQuota/segmenter", ("spec", "hard", "pods"), "10"), "pods: expected 11 or more"),
    (
        "scaling",
        (DEPLOYMENT, ("spec", "strategy", "rollingUpdate", "maxUnavailable"), "25%"),
        "requests.nvidia.com/gpu: expected 12 or more",
    ),
    (
        "confinement",
        ("Namespace/segmenter", ("metadata", "labels", "pod-security.kubernetes.io/enforce"), "baseline"),
        "expected restricted",
    ),
    ("confinement", (DEPLOYMENT, (*POD, "securityContext", "runAsNonRoot"), False), "expected runAsNonRoot"),
    ("confinement", (DEPLOYMENT, (*POD, "securityContext", "seccompProfile"), GONE), "expected runAsNonRoot"),
    ("confinement", (DEPLOYMENT, (*POD, "securityContext", "runAsUser"), 1000), "expected 10001"),
    ("confinement", (DEPLOYMENT, (*POD, "automountServiceAccountToken"), True), "automountServiceAccountToken"),
    ("confinement", (DEPLOYMENT, (*POD, "hostNetwork"), True), "hostNetwork: expected false"),
    (
        "confinement",
        (DEPLOYMENT, (*POD, "initContainers", 0, "securityContext", "readOnlyRootFilesystem"), False),
        "checkpoint: securityContext",
    ),
    ("confinement", (DEPLOYMENT, (*SERVER, "securityContext", "allowPrivilegeEscalation"), GONE), "no privilege"),
    ("confinement", (DEPLOYMENT, (*SERVER, "securityContext", "capabilities", "drop"), []), "no privilege"),
    ("confinement", (DEPLOYMENT, (*SERVER, "securityContext", "privileged"), True), "no privilege"),
    ("volumes", (DEPLOYMENT, (*SERVER, "volumeMounts", 0, "name"), "model"), "no volume 'model'"),
    ("volumes", (DEPLOYMENT, (*SERVER, "volumeMounts", 3, "name"), "tmp"), "/dev/shm: expected an emptyDir in memory"),
    ("volumes", (DEPLOYMENT, (*POD, "volumes", 5, "emptyDir", "medium"), ""), "/dev/shm: expected"),
    ("volumes", (DEPLOYMENT, (*SERVER, "volumeMounts", 1, "mountPath"), "/var/tmp"), "/tmp: expected a volume"),
    ("volumes", (DEPLOYMENT, (*POD, "volumes", 1, "configMap", "name"), "serving"), "no ConfigMap 'serving'"),
    ("volumes", (DEPLOYMENT, (*POD, "priorityClassName"), "high"), "no PriorityClass 'high'"),
    ("volumes", (DEPLOYMENT, (*POD, "serviceAccountName"), "default"), "no ServiceAccount 'default'"),
    (
        "volumes",
        (DEPLOYMENT, (*POD, "initContainers", 0, "volumeMounts"), []),
        "'checkpoint' before anything fills it",
    ),
    ("models", (DEPLOYMENT, (*POD, "initContainers", 2, "args", 3), "--schedule=two"), "--schedule: "),
    (
        "models",
        (DEPLOYMENT, (*POD, "initContainers", 2, "args", 6), "--batch-size=145"),
        "max_inflight_tokens: expected at most --batch-size x 901 = 130645",
    ),
    ("models", (DEPLOYMENT, (*POD, "initContainers", 2, "args", 4), "--metrics-port=9090"), "metrics: expected"),
    ("models", (DEPLOYMENT, (*POD, "initContainers", 2, "name"), "build"), "expected an init container `model`"),
    (
        "memory",
        (DEPLOYMENT, (*SERVER, "resources", "limits", "memory"), "8Gi"),
        r"expected a limit of 8\.88 GiB or more .*Java 2\.5 GiB\), got 8 GiB",
    ),
    ("jobs", ("Job/batch", ("spec", "completions"), 9), r"expected .* --shard=\$\(JOB_COMPLETION_INDEX\)/9, got"),
    ("jobs", ("Job/batch", ("spec", "completionMode"), "NonIndexed"), "expected completionMode Indexed"),
    (
        "placeholders",
        ("HTTPRoute/segmenter", ("spec", "parentRefs", 0, "name"), "YOUR-GATEWAY"),
        r"spec\.parentRefs\.0\.name: expected a name of yours, got 'YOUR-GATEWAY'",
    ),
]


# The same of a component: its name, and what server it is in front of
GRPC_RULE = ("spec", "rules", 0, "matches", 0, "method")
HTTP_HOST = ["segmenter.example.com"]
BROKEN_COMPONENTS: list[tuple[str, str, str, tuple[str, Path, Any], str]] = [
    (
        "edge",
        "torchserve",
        "edges",
        (DEPLOYMENT, (*POD, "initContainers", 3, "args", 2), "--host=::"),
        "pass by the edge",
    ),
    (
        "edge",
        "torchserve",
        "edges",
        (DEPLOYMENT, (*POD, "initContainers", 3, "ports"), [{"name": "http", "containerPort": 8080}]),
        "expected no http beside an edge",
    ),
    ("edge", "triton", "edges", (DEPLOYMENT, (*SERVER, "args", 4), "--server=torchserve"), "expected --server=triton"),
    ("edge", "triton", "edges", (DEPLOYMENT, (*SERVER, "args", 3), "--answer-seconds=59"), r"deadline_seconds \(60\)"),
    ("edge", "triton", "edges", (DEPLOYMENT, (*SERVER, "args", 3), "--max-body-bytes=1024"), "which the model takes"),
    ("edge", "triton", "endings", (DEPLOYMENT, (*SERVER, "lifecycle"), GONE), "expected to sleep 10 s"),
    (
        "edge",
        "triton",
        "endings",
        (DEPLOYMENT, (*SERVER, "args", 3), "--answer-seconds=66"),
        r"expected 91 \(preStop 15, lame duck 0, --answer-seconds 66, 10 to end\), got 90",
    ),
    ("edge", "triton", "ports", (DEPLOYMENT, (*SERVER, "ports", 1, "containerPort"), 9091), "expected http, grpc"),
    ("grpcroute", "triton", "ports", ("Service/segmenter", ("spec", "ports", 1, "port"), 9000), "it has no port 8001"),
    ("grpcroute", "torchserve", "ports", (DEPLOYMENT, ("metadata", "labels", "a"), "b"), "it has no port 8001"),
    (
        "grpcroute",
        "triton",
        "routes",
        ("GRPCRoute/segmenter", ("spec", "hostnames"), HTTP_HOST),
        "HTTPRoute/segmenter's",
    ),
    ("grpcroute", "triton", "routes", ("GRPCRoute/segmenter", (*GRPC_RULE, "method"), "ModelConfig"), "ModelInfer"),
    (
        "grpcroute",
        "triton",
        "routes",
        ("GRPCRoute/segmenter", ("spec", "rules", 0, "matches", 1, "method"), {"method": "RepositoryModelLoad"}),
        "expected methods by name",
    ),
]


@pytest.mark.parametrize(("component", "server", "check", "edit", "told"), BROKEN_COMPONENTS)
def test_a_check_finds_what_is_broken_in_a_component(
    component: str, server: str, check: str, edit: tuple[str, Path, Any], told: str
) -> None:
    found = problems(change(render_with(component, server), [edit]))
    assert any(re.search(told, line) for line in found if line.startswith(f"{check}: ")), found


def test_an_edge_that_would_end_after_its_server() -> None:
    (deployment,) = Manifests.parse(render_with("edge")).servers
    pod = pod_of(deployment)
    both = [*pod["containers"], server_of(deployment)]
    edits: list[tuple[str, Path, Any]] = [(DEPLOYMENT, (*POD, "containers"), both)]
    edits += [(DEPLOYMENT, (*POD, "initContainers"), pod["initContainers"][:-1])]
    (found,) = problems(change(render_with("edge"), edits))
    assert "server: expected an init container with restartPolicy Always, to end after the edge" in found


@pytest.fixture(scope="module")
def whole() -> str:
    """The overlay with a canary, and a batch beside it."""
    batch = [d for d in Manifests.parse(render_with("batch")).documents if d["metadata"]["name"] in BATCH]
    return "\n---\n".join([render("overlays/h100-sxm/canary"), *map(json.dumps, batch)])


def test_whole_manifests_have_no_problem(whole: str) -> None:
    assert problems(change(whole, [])) == []


@pytest.mark.parametrize(
    ("check", "edit", "told"), BROKEN, ids=[f"{b[0]}: {b[1][1][-1]} {i}" for i, b in enumerate(BROKEN)]
)
def test_a_check_finds_what_is_broken(whole: str, check: str, edit: tuple[str, Path, Any], told: str) -> None:
    found = problems(change(whole, [edit]))
    assert any(re.search(told, line) for line in found if line.startswith(f"{check}: ")), found


def test_every_check_has_been_seen_to_fail() -> None:
    broken = {broken[0] for broken in BROKEN} | {broken[2] for broken in BROKEN_COMPONENTS}
    assert broken == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_batch_tokens: many", "max_batch_tokens: expected an integer"),
        ("max_batch: 1", "unknown fields max_batch"),
        ("metrics_host: 127.0.0.1", "metrics: expected metrics_host 0.0.0.0"),
        ("metrics_host: 0.0.0.0\nmax_inflight_tokens: 144161", "expected at most --batch-size x 901 = 144160"),
        ("metrics_host: 0.0.0.0\ninference: {window_size: 320}", "expected at most --batch-size x 401 = 64160"),
    ],
)
def test_serving_yml_is_read_as_the_server_reads_it(text: str, told: str) -> None:
    broken = render("overlays/dev-cpu/torchserve")
    (config,) = Manifests.parse(broken).of("ConfigMap")
    name = f"ConfigMap/{config['metadata']['name']}"
    found = problems(change(broken, [(name, ("data", "serving.yml"), text)]))
    assert any(told in line for line in found), found


@pytest.mark.parametrize("overlay", ["h100-sxm/triton", "dev-cpu/torchserve"])
def test_several_pods_name_their_precision(overlay: str) -> None:
    """Pods on other chips would answer with other masks; a single one may pick what suits its chip."""
    text = render(f"overlays/{overlay}")
    (config,) = [c for c in Manifests.parse(text).of("ConfigMap") if c["metadata"]["name"].startswith("serving")]
    given = "\n".join(line for line in config["data"]["serving.yml"].splitlines() if not line.startswith("precision"))
    edits: list[tuple[str, Path, Any]] = [(f"ConfigMap/{config['metadata']['name']}", ("data", "serving.yml"), given)]
    told = f"models: {DEPLOYMENT}: precision: expected a name, because masks of auto differ from chip to chip"
    if overlay.startswith("dev"):
        assert problems(change(text, edits)) == []
        edits.append((DEPLOYMENT, ("spec", "replicas"), 2))
    assert [line for line in problems(change(text, edits)) if line.startswith(told)]


@pytest.mark.parametrize(
    ("overlay", "sizes", "most"),
    [
        ("dev-cpu/torchserve", "max_inflight_mib: {}", 576),  # 4 GiB - 2.5 - 0.75 - 65536 x 3 KiB
        ("dev-cpu/triton", "max_inflight_mib: {}", 2112),  # /dev/shm has 1 GiB, and there is no Java
        ("dev-cpu/torchserve", "max_inflight_tokens: {}", 131072),  # 384 MiB, beside 384 of pictures
    ],
)
def test_what_is_in_flight_fits_into_the_memory(overlay: str, sizes: str, most: int) -> None:
    text = render(f"overlays/{overlay}")
    (config,) = [c for c in Manifests.parse(text).of("ConfigMap") if c["metadata"]["name"].startswith("serving")]
    for size, fits in ((most, True), (most + 1, False)):
        given = f"metrics_host: 0.0.0.0\n{sizes.format(size)}"
        found = problems(change(text, [(f"ConfigMap/{config['metadata']['name']}", ("data", "serving.yml"), given)]))
        assert (not [line for line in found if line.startswith("memory: ")]) is fits, found


def test_memory_without_a_limit_is_the_node_s(whole: str) -> None:
    found = problems(change(whole, [(DEPLOYMENT, (*SERVER, "resources", "limits", "memory"), GONE)]))
    assert not [line for line in found if line.startswith("memory: ")]


def test_threads_that_nobody_limits() -> None:
    """Where serving.yml sets none, as on CPUs."""
    text = render("overlays/dev-cpu/torchserve")
    found = problems(change(text, [(DEPLOYMENT, (*SERVER, "env"), GONE)]))
    assert found == [
        f"models: {DEPLOYMENT}: torch_threads: expected a number, or MPM_CORES from requests.cpu, got neither"
    ]
    edit = (DEPLOYMENT, (*SERVER, "env", 0), {"name": "MPM_CORES", "value": "64"})
    assert any("torch_threads" in line for line in problems(change(text, [edit])))


@pytest.mark.parametrize("server", ["torchserve", "triton"])
def test_a_deadline_that_the_grace_does_not_cover(server: str) -> None:
    text = render(f"overlays/h100-sxm/{server}")
    (config,) = [c for c in Manifests.parse(text).of("ConfigMap") if c["metadata"]["name"].startswith("serving")]
    fields = config["data"]["serving.yml"]
    edit = (f"ConfigMap/{config['metadata']['name']}", ("data", "serving.yml"), f"{fields}deadline_seconds: 300\n")
    found = problems(change(text, [edit]))
    assert any(
        "expected 325 (preStop 15, lame duck 0, deadline_seconds 300, 10 to end), got 90" in line for line in found
    )
    assert any("timeouts.request" in line for line in found)
    grace = (DEPLOYMENT, (*POD, "terminationGracePeriodSeconds"), 325)
    timeouts = ("HTTPRoute/segmenter", (*RULE, "timeouts"), {"request": "305s", "backendRequest": "305s"})
    assert problems(change(text, [edit, grace, timeouts])) == [], "a longer deadline is none if all else follows"
    assert problems(change(text, [edit, (*grace[:2], 324), timeouts]))


def test_a_lame_duck_takes_of_the_grace(whole: str) -> None:
    for seconds, fits in ((5, True), (5.5, False)):
        found = problems(change(whole, [(DEPLOYMENT, (*SERVER, "args", 2), f"--lame-duck-seconds={seconds}")]))
        assert (found == []) is fits, found


@pytest.mark.parametrize(
    ("match", "enough"),
    [
        ({}, True),
        ({"path": {"type": "PathPrefix", "value": "/predictions"}}, True),
        ({"path": {"value": "/"}}, True),
        ({"path": {"type": "PathPrefix", "value": "/pred"}}, False),
        ({"path": {"type": "Exact", "value": "/predictions/segmenter"}}, True),
        ({"path": {"type": "Exact", "value": "/predictions"}}, False),
        ({"method": "POST"}, False),
    ],
)
def test_a_route_of_ones_own(whole: str, match: dict[str, Any], enough: bool) -> None:
    found = problems(change(whole, [("HTTPRoute/segmenter", (*RULE, "matches"), [match])]))
    assert any(line.startswith("routes: ") for line in found) is not enough


@pytest.mark.parametrize("match", [2, 3])
def test_a_route_without_triton_s_paths(match: int) -> None:
    text = render("overlays/h100-sxm/triton")
    edit = ("HTTPRoute/segmenter", (*RULE, "matches", match, "path", "value"), "/v2/models/other")
    assert any(
        line.startswith("routes: ") and "match for" in line and "/v2/models/segmenter" in line
        for line in problems(change(text, [edit]))
    )


@pytest.mark.parametrize(
    "edit",
    [
        (DEPLOYMENT, (*SERVER, "args", 5), "--lame-duck-seconds=0"),
        (DEPLOYMENT, (*SERVER, "args", 5), "--triton-metrics-port=8003"),
        (DEPLOYMENT, (*SERVER, "ports", 2), {"name": "metrics", "containerPort": 8090}),
        (DEPLOYMENT, (*SERVER, "ports", 2, "containerPort"), 8003),
    ],
)
def test_what_triton_s_queue_refuses_is_seen(edit: tuple[str, Path, Any]) -> None:
    text = render("overlays/h100-sxm/triton")
    found = problems(change(text, [edit]))
    assert any("expected triton-metrics 8002 and --triton-metrics-port=8002" in line for line in found), found


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("PodMonitor/mpm", ("spec", "podMetricsEndpoints", 1, "port")),
        ("NetworkPolicy/allow-monitoring", ("spec", "ingress", 0, "ports", 1, "port")),
    ],
)
@pytest.mark.parametrize("server", ["torchserve", "triton"])
def test_who_asks_for_triton_s_metrics(server: str, name: str, path: Path) -> None:
    """TorchServe's pods have no such port, and one that is misspelt is found there too."""
    text = render(f"overlays/h100-sxm/{server}")
    assert problems(change(text, [(name, path, "triton-metrics")])) == []
    found = problems(change(text, [(name, path, "triton-metric")]))
    assert any("port 'triton-metric'" in line for line in found), found


def test_two_autoscalers() -> None:
    both = Manifests(
        (*Manifests.parse(render_with("hpa")).documents, *manifests("overlays/h100-sxm/triton").of("ScaledObject"))
    )
    assert "scaling: Deployment/segmenter: expected one autoscaler, got 2" in problems(both)


def test_a_claim_that_nobody_made() -> None:
    text = render_with("model-pvc")
    edit = ("PersistentVolumeClaim/checkpoint", ("metadata", "name"), "other")
    assert any("no PersistentVolumeClaim 'checkpoint'" in line for line in problems(change(text, [edit])))
    storage = ("PersistentVolumeClaim/checkpoint", ("spec", "resources", "requests", "storage"), "5 GB")
    assert any("PersistentVolumeClaim/checkpoint: storage" in line for line in problems(change(text, [storage])))


def test_a_product_without_its_shared_form(whole: str) -> None:
    where = (*POD, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
    edit = (DEPLOYMENT, (*where, 0, "matchExpressions", 0, "values"), ["NVIDIA-H100-NVL"])
    assert any("expected NVIDIA-H100-NVL-SHARED too" in line for line in problems(change(whole, [edit])))


def test_one_replica_may_be_away() -> None:
    """Who wants to pay for one at night, and to be away while it is replaced, may have it."""
    text = render("overlays/h100-sxm/torchserve")
    assert problems(change(text, [("ScaledObject/segmenter", ("spec", "minReplicaCount"), 1)])) == []


def test_a_fleet_of_a_thousand() -> None:
    text = render("overlays/h100-sxm/torchserve")
    most = ("ScaledObject/segmenter", ("spec", "maxReplicaCount"), 1000)
    quota = ("ResourceQuota/segmenter", ("spec", "hard"))
    found = problems(change(text, [most]))
    assert [line for line in found if "requests.nvidia.com/gpu: expected 1100 or more" in line], found
    room = {"pods": "1100", "requests.nvidia.com/gpu": "1100"}
    assert problems(change(text, [most, (*quota, room)])) == []


def test_volumes_of_images_need_a_new_cluster() -> None:
    found = Manifests.parse(render_with("model-image"))
    assert problems(found) == problems(found, kubernetes=(1, 36)) == []
    (told,) = problems(found, kubernetes=(1, 34))
    assert told.startswith(f"image_volumes: {DEPLOYMENT}: volume checkpoint: expected no image, which Kubernetes 1.34")


def test_images_without_a_digest(whole: str) -> None:
    assert not any(line.startswith("digests") for line in problems(Manifests.parse(whole)))
    found = list(digests(Manifests.parse(whole)))
    assert len(found) == 8, "four containers of two Deployments"
    pinned = whole.replace("image: mpm-segmenter-torchserve", f"image: registry.corp.net/mpm@sha256:{'0a' * 32}")
    assert problems(Manifests.parse(pinned), release=True) == [
        "examples: HTTPRoute/segmenter: spec.hostnames.0: expected a name of yours, got 'segmenter.example.com'"
    ]
    assert problems(Manifests.parse(pinned.replace("example.com", "corp.net")), release=True) == []
    assert len(list(digests(Manifests.parse(pinned.replace("0a0a", "zz"))))) == 8
    (image,) = [line for line in digests(Manifests.parse(render_with("model-image"))) if "checkpoint: image" in line]
    assert "got 'segmenter-checkpoint'" in image


@pytest.mark.parametrize(
    ("expression", "single"),
    [
        ("sum(a)", True),
        ("sum by (model) (a)", False),
        ("sum without (pod) (a)", False),
        ("sum without () (a)", False),
        ("sum by () (a)", True),
        ("a", False),
        ("sum(a) / avg(b > 0) or 0 * sum(a)", True),
        ("sum(a) / b", False),
        ("(max(a))", True),
        ("-max(a)", True),
        ("topk(3, a)", False),
        ("count_values('x', a)", False),
        ("ceil(sum(a))", True),
        ("rate(a[5m])", False),
        ("vector(1)", True),
        ("scalar(a)", True),
        ("time()", True),
        ("sum(a) or vector(0)", True),
        ("sum(a) or sum by (b) (c)", False),
    ],
)
def test_single_series(expression: str, single: bool) -> None:
    assert is_single_series(promql.parse(expression)) is single


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("500m", Decimal("0.5")),
        ("16Gi", 16 * 2**30),
        ("1e3", 1000),
        (2, 2),
        ("1.5k", 1500),
        (".5", Decimal("0.5")),
    ],
)
def test_quantities(text: object, value: object) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "1Gib", "1GB", "Gi", "1 Gi", "--1", "1.2.3", "one", None, True])
def test_no_quantities(text: object) -> None:
    with pytest.raises(ValueError, match="expected a quantity"):
        quantity(text)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ({"key": "a", "operator": "In", "values": ["1", "2"]}, True),
        ({"key": "a", "operator": "NotIn", "values": ["1"]}, False),
        ({"key": "b", "operator": "Exists"}, False),
        ({"key": "b", "operator": "DoesNotExist"}, True),
    ],
)
def test_selectors_with_expressions(expression: dict[str, Any], found: bool) -> None:
    assert matches({"matchExpressions": [expression]}, {"a": "1"}) is found


@pytest.mark.parametrize(
    ("stdin", "status", "told"),
    [
        (lambda: render("overlays/dev-cpu/torchserve"), 0, ""),
        (lambda: render_with("model-image"), 1, "image_volumes: "),
        (
            lambda: (
                render("overlays/dev-cpu/torchserve").replace("maxSurge: 0", "maxSurge: 1").replace("8090", "8091")
            ),
            1,
            "ports: ",
        ),
        (lambda: "", 2, "expected manifests, got nothing"),
        (lambda: "- a", 2, "expected manifests with kind"),
        (lambda: "{", 2, "not readable as YAML"),
        (lambda: json.dumps({"kind": "Deployment"}), 2, "expected manifests with kind and metadata.name"),
    ],
)
def test_the_command(
    stdin: Callable[[], str],
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin()))
    assert main(["check-manifests", "--kubernetes", "1.32"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


def test_the_command_as_the_readme_has_it() -> None:
    command = [sys.executable, "-m", "handlers", "check-manifests", "--release"]
    text = render("overlays/dev-cpu/torchserve")
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == done.stderr.count("digests: Deployment/segmenter: ") == 4
