"""Against a real cluster, where TEST_KUBECONFIG names one: dry runs on its API server, and a rollout and back."""

import os
from collections.abc import Iterator

import pytest
import yaml
from rendering import OVERLAYS, kubectl, manifests, render

from k8s.manifests import Manifests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = os.environ.get("TEST_KUBECONFIG", "")
SERVER = os.environ.get("TEST_OVERLAY", "overlays/dev-cpu/torchserve")
IMAGE = os.environ.get("TEST_IMAGE", "")  # one that the cluster can pull, in place of the overlay's


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    if not CONFIG:
        pytest.skip("TEST_KUBECONFIG names no cluster")


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """The namespace itself, in which dry runs can be made; it goes when the tests are over."""
    (found,) = manifests(SERVER).of("Namespace")
    done = kubectl("apply", "-f", "-", config=CONFIG, stdin=yaml.safe_dump(found))
    assert done.returncode == 0, done.stderr
    yield found["metadata"]["name"]
    kubectl("delete", "namespace", found["metadata"]["name"], "--wait=true", config=CONFIG)


@pytest.mark.usefixtures("namespace")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_server_takes_the_overlay(overlay: str) -> None:
    unknown, refused = set(), []
    for document in manifests(overlay).documents:
        done = kubectl("apply", "--dry-run=server", "-f", "-", config=CONFIG, stdin=yaml.safe_dump(document))
        if "no matches for kind" in done.stderr:
            unknown.add(document["kind"])
        elif done.returncode or "Warning" in done.stderr:
            refused.append(done.stderr)
    assert not refused
    if unknown:
        pytest.skip(f"all else is taken, but the cluster doesn't know {', '.join(sorted(unknown))}")


def test_a_rollout_there_and_back(namespace: str) -> None:
    def run(*arguments: str, stdin: str = "") -> str:
        done = kubectl("-n", namespace, *arguments, config=CONFIG, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = render(SERVER)
    (server,) = Manifests.parse(text).servers
    image = server["spec"]["template"]["spec"]["containers"][0]["image"]
    run("apply", "-f", "-", stdin=text.replace(image, IMAGE or image))
    wait = ("rollout", "status", "deployment/segmenter", "--timeout=600s")
    run(*wait)
    run("apply", "-f", "-", stdin=text.replace(image, IMAGE or image).replace("--schedule=2,5", "--schedule=off"))
    run(*wait)
    args = "jsonpath={.spec.template.spec.initContainers[?(@.name=='model')].args}"
    assert "--schedule=off" in run("get", "deployment/segmenter", "-o", args)
    run("rollout", "undo", "deployment/segmenter")
    run(*wait)
    assert "--schedule=2,5" in run("get", "deployment/segmenter", "-o", args)
    pods = "jsonpath={range .items[*]}{.status.containerStatuses[0].restartCount} {end}"
    assert set(run("get", "pods", "-l", "app.kubernetes.io/name=segmenter", "-o", pods).split()) == {"0"}
