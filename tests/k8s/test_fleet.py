"""The example of a hundred GPUs, as a whole; and that what its operator is told to type is understood."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from rendering import K8S, kubectl, manifests

from k8s.check import CLUSTER_WIDE, problems
from k8s.manifests import Manifests, containers_of, matches, pod_of, server_of

MODELS = ("streets", "roads")
PAGE = (K8S / "fleet.md").read_text()
RUNBOOK = (K8S / "monitoring" / "runbook.md").read_text()
ENTRIES = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
NIGHT = re.findall(r"\[(\w+)\]\(monitoring/runbook\.md#(\w+)\)", PAGE)


def fleet(name: str) -> Manifests:
    return manifests(f"overlays/fleet/{name}")


@pytest.mark.parametrize("name", ["gateway", *MODELS])
def test_all_but_names_and_images_may_be_released(name: str) -> None:
    found = problems(fleet(name), release=True, kubernetes=(1, 32))
    assert {line.partition(":")[0] for line in found} <= {"digests", "examples"}, found
    assert all("example.com" in line or "NAME@sha256" in line for line in found)


def test_models_share_one_address_and_nothing_else() -> None:
    (gateway,) = fleet("gateway").of("Gateway")
    (listener,) = gateway["spec"]["listeners"]
    paths, names = [], []
    for model in MODELS:
        (route,) = fleet(model).of("HTTPRoute")
        (parent,) = route["spec"]["parentRefs"]
        assert parent == {"name": gateway["metadata"]["name"], "namespace": gateway["metadata"]["namespace"]}
        assert route["spec"]["hostnames"] == [listener["hostname"]]
        (namespace,) = fleet(model).of("Namespace")
        assert matches(listener["allowedRoutes"]["namespaces"]["selector"], namespace["metadata"]["labels"])
        (rule,) = route["spec"]["rules"]
        assert {match["path"]["type"] for match in rule["matches"]} == {"Exact"}
        assert {each["type"] for each in rule["filters"]} == {"RequestHeaderModifier"}, "nothing is rewritten"
        paths.append({match["path"]["value"] for match in rule["matches"]})
        names.append({(d["kind"], d["metadata"]["name"]) for d in fleet(model).of(*CLUSTER_WIDE)})
    for one, other in itertools.product(*paths):
        assert not one.startswith(other)
        assert not other.startswith(one)
    assert not names[0] & names[1], "one apply would undo the other"


def row(title: str) -> list[str]:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {title}")]
    return [cell.strip() for cell in line.split("|")[2:4]]


@pytest.mark.parametrize("model", MODELS)
def test_the_table_of_the_page(model: str) -> None:
    found, column = fleet(model), MODELS.index(model)
    (scaler,), (quota,), (priority,) = (found.of(k) for k in ("ScaledObject", "ResourceQuota", "PriorityClass"))
    spec = scaler["spec"]
    assert row("replicas")[column] == f"{spec['minReplicaCount']} to {spec['maxReplicaCount']}"
    assert spec["minReplicaCount"] < spec["fallback"]["replicas"] < spec["maxReplicaCount"]
    canaries = [s["spec"]["replicas"] for s in found.servers if s["metadata"]["name"].endswith("canary")]
    assert row("canary")[column] == ("none" if not canaries else str(*canaries))
    (device,) = {
        name
        for server in found.servers
        for name in server_of(server)["resources"]["requests"]
        if name.startswith("nvidia.com/")
    }
    hard = quota["spec"]["hard"]
    assert row("quota")[column] == hard[f"requests.{device}"] == hard["pods"]
    assert int(hard["pods"]) <= int(row("devices there")[column]), "pods would wait that alerts promised"
    others = {name for name in hard if name.startswith("requests.nvidia.com/")} - {f"requests.{device}"}
    assert {hard[name] for name in others} == {"0"}
    assert row("priority")[column].partition(":")[0] == str(priority["value"])


def test_five_alerts_have_what_to_type() -> None:
    assert len(NIGHT) == 5
    for alert, anchor in NIGHT:
        assert anchor == alert.lower()
        assert "kubectl" in ENTRIES[alert]


COMMANDS = [
    line.strip()
    for text in (RUNBOOK, PAGE)
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if line.startswith("kubectl ")
]


@pytest.fixture(scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose API server refuses connections: all that kubectl parses before is parsed."""
    path = tmp_path_factory.mktemp("kube") / "config"
    path.write_text(
        "{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}],"
        " users: [{name: a, user: {}}], clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]}"
    )
    return path


@pytest.mark.parametrize("line", COMMANDS)
def test_kubectl_takes_the_line(line: str, nobody: Path) -> None:
    command = re.sub(r"\$\([^)]*\)", "a", line.partition(" | ")[0])
    words = shlex.split(command, comments=True)[1:]
    words = [str(K8S.parent / word) if word.startswith("k8s/") else word for word in words]
    done = kubectl(*words, config=str(nobody))
    assert "127.0.0.1:9" in done.stderr, done.stderr


def test_what_lines_name_is_in_the_manifests() -> None:
    found = manifests("overlays/h100-sxm/canary")
    there = {f"{d['kind'].lower()}/{d['metadata']['name']}" for d in found.documents}
    kinds = {"deployment", "scaledobject", "httproute"}
    named = set(re.findall(r"(\w+)[ /]segmenter(?![\w-])", "\n".join(COMMANDS))) & kinds
    assert named == kinds
    assert {f"{kind}/segmenter" for kind in kinds} <= there
    containers = {container["name"] for server in found.servers for container in containers_of(pod_of(server))}
    assert set(re.findall(r" -c (\w+)", "\n".join(COMMANDS))) <= containers
    assert len(COMMANDS) > 15


def test_a_line_that_kubectl_does_not_take(nobody: Path) -> None:
    assert "unknown flag" in kubectl("get", "pods", "--field-selecter=a", config=str(nobody)).stderr
