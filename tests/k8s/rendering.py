"""What kubectl makes of the overlays, each rendered once."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from k8s.manifests import Manifests

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
_MINE = ("mine", "rendered")  # what the README has operators make, and what tests make in a copy
OVERLAYS = sorted(
    path.parent.relative_to(K8S).as_posix()
    for path in (K8S / "overlays").rglob("kustomization.yaml")
    if "kind: Kustomization" in path.read_text() and path.parent.name not in _MINE
)
COMPONENTS = sorted({path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")} - {"production"})
NAMES = "model=roads, grafana=https://grafana.example.com"
_REPLACED = {"hpa": "keda"}  # what goes where the other comes
_OF_TRITON = {"grpcroute"}  # what TorchServe has nothing for


def kubectl(*arguments: str, config: str = os.devnull, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Run kubectl; without a configuration it talks to no cluster."""
    return subprocess.run(
        [require_kubectl(), *arguments],
        env=os.environ | {"KUBECONFIG": config},
        input=stdin,
        capture_output=True,
        text=True,
    )


@functools.cache
def require_kubectl() -> str:
    """Path of a kubectl that knows components; a test without one is skipped."""
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([found, "version", "--client", "-o", "json"], capture_output=True, text=True)
    version = json.loads(done.stdout or "{}").get("kustomizeVersion", "v0")
    if int(version.removeprefix("v").partition(".")[0]) < 5:
        pytest.skip(f"kubectl renders with kustomize {version}, and 5 or newer is needed")
    return found


@functools.cache
def render(overlay: str) -> str:
    """The YAML of an overlay, by its path below k8s/."""
    done = kubectl("kustomize", str(K8S / overlay))
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def render_with(component: str, server: str = "") -> str:
    """The YAML of the H100 overlay with one more component, or with it in the place of what it replaces."""
    server = server or ("triton" if component in _OF_TRITON else "torchserve")
    text = (K8S / "components" / "production" / "kustomization.yaml").read_text()
    used = [line.removeprefix("  - ../") for line in text.splitlines() if line.startswith("  - ../")]
    used = [name for name in used if name != _REPLACED.get(component)]
    used += [component] if component not in used else []  # the last, as those have to be that replace
    namespace = "vision" if component == "names" else "segmenter"
    lines = ["kind: Kustomization", f"namespace: {namespace}", "resources:", "- ../../base/common"]
    lines += [f"- ../../base/{server}"]
    lines += [f"- ../../base/canary/{server}"] if component in ("canary", "shadow") else []
    if component == "names":
        lines += ["configMapGenerator:", "- name: names", f"  literals: [namespace={namespace}, {NAMES}]"]
        lines += ['  options: {annotations: {config.kubernetes.io/local-config: "true"}}']
    lines += ["components:", "- ../h100-sxm/node", *(f"- ../../components/{name}" for name in used)]
    return render_overlay("\n".join(lines))


def render_overlay(text: str) -> str:
    """The YAML of an overlay that isn't there: its kustomization.yaml, as if it lay in overlays/rendered."""
    with tempfile.TemporaryDirectory() as folder:  # a copy, because kustomize takes no absolute paths
        copy = Path(folder) / "k8s"
        shutil.copytree(K8S, copy, ignore=shutil.ignore_patterns("__pycache__", *_MINE))
        overlay = copy / "overlays" / "rendered"
        overlay.mkdir()
        (overlay / "kustomization.yaml").write_text(text)
        done = kubectl("kustomize", str(overlay))
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(overlay: str) -> Manifests:
    return Manifests.parse(render(overlay))
