"""Find what is wrong in rendered manifests and what their schemas let pass, see `mpm check-manifests`."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import promql_parser as promql

from handlers.config import ServingConfig
from mpm_ops.stages import parse_schedule

from .manifests import (
    Manifest,
    Manifests,
    containers_of,
    edge_of,
    labels_of,
    matches,
    name_of,
    pod_of,
    quantity,
    running_of,
    server_of,
)

STOP_SECONDS = 10  # that a server has to end, after its last answer
USER = 10001
TRITON_METRICS = "triton-metrics"  # Triton's own, where alone stands what waited too long in its queue
EDGE_METRICS = "edge-metrics"
# All that a server and its edge listen on beyond loopback
PORTS = {
    "http": (8000, 8080, 8088),
    "grpc": (8001,),
    "metrics": (8090,),
    TRITON_METRICS: (8002,),
    EDGE_METRICS: (8091,),
}
JAVA_BYTES = 2560 * 2**20  # TorchServe's heap and direct memory, at most
ENGINE_BYTES = 768 * 2**20  # the process that computes: measured with the demo model on a CPU
CUDA_ENGINE_BYTES = 4 * 2**30  # the same with CUDA's libraries: assumed
TOKEN_BYTES = 16 * 16 * 3 * 4  # of a window in flight: float32 pixels of a patch
FILL_TOKENS = 901  # of a request at least: one window of 480 x 480, the smallest of the official checkpoints

CLUSTER_WIDE = (
    "ClusterRole",
    "ClusterRoleBinding",
    "Namespace",
    "PriorityClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
)

IMAGE_VOLUMES = (1, 35)  # the first Kubernetes that has them by default; older ones drop them without a word
SILENT_SECONDS = 60  # that pods may stay bound to a node of which nothing is heard

_DIGEST = re.compile(r"[^@]+@sha256:[0-9a-f]{64}")
_PLACEHOLDER = re.compile(r"YOUR-[\w-]*")
_EXAMPLE = re.compile(r"[\w.-]*\bexample\.(?:com|org|net)")


# Checks: each takes manifests and yields a sentence per problem


def selectors(manifests: Manifests) -> Iterator[str]:
    """Whatever selects pods selects those that it is meant for."""
    for workload in manifests.workloads:
        selector = workload["spec"].get("selector")
        if selector is not None and not matches(selector, labels_of(workload)):
            yield f"{name_of(workload)}: selector: expected labels of its own pods, got {selector}"
        for other in manifests.workloads:
            if other is not workload and selector is not None and matches(selector, labels_of(other)):
                yield f"{name_of(workload)}: selector: also matches the pods of {name_of(other)}"
        for spread in pod_of(workload).get("topologySpreadConstraints", []):
            if not matches(spread["labelSelector"], labels_of(workload)):
                yield f"{name_of(workload)}: topologySpreadConstraints: expected labels of its own pods"
            if "pod-template-hash" not in spread.get("matchLabelKeys", []):
                yield f"{name_of(workload)}: topologySpreadConstraints: expected matchLabelKeys, or old pods count"
    for service in manifests.of("Service"):
        found = manifests.selected_by({"matchLabels": service["spec"]["selector"]})
        if len(found) != 1:
            yield f"{name_of(service)}: selector: expected the pods of one workload, got those of {len(found)}"
    of_kserve = [{"serving.kserve.io/inferenceservice": name} for name in manifests.names("InferenceService")]
    for manifest in manifests.of("PodDisruptionBudget", "PodMonitor"):
        selector = manifest["spec"]["selector"]
        if not manifests.selected_by(selector) and not any(matches(selector, labels) for labels in of_kserve):
            yield f"{name_of(manifest)}: selector: matches no pod"
    for policy in manifests.of("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if selector and not manifests.selected_by(selector):
            yield f"{name_of(policy)}: podSelector: matches no pod"


def namespaces(manifests: Manifests) -> Iterator[str]:
    """Everything lies in the one namespace; kustomize leaves what an overlay forgets in `default`."""
    names = manifests.names("Namespace")
    for document in manifests.documents:
        found = document["metadata"].get("namespace")
        if document["kind"] not in CLUSTER_WIDE and names != {found}:
            yield f"{name_of(document)}: namespace: expected that of the manifests, {', '.join(names)}, got {found}"


def names(manifests: Manifests) -> Iterator[str]:
    """Names that stand inside of longer texts, where kustomize doesn't change them, are those of these manifests."""
    for namespace in manifests.names("Namespace"):
        for document in manifests.documents:
            if document["kind"] in CLUSTER_WIDE and not document["metadata"]["name"].startswith(namespace):
                yield f"{name_of(document)}: name: expected to begin with {namespace}, or other namespaces replace it"
        for binding in manifests.of("ValidatingAdmissionPolicyBinding"):
            selector = binding["spec"].get("matchResources", {}).get("namespaceSelector", {})
            if selector.get("matchLabels") != {"kubernetes.io/metadata.name": namespace}:
                yield f"{name_of(binding)}: namespaceSelector: expected the namespace {namespace}, got {selector}"
            if binding["spec"]["policyName"] not in manifests.names("ValidatingAdmissionPolicy"):
                yield f"{name_of(binding)}: policyName: no ValidatingAdmissionPolicy {binding['spec']['policyName']!r}"
        for scaler in manifests.of("ScaledObject"):
            for trigger in scaler["spec"]["triggers"]:
                for found in _asked_namespaces(trigger["metadata"].get("query", "")) - {namespace}:
                    yield f"{name_of(scaler)}: query: expected namespace={namespace!r} of every metric, got {found!r}"
    for server in manifests.servers:
        name = _build_options(server).get("name")
        for probe in ("startupProbe", "livenessProbe"):
            for url in server_of(server).get(probe, {}).get("exec", {}).get("command", []):
                if url.startswith("http://") and not url.endswith(f"/{name}"):
                    yield f"{name_of(server)}: {probe}: expected the model {name!r}, got {url}"


def _asked_namespaces(query: str) -> set[str | None]:
    """Of every metric in a PromQL expression; None where one is asked for in all namespaces."""
    try:
        metrics = list(_vectors(promql.parse(query)))
    except ValueError:  # told by `scaling`
        return set()
    wanted = [
        [m.value for m in v.matchers.matchers if m.name == "namespace" and m.op == promql.MatchOp.Equal]
        for v in metrics
    ]
    return {values[0] if values else None for values in wanted}


def _vectors(expression: Any) -> Iterator[Any]:
    if isinstance(expression, promql.VectorSelector):
        yield expression
    elif isinstance(expression, promql.MatrixSelector):
        yield expression.vector_selector
    elif isinstance(expression, promql.BinaryExpr):
        yield from (*_vectors(expression.lhs), *_vectors(expression.rhs))
    elif isinstance(expression, promql.Call):
        yield from (vector for argument in expression.args for vector in _vectors(argument))
    elif hasattr(expression, "expr"):
        yield from _vectors(expression.expr)


def quantities(manifests: Manifests) -> Iterator[str]:
    """Every amount is one that the API server can read, and no request is above its limit."""
    for workload in manifests.workloads:
        for container in containers_of(pod_of(workload)):
            resources = container.get("resources", {})
            where = f"{name_of(workload)}: {container['name']}"
            yield from _unreadable(resources.get("requests", {}), f"{where}: requests")
            yield from _unreadable(resources.get("limits", {}), f"{where}: limits")
            for name, request in resources.get("requests", {}).items():
                limit = resources.get("limits", {}).get(name)
                readable = limit is not None and not any(_unreadable({0: request, 1: limit}, ""))
                if readable and quantity(request) > quantity(limit):
                    yield f"{where}: {name}: requests {request}, which is above its limit of {limit}"
        for volume in pod_of(workload).get("volumes", []):
            if "sizeLimit" in (volume.get("emptyDir") or {}):
                yield from _unreadable({"sizeLimit": volume["emptyDir"]["sizeLimit"]}, name_of(workload))
    for claim in manifests.of("PersistentVolumeClaim"):
        yield from _unreadable(claim["spec"]["resources"]["requests"], name_of(claim))
    for quota in manifests.of("ResourceQuota"):
        yield from _unreadable(quota["spec"]["hard"], name_of(quota))


def _unreadable(amounts: Mapping[Any, Any], where: str) -> Iterator[str]:
    for name, amount in amounts.items():
        try:
            quantity(amount)
        except ValueError as error:
            yield f"{where}: {name}: {error}"


def gpus(manifests: Manifests) -> Iterator[str]:
    """A pod has one GPU, as request and as limit, on a node of a named product; its rollout needs no spare one."""
    for server in manifests.servers:
        resources = server_of(server).get("resources", {})
        requests, limits = (
            {name: amount for name, amount in resources.get(kind, {}).items() if name.startswith("nvidia.com/")}
            for kind in ("requests", "limits")
        )
        if requests != limits:
            yield f"{name_of(server)}: GPUs: expected the same requests and limits, got {requests} and {limits}"
        if not limits:
            continue
        if len(limits) != 1 or quantity(next(iter(limits.values()))) != 1:
            yield f"{name_of(server)}: GPUs: expected one per pod, got {limits}"
        pod = pod_of(server)
        if not any(toleration.get("key") == "nvidia.com/gpu" for toleration in pod.get("tolerations", [])):
            yield f"{name_of(server)}: tolerations: expected one for the taint nvidia.com/gpu"
        rollout = server["spec"].get("strategy", {}).get("rollingUpdate", {})
        if rollout.get("maxSurge") != 0 or rollout.get("maxUnavailable") in (None, 0):
            yield f"{name_of(server)}: strategy: expected maxSurge 0 and maxUnavailable 10%, got {rollout}"
        yield from _products(server, shared="nvidia.com/gpu" in limits)


def _products(server: Manifest, *, shared: bool) -> Iterator[str]:
    terms = (
        pod_of(server)
        .get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
        .get("nodeSelectorTerms", [])
    )
    wanted = [e for term in terms for e in term.get("matchExpressions", []) if e["key"] == "nvidia.com/gpu.product"]
    if not wanted or wanted[0]["operator"] != "In":
        yield f"{name_of(server)}: nodeAffinity: expected nvidia.com/gpu.product In [...]"
        return
    products = wanted[0]["values"]
    for product in products if shared else ():
        if not product.endswith("-SHARED") and f"{product}-SHARED" not in products:
            yield f"{name_of(server)}: nodeAffinity: {product}: expected {product}-SHARED too"


def ports(manifests: Manifests) -> Iterator[str]:
    """Every port that something refers to exists, and a server offers no other than those of PORTS."""
    for workload in manifests.workloads:
        for container in running_of(pod_of(workload)):
            offered = {port.get("name"): port["containerPort"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for action in ("httpGet", "tcpSocket", "grpc"):
                    port = container.get(probe, {}).get(action, {}).get("port")
                    if port is not None and port not in offered and port not in offered.values():
                        yield f"{name_of(workload)}: {container['name']}: {probe}: port {port!r} isn't among {offered}"
                for url in _urls(container.get(probe, {}).get("exec", {}).get("command", [])):
                    if url not in offered.values() and url != _option(container, "port", 0):
                        yield f"{name_of(workload)}: {container['name']}: {probe}: port {url} isn't among {offered}"
    for server in manifests.servers:
        for port in (port for container in running_of(pod_of(server)) for port in container.get("ports", [])):
            if port["containerPort"] not in PORTS.get(port.get("name"), ()):
                yield f"{name_of(server)}: ports: expected http, grpc and metrics as in {PORTS}, got {port}"
            if "hostPort" in port:
                yield f"{name_of(server)}: ports: expected no hostPort, got {port}"
        if _is_triton(server):
            (number,) = PORTS[TRITON_METRICS]
            if number not in _offered(server) or f"--{TRITON_METRICS}-port={number}" not in server_of(server)["args"]:
                yield (
                    f"{name_of(server)}: ports: expected {TRITON_METRICS} {number} and "
                    f"--{TRITON_METRICS}-port={number}, or what waits too long in Triton's queue goes unseen"
                )
    for service in manifests.of("Service"):
        for workload in manifests.selected_by({"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in _offered(workload):
                    yield f"{name_of(service)}: targetPort {port.get('targetPort')!r}: {name_of(workload)} has no such"
    for monitor in manifests.of("PodMonitor"):
        for workload in manifests.selected_by(monitor["spec"]["selector"]):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in _offered(workload) | _others_ports(workload):
                    yield f"{name_of(monitor)}: port {endpoint['port']!r}: {name_of(workload)} has no such"
    for policy in manifests.of("NetworkPolicy"):
        selected = manifests.selected_by(policy["spec"]["podSelector"])
        offers = [_offered(workload) | _others_ports(workload) for workload in selected]
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if not any(port["port"] in offered for offered in offers):
                    yield f"{name_of(policy)}: port {port['port']!r}: no pod that it selects has such"
    for route in manifests.of("HTTPRoute", "GRPCRoute"):
        for backend in _backends(route):
            services = [s for s in manifests.of("Service") if s["metadata"]["name"] == backend["name"]]
            if not services:
                yield f"{name_of(route)}: backend {backend['name']!r}: no such Service"
            elif backend.get("port") not in [port["port"] for port in services[0]["spec"]["ports"]]:
                yield f"{name_of(route)}: backend {backend['name']!r}: it has no port {backend.get('port')}"


def _urls(command: Sequence[str]) -> list[int]:
    return [int(found[1]) for word in command if (found := re.match(r"http://127\.0\.0\.1:(\d+)/", word))]


def _offered(workload: Manifest) -> set[str | int]:
    every = [port for container in running_of(pod_of(workload)) for port in container.get("ports", [])]
    return {port["containerPort"] for port in every} | {port["name"] for port in every if "name" in port}


def _others_ports(workload: Manifest) -> set[str | int]:
    """What may be asked of every server, and only Triton and an edge have; Triton has to."""
    return {EDGE_METRICS} if _is_triton(workload) else {EDGE_METRICS, TRITON_METRICS}


def _backends(route: Manifest) -> Iterator[Mapping[str, Any]]:
    for rule in route["spec"]["rules"]:
        yield from rule.get("backendRefs", [])
        for route_filter in rule.get("filters", []):
            if "requestMirror" in route_filter:
                yield route_filter["requestMirror"]["backendRef"]


def routes(manifests: Manifests) -> Iterator[str]:
    """Whatever clients ask of the model passes, and nothing that a server would inflate does."""
    for route in manifests.of("HTTPRoute"):
        rules = route["spec"]["rules"]
        admitted = [match for rule in rules for match in rule.get("matches", [{}])]
        for method, path in sorted({asked for server in manifests.servers for asked in _asked(server)}):
            if not any(_admits(match, method, path) for match in admitted):
                yield f"{name_of(route)}: expected a match for {method} {path}"
        for number, rule in enumerate(rules):
            modifiers = [f["requestHeaderModifier"] for f in rule.get("filters", []) if "requestHeaderModifier" in f]
            removed = [name.lower() for modifier in modifiers for name in modifier.get("remove", [])]
            if "content-encoding" not in removed:
                yield (
                    f"{name_of(route)}: rule {number}: filters: expected one that removes Content-Encoding, since "
                    "Triton inflates to any size"
                )

    for route in manifests.of("GRPCRoute"):
        methods = {(m["method"].get("service"), m["method"].get("method")) for m in _matches(route)}
        if ("inference.GRPCInferenceService", "ModelInfer") not in methods:
            yield f"{name_of(route)}: expected a match for inference.GRPCInferenceService/ModelInfer"
        for service, method in methods:
            if service is None or method is None or "Repository" in method:
                yield f"{name_of(route)}: expected methods by name, none that load models, got {service}/{method}"
        for other in manifests.of("HTTPRoute"):
            if shared := set(route["spec"].get("hostnames", [])) & set(other["spec"].get("hostnames", [])):
                yield f"{name_of(route)}: hostnames: expected none of {name_of(other)}'s, got {', '.join(shared)}"


def _matches(route: Manifest) -> list[Mapping[str, Any]]:
    return [match for rule in route["spec"]["rules"] for match in rule.get("matches", [{"method": {}}])]


def _admits(match: Mapping[str, Any], method: str, path: str) -> bool:
    wanted = {"type": "PathPrefix", "value": "/"} | match.get("path", {})
    below = wanted["type"] == "PathPrefix" and f"{path}/".startswith(f"{wanted['value'].rstrip('/')}/")
    return match.get("method", method) == method and (below or wanted == {"type": "Exact", "value": path})


def _asked(server: Manifest) -> set[tuple[str, str]]:
    """Methods and paths that clients of a server use: `curl -T` PUTs, forms and other clients POST."""
    name = _build_options(server).get("name", "")
    if _is_triton(server):
        return {("POST", f"/v2/models/{name}/infer"), ("GET", f"/v2/models/{name}")}
    return {("PUT", f"/predictions/{name}"), ("POST", f"/predictions/{name}")}


def _build_options(server: Manifest) -> dict[str, str]:
    """Options of the init container `model`, by their names without dashes."""
    builders = [c for c in pod_of(server).get("initContainers", []) if c["name"] == "model"]
    words = builders[0].get("args", []) if builders else []
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words)}


def probes(manifests: Manifests) -> Iterator[str]:
    """Start-up has time, readiness notices a dead engine, and liveness asks for a mask."""
    for server in manifests.servers:
        container, where = server_of(server), name_of(server)
        startup = container.get("startupProbe", {})
        if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < 300:
            yield f"{where}: startupProbe: expected 300 s or more for a server to start"
        for probe in ("startupProbe", "livenessProbe"):
            command = container.get(probe, {}).get("exec", {}).get("command", [])
            if command[:2] != ["mpm", "health"]:
                yield f"{where}: {probe}: expected mpm health, since front ends call a dead model healthy"
                continue
            own = [float(word.partition("=")[2]) for word in command if word.startswith("--timeout=")]
            if not own or own[0] >= container[probe].get("timeoutSeconds", 1):
                yield f"{where}: {probe}: expected --timeout below timeoutSeconds, for the probe to say what is wrong"
        if container.get("readinessProbe", {}).get("httpGet", {}).get("port") != "metrics":
            yield f"{where}: readinessProbe: expected the engine's own port, which is gone when the engine is"


def endings(manifests: Manifests) -> Iterator[str]:
    """A pod has the time to leave the balancer, to answer what it accepted, and to end."""
    for server in manifests.servers:
        try:
            config = manifests.serving(server)
        except ValueError:  # told by `models`
            continue
        if config is None:
            continue
        edge = edge_of(server)
        stop = (edge or server_of(server)).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if stop < 10:
            yield f"{name_of(server)}: preStop: expected to sleep 10 s or more, so that balancers learn of the end"
        lame = _lame_duck_seconds(server)
        answer = _option(edge, "answer-seconds", 120) if edge else config.deadline_seconds
        needed = stop + lame + max(answer, config.deadline_seconds) + STOP_SECONDS  # launchers drain for the deadline
        grace = pod_of(server).get("terminationGracePeriodSeconds", 30)
        if grace < needed:
            yield (
                f"{name_of(server)}: terminationGracePeriodSeconds: expected {needed:g} (preStop {stop}, lame duck "
                f"{lame:g}, {'--answer-seconds' if edge else 'deadline_seconds'} {answer:g}, {STOP_SECONDS} to end), "
                f"got {grace}"
            )
        for route in manifests.of("HTTPRoute"):
            for rule in route["spec"]["rules"]:
                seconds = re.fullmatch(r"(\d+)s", rule.get("timeouts", {}).get("request", ""))
                if not seconds or int(seconds[1]) < config.deadline_seconds:
                    yield f"{name_of(route)}: timeouts.request: expected deadline_seconds or more, or 504 goes unheard"


def edges(manifests: Manifests) -> Iterator[str]:
    """An edge is all that clients reach of its server, ends before it, and waits as long as the server answers."""
    for server in manifests.servers:
        edge, where = edge_of(server), name_of(server)
        if edge is None:
            continue
        if server_of(server) in pod_of(server)["containers"]:
            yield f"{where}: server: expected an init container with restartPolicy Always, to end after the edge"
        if "--host=127.0.0.1" not in server_of(server)["args"]:
            yield f"{where}: server: expected --host=127.0.0.1, or clients pass by the edge"
        for port in ("http", "grpc"):
            if port in {each.get("name") for each in server_of(server).get("ports", [])}:
                yield f"{where}: server: ports: expected no {port} beside an edge"
        kind = "triton" if "--server=triton" in server_of(server)["args"] else "torchserve"
        if f"--server={kind}" not in edge.get("args", []):
            yield f"{where}: edge: expected --server={kind}"
        try:
            config = manifests.serving(server)
        except ValueError:  # told by `models`
            continue
        if config and _option(edge, "answer-seconds", 120) < config.deadline_seconds:
            yield f"{where}: edge: --answer-seconds: expected deadline_seconds ({config.deadline_seconds:g}) or more"
        if config and _option(edge, "max-body-bytes", 33 * 2**20) < config.max_body_bytes:
            yield f"{where}: edge: --max-body-bytes: expected {config.max_body_bytes}, which the model takes, or more"


def _lame_duck_seconds(server: Manifest) -> float:
    """How long the launcher goes on as if nothing were, after SIGTERM."""
    return _option(server_of(server), "lame-duck-seconds", 0)


def _option(container: Mapping[str, Any], name: str, otherwise: float) -> float:
    """A number among a container's arguments; what is none the command refuses itself."""
    found = [re.fullmatch(rf"--{name}=(\d+(?:\.\d+)?)", word) for word in container.get("args", [])]
    return next((float(match[1]) for match in found if match), otherwise)


def disruptions(manifests: Manifests) -> Iterator[str]:
    """A drain leaves a replica where there are two, and ends; pods of a silent node are soon replaced."""
    fewest = {name: low for name, low, _ in _scaled(manifests)}
    for budget in manifests.of("PodDisruptionBudget"):
        for workload in manifests.selected_by(budget["spec"]["selector"]):
            replicas = fewest.get(workload["metadata"]["name"], workload["spec"].get("replicas", 1))
            given = budget["spec"].get("maxUnavailable")
            away = math.ceil(_share(given, replicas))
            if away < 1:
                yield f"{name_of(budget)}: maxUnavailable: expected >= 1, or nodes can't be drained, got {given}"
            elif away >= replicas > 1:
                yield f"{name_of(budget)}: maxUnavailable: expected below {replicas} replicas, got {given}"
    for server in manifests.servers:
        for key in ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"):
            borne = [t.get("tolerationSeconds") for t in pod_of(server).get("tolerations", []) if t.get("key") == key]
            if not borne or borne[0] is None or borne[0] > SILENT_SECONDS:
                yield (
                    f"{name_of(server)}: tolerations: expected {key} for {SILENT_SECONDS} s at most, "
                    f"since without it is 300, got {borne[0] if borne else 'none'}"
                )


def _share(amount: object, replicas: int) -> float:
    """A number of replicas, given as such or in per cent; 0 if it is neither."""
    if isinstance(amount, str) and re.fullmatch(r"\d+%", amount):
        return int(amount[:-1]) * replicas / 100
    return amount if isinstance(amount, int) else 0


def _scaled(manifests: Manifests) -> Iterator[tuple[str, int, int]]:
    """Deployments that an autoscaler owns: name, fewest and most replicas."""
    for scaler in manifests.of("ScaledObject"):
        spec = scaler["spec"]
        yield spec["scaleTargetRef"]["name"], spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        spec = scaler["spec"]
        yield spec["scaleTargetRef"]["name"], spec.get("minReplicas", 1), spec["maxReplicas"]


def scaling(manifests: Manifests) -> Iterator[str]:
    """One autoscaler owns a Deployment's replicas, within a quota, and reads one series that is never taken for 0."""
    owned = [name for name, _, _ in _scaled(manifests)]
    for name in {name for name in owned if owned.count(name) > 1}:
        yield f"Deployment/{name}: expected one autoscaler, got {owned.count(name)}"
    deployments = {workload["metadata"]["name"]: workload for workload in manifests.of("Deployment")}
    for name, low, high in _scaled(manifests):
        if name not in deployments:
            yield f"an autoscaler's target: no Deployment {name!r}"
        elif "replicas" in deployments[name]["spec"]:
            yield f"Deployment/{name}: replicas: expected none, because an autoscaler owns them"
        if not 1 <= low <= high:
            yield f"Deployment/{name}: expected an autoscaler with 1 <= fewest <= most replicas, got {low} and {high}"
    for scaler in manifests.of("ScaledObject"):
        if "fallback" not in scaler["spec"]:
            yield f"{name_of(scaler)}: fallback: expected one for when the metrics are gone"
        for trigger in scaler["spec"]["triggers"]:
            yield from (f"{name_of(scaler)}: {problem}" for problem in _trigger(trigger))
    yield from _quota(manifests)


def _trigger(trigger: Mapping[str, Any]) -> Iterator[str]:
    metadata = trigger["metadata"]
    if trigger["type"] != "prometheus":
        return
    if metadata.get("ignoreNullValues") != "false":
        yield 'ignoreNullValues: expected "false", or no answer counts as no work'
    try:
        if not float(metadata.get("threshold", "nan")) > 0:
            raise ValueError
    except ValueError:
        yield f"threshold: expected a number > 0, got {metadata.get('threshold')!r}"
    try:
        expression = promql.parse(metadata["query"])
    except ValueError as error:
        yield f"query: {error}"
        return
    if not is_single_series(expression):
        yield "query: expected an aggregate without labels, because only the first of several series is read"


def is_single_series(expression: Any) -> bool:
    """Whether a PromQL expression has one series at most, whatever it is asked about."""
    if isinstance(expression, promql.NumberLiteral):
        return True
    if isinstance(expression, promql.ParenExpr | promql.UnaryExpr):
        return is_single_series(expression.expr)
    if isinstance(expression, promql.AggregateExpr):
        kept = expression.modifier is not None and (
            expression.modifier.labels or "without" in str(expression.modifier)
        )
        return not kept and str(expression.op) not in ("topk", "bottomk", "count_values", "limitk")
    if isinstance(expression, promql.BinaryExpr):
        return is_single_series(expression.lhs) and is_single_series(expression.rhs)
    if isinstance(expression, promql.Call):
        if expression.func.name in ("vector", "scalar", "time"):
            return True
        return bool(expression.args) and all(is_single_series(argument) for argument in expression.args)
    return False


def _most_replicas(manifests: Manifests) -> dict[str, int]:
    """How many pods each server may have, by its name."""
    scaled = {name: high for name, _, high in _scaled(manifests)}
    servers = {server["metadata"]["name"]: server["spec"] for server in manifests.servers}
    return {name: scaled.get(name, spec.get("replicas", 1)) for name, spec in servers.items()}


def _quota(manifests: Manifests) -> Iterator[str]:
    """Pods that still end in a rollout count too: without room for them each of its steps waits to be tried again."""
    needed: dict[str, Decimal] = {"pods": Decimal()}
    for server in manifests.servers:
        most = _most_replicas(manifests)[server["metadata"]["name"]]
        rollout = server["spec"].get("strategy", {}).get("rollingUpdate", {})
        pods = most + max(1, int(_share(rollout.get("maxUnavailable", "25%"), most)))
        needed["pods"] += pods
        for resource, amount in server_of(server).get("resources", {}).get("requests", {}).items():
            if resource.startswith("nvidia.com/"):
                name = f"requests.{resource}"
                needed[name] = needed.get(name, Decimal()) + pods * quantity(amount)
    for quota in manifests.of("ResourceQuota"):
        for name, amount in needed.items():
            allowed = quota["spec"]["hard"].get(name)
            if any(_unreadable({name: allowed or 0}, "")):  # told by `quantities`
                continue
            if quantity(allowed or 0) < amount:
                yield (
                    f"{name_of(quota)}: {name}: expected {amount} or more, for all replicas and those that still end "
                    f"in a rollout, got {allowed}"
                )


def confinement(manifests: Manifests) -> Iterator[str]:
    """Pods run as `restricted` asks, on a root that they can't write, and have nothing to say to the API server."""
    for namespace in manifests.of("Namespace"):
        enforced = namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if enforced != "restricted":
            yield f"{name_of(namespace)}: pod-security.kubernetes.io/enforce: expected restricted, got {enforced}"
    for workload in manifests.workloads:
        pod, where = pod_of(workload), name_of(workload)
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: securityContext: expected runAsNonRoot and seccompProfile RuntimeDefault"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{where}: automountServiceAccountToken: expected false"
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(field):
                yield f"{where}: {field}: expected false"
        for container in containers_of(pod):
            own = container.get("securityContext", {})
            if (
                own.get("allowPrivilegeEscalation") is not False
                or not own.get("readOnlyRootFilesystem")
                or own.get("capabilities", {}).get("drop") != ["ALL"]
                or own.get("capabilities", {}).get("add")
                or own.get("privileged")
            ):
                yield f"{where}: {container['name']}: securityContext: expected a read-only root and no privilege"
    for server in manifests.servers:
        if pod_of(server).get("securityContext", {}).get("runAsUser") != USER:
            yield f"{name_of(server)}: runAsUser: expected {USER}"


def volumes(manifests: Manifests) -> Iterator[str]:
    """What is mounted exists, /dev/shm is memory, and a volume is filled before it is read."""
    for workload in manifests.workloads:
        pod, where = pod_of(workload), name_of(workload)
        known = {volume["name"]: volume for volume in pod.get("volumes", [])}
        filled = {name for name, volume in known.items() if "emptyDir" not in volume}
        for container in containers_of(pod):
            mounts = container.get("volumeMounts", [])
            for mount in mounts:
                if mount["name"] not in known:
                    yield f"{where}: {container['name']}: volumeMounts: no volume {mount['name']!r}"
                elif mount.get("readOnly") and mount["name"] not in filled:
                    yield f"{where}: {container['name']}: reads the volume {mount['name']!r} before anything fills it"
            filled |= {mount["name"] for mount in mounts if not mount.get("readOnly")}
        for volume in known.values():
            for kind, field, name in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
                if field in volume and volume[field][name] not in manifests.names(kind):
                    yield f"{where}: volume {volume['name']}: no {kind} {volume[field][name]!r}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in manifests.names("PersistentVolumeClaim"):
                yield f"{where}: volume {volume['name']}: no PersistentVolumeClaim {claim!r}"
        for kind, field in (("ServiceAccount", "serviceAccountName"), ("PriorityClass", "priorityClassName")):
            if field in pod and pod[field] not in manifests.names(kind):
                yield f"{where}: {field}: no {kind} {pod[field]!r}"
    for server in manifests.servers:
        memory = {
            v["name"] for v in pod_of(server).get("volumes", []) if (v.get("emptyDir") or {}).get("medium") == "Memory"
        }
        mounts = {mount["mountPath"]: mount["name"] for mount in server_of(server).get("volumeMounts", [])}
        if mounts.get("/dev/shm") not in memory:
            yield f"{name_of(server)}: /dev/shm: expected an emptyDir in memory"
        for path in ("/tmp", "/cache"):
            if path not in mounts:
                yield f"{name_of(server)}: {path}: expected a volume, because the root is read-only"


def models(manifests: Manifests) -> Iterator[str]:
    """The model is built as `model_store` takes it, and the engine refuses before the front end's own queue fills."""
    several = sum(_most_replicas(manifests).values()) > 1
    for server in manifests.servers:
        where = name_of(server)
        try:
            config = manifests.serving(server)
        except ValueError as error:
            yield f"{where}: serving.yml: {error}"
            continue
        builders = [c for c in pod_of(server).get("initContainers", []) if c["name"] == "model"]
        if config is None or not builders:
            yield f"{where}: expected an init container `model` and its serving.yml"
            continue
        options = _build_options(server)
        try:
            if "merger" not in options:
                parse_schedule(options.get("schedule", ""))
        except ValueError as error:
            yield f"{where}: --schedule: {error}"
        offered = {port.get("name"): port["containerPort"] for port in server_of(server).get("ports", [])}
        if config.metrics_host != "0.0.0.0" or options.get("metrics-port") != str(offered.get("metrics")):
            yield f"{where}: metrics: expected metrics_host 0.0.0.0 and --metrics-port {offered.get('metrics')}"
        if _wants_gpu(server) and not config.device.startswith("cuda"):
            yield f"{where}: device: expected cuda where a GPU is asked for, got {config.device}"
        if several and config.precision == "auto":
            yield f"{where}: precision: expected a name, because masks of auto differ from chip to chip, got auto"
        if not config.torch_threads and not _knows_its_cores(server):
            yield f"{where}: torch_threads: expected a number, or MPM_CORES from requests.cpu, got neither"
        least = min(FILL_TOKENS, _window_tokens(config))
        fewest = int(options.get("batch-size", "0")) * least
        if config.max_inflight_tokens > fewest:
            yield (
                f"{where}: max_inflight_tokens: expected at most --batch-size x {least} = {fewest}, or requests "
                f"wait in the front end, unseen by autoscalers, got {config.max_inflight_tokens}"
            )


def memory(manifests: Manifests) -> Iterator[str]:
    """A server that holds all that it may hold stays below its limit: the kernel would end it without a word."""
    for server in manifests.servers:
        try:
            config = manifests.serving(server)
            limit = quantity(server_of(server).get("resources", {}).get("limits", {}).get("memory"))
        except ValueError:  # told by `models` and `quantities`; nobody has to have a limit
            continue
        if config is None:
            continue
        parts = {
            "the engine": CUDA_ENGINE_BYTES if _wants_gpu(server) else ENGINE_BYTES,
            "max_inflight_mib": config.max_inflight_mib * 2**20,
            "windows of max_inflight_tokens": config.max_inflight_tokens * TOKEN_BYTES,
        }
        if _is_triton(server):
            parts["/dev/shm"] = _shared_bytes(server)
        else:
            parts["Java"] = JAVA_BYTES
        if (needed := sum(parts.values())) > limit:
            told = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
            yield f"{name_of(server)}: memory: expected a limit of {_gib(needed)} or more ({told}), got {_gib(limit)}"


def _shared_bytes(server: Manifest) -> int:
    """What /dev/shm may hold, which counts as the pod's memory; 0 without a limit that can be read."""
    mounts = {mount["mountPath"]: mount["name"] for mount in server_of(server).get("volumeMounts", [])}
    for volume in pod_of(server).get("volumes", []):
        if volume["name"] == mounts.get("/dev/shm"):
            with suppress(ValueError):
                return int(quantity((volume.get("emptyDir") or {}).get("sizeLimit")))
    return 0


def _gib(size: Decimal | int) -> str:
    return f"{float(size) / 2**30:.3g} GiB"


def _window_tokens(config: ServingConfig) -> int:
    """Of a window of the size that the configuration sets, on patches of 16 pixels; FILL_TOKENS where it sets none."""
    size = config.inference.get("window_size")
    return (size // 16) ** 2 + 1 if isinstance(size, int) else FILL_TOKENS


def _knows_its_cores(server: Manifest) -> bool:
    given = {env["name"]: env.get("valueFrom", {}) for env in server_of(server).get("env", [])}
    return given.get("MPM_CORES", {}).get("resourceFieldRef", {}).get("resource") == "requests.cpu"


def _is_triton(workload: Manifest) -> bool:
    return any("--server=triton" in c.get("args", []) for c in running_of(pod_of(workload)))


def _wants_gpu(server: Manifest) -> bool:
    return any(name.startswith("nvidia.com/") for name in server_of(server).get("resources", {}).get("limits", {}))


def digests(manifests: Manifests) -> Iterator[str]:
    """Every image is named by its digest."""
    for workload in manifests.workloads:
        pod = pod_of(workload)
        images = {f"{container['name']}: image": container["image"] for container in containers_of(pod)}
        images |= {f"{v['name']}: image": v["image"]["reference"] for v in pod.get("volumes", []) if "image" in v}
        for where, image in images.items():
            if not _DIGEST.fullmatch(image):
                yield f"{name_of(workload)}: {where}: expected NAME@sha256:DIGEST, got {image!r}"


def placeholders(manifests: Manifests) -> Iterator[str]:
    """What the README leaves to be filled in has been."""
    yield from _names_like(manifests, _PLACEHOLDER)


def examples(manifests: Manifests) -> Iterator[str]:
    """No host and no registry is an example's."""
    yield from _names_like(manifests, _EXAMPLE)


def _names_like(manifests: Manifests, pattern: re.Pattern[str]) -> Iterator[str]:
    for document in manifests.documents:
        if document["kind"] != "ConfigMap":
            for path, text in _texts(document):
                for found in pattern.findall(text):
                    yield f"{name_of(document)}: {path}: expected a name of yours, got {found!r}"


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a manifest, and where it stands."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _texts(value, f"{path}.{key}" if path else str(key))


def jobs(manifests: Manifests) -> Iterator[str]:
    """Pods of an Indexed Job share the pictures out among as many as there are: others would be nobody's."""
    for job in manifests.of("Job"):
        spec = job["spec"]
        for container in pod_of(job)["containers"]:
            for argument in container.get("args", []):
                expected = f"--shard=$(JOB_COMPLETION_INDEX)/{spec.get('completions')}"
                mode = spec.get("completionMode")
                if argument.startswith("--shard=") and (mode != "Indexed" or argument != expected):
                    where = f"{name_of(job)}: {container['name']}"
                    yield f"{where}: expected completionMode Indexed and {expected}, got {mode} and {argument}"


def image_volumes(manifests: Manifests, kubernetes: tuple[int, int]) -> Iterator[str]:
    """No volume is one that an older API server would drop."""
    for workload in manifests.workloads:
        for volume in pod_of(workload).get("volumes", []):
            if "image" in volume and kubernetes < IMAGE_VOLUMES:
                yield (
                    f"{name_of(workload)}: volume {volume['name']}: expected no image, which Kubernetes "
                    f"{'.'.join(map(str, kubernetes))} drops without a word (1.35 mounts it); use model-pvc instead"
                )


CHECKS: tuple[Callable[[Manifests], Iterator[str]], ...] = (
    selectors,
    namespaces,
    names,
    quantities,
    gpus,
    ports,
    routes,
    probes,
    endings,
    edges,
    disruptions,
    scaling,
    confinement,
    volumes,
    models,
    memory,
    jobs,
    placeholders,
)
RELEASE_CHECKS = (digests, examples)


def problems(manifests: Manifests, *, release: bool = False, kubernetes: tuple[int, int] = IMAGE_VOLUMES) -> list[str]:
    """What is wrong, a sentence each; with `release` also images without a digest, and names of examples."""
    checks = (*CHECKS, *RELEASE_CHECKS) if release else CHECKS
    found = [f"{check.__name__}: {problem}" for check in checks for problem in check(manifests)]
    return found + [f"image_volumes: {problem}" for problem in image_volumes(manifests, kubernetes)]
