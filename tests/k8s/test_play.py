"""The overlay for any node, run by podman from its own manifests: init containers, ConfigMap, limits, read-only root.

podman starts no probes and knows no preStop: the test runs the probes itself.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rendering import ROOT, render

from handlers.api.formats.views import encode_picture
from handlers.client import connect, read_metrics
from handlers.launch.processes import free_port
from k8s.manifests import Manifests, containers_of, pod_of, server_of
from mpm_ops import load_segmenter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_PORTS = {"torchserve": ("8080", "8090"), "triton": ("8000", "8001", "8002", "8090")}
_UNKNOWN = ("topologySpreadConstraints", "priorityClassName", "serviceAccountName")  # to podman, or of no use to it
_CONFIG = """\
[containers]
shm_size = "256m"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


@dataclass(frozen=True, slots=True)
class Played:
    """A pod that podman made of a Deployment.

    Attributes:
        deployment: as it was played.
        pod, container: podman's names.
        ports: those of the pod by those of the manifests.
        environment: for podman.
        seconds: from nothing to the first mask.
    """

    deployment: dict[str, Any]
    pod: str
    container: str
    ports: dict[str, int]
    environment: dict[str, str]
    seconds: float

    def podman(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["podman", *arguments], env=self.environment, capture_output=True, text=True)

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the server's container."""
        return self.podman("exec", self.container, *command)

    def probe(self, name: str) -> "subprocess.CompletedProcess[str]":
        return self.run(*server_of(self.deployment)[name]["exec"]["command"])


def _image(server: str) -> None:
    """Have the image that the overlay names; it is built where it isn't there."""
    if not shutil.which("podman") or os.geteuid() != 0:
        pytest.skip("needs podman, and to be root")
    name = f"localhost/mpm-segmenter-{server}:test"
    if subprocess.run(["podman", "image", "exists", name]).returncode == 0:
        return
    builder = ROOT / "tests" / "docker" / "image_building.py"
    if not builder.is_file():
        pytest.skip(f"there is no image {name}")
    done = subprocess.run([sys.executable, str(builder), server], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} can't be built: {done.stderr.strip().splitlines()[-1]}")


def _flatten(server: str, ports: dict[str, int], name: str) -> tuple[str, dict[str, Any]]:
    """What podman takes of the overlay, on the machine's network and on free ports."""
    found = Manifests.parse(render(f"overlays/dev-cpu/{server}"))
    text = re.sub(rf"\b({'|'.join(ports)})\b", lambda port: str(ports[port[1]]), json.dumps(found.servers[0]))
    deployment: dict[str, Any] = json.loads(text)
    deployment["metadata"]["name"] = name
    pod = deployment["spec"]["template"]["spec"]
    pod["restartPolicy"] = "Never"  # podman would start init containers again and again
    for volume in [*pod["volumes"], *(mount for each in containers_of(pod) for mount in each["volumeMounts"])]:
        volume["name"] = f"{name}-{volume['name']}"  # podman's volumes are the machine's
    # An emptyDir in memory is everybody's to write to; podman's would be root's, its own /dev/shm is not.
    for has_shm in (pod["volumes"], *(container["volumeMounts"] for container in containers_of(pod))):
        has_shm[:] = [volume for volume in has_shm if volume["name"] != f"{name}-shm"]
    pod["hostNetwork"] = True
    for field in _UNKNOWN:
        pod.pop(field, None)
    for container in pod["containers"]:
        container.pop("ports", None)  # of the machine itself now
    return yaml.safe_dump_all([*found.of("ConfigMap"), deployment]), deployment


@pytest.fixture(scope="module", params=["torchserve", "triton"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    server = request.param
    _image(server)
    folder = tmp_path_factory.mktemp("play")
    (folder / "containers.conf").write_text(_CONFIG)
    environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
    ports = {port: free_port() for port in _PORTS[server]}
    name = f"segmenter-{ports['8090']}"
    text, deployment = _flatten(server, ports, name)
    manifest = folder / "manifest.yml"
    manifest.write_text(text)
    start = time.monotonic()
    done = subprocess.run(["podman", "play", "kube", str(manifest)], env=environment, capture_output=True, text=True)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        pod = f"{name}-pod-0"
        waiting = Played(deployment, pod, f"{pod}-server", ports, environment, 0.0)
        while (probe := waiting.probe("startupProbe")).returncode:
            logs = waiting.podman("logs", waiting.container)
            assert time.monotonic() < start + 240, probe.stderr + logs.stdout + logs.stderr
            time.sleep(1)
        yield Played(deployment, pod, f"{pod}-server", ports, environment, time.monotonic() - start)
    finally:
        down = ["podman", "play", "kube", "--down", str(manifest)]
        subprocess.run(down, env=environment, capture_output=True, text=True)
        volumes = [volume.get("configMap", volume)["name"] for volume in pod_of(deployment)["volumes"]]
        subprocess.run(
            ["podman", "volume", "rm", "--force", *volumes], env=environment, capture_output=True, text=True
        )


def _serves(played: Played) -> str:
    return "torchserve" if "8080" in played.ports else "triton"


def test_it_answers_a_picture_as_the_library_does(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    image = (
        np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(32, axis=0).repeat(32, axis=1)
    )
    picture = encode_picture(image, "image/png")
    paths = {"8080": "predictions", "8000": "v2/models"}
    (url,) = (f"http://127.0.0.1:{played.ports[p]}/{paths[p]}/segmenter" for p in paths.keys() & played.ports.keys())
    with connect(url) as client:
        answer = client.ask(picture)
    assert answer.status == 200, answer.error
    if answer.tokens:  # Triton tells none
        assert answer.tokens[1] < answer.tokens[0], "the schedule of the manifest merges"
    model = load_segmenter(ROOT / "model_store" / "demo" / "checkpoint.pth", schedule=(2, 5), runtime="auto")
    assert (np.asarray(Image.open(io.BytesIO(answer.body))) == model.segment(image)).all()
    with capsys.disabled():
        peak = played.run("cat", "/sys/fs/cgroup/memory.peak").stdout.strip() or "unknown"
        print(f"\n{_serves(played)}: first mask after {played.seconds:.1f} s; memory.peak {peak}")


def test_its_probes_are_green(played: Played) -> None:
    for name in ("startupProbe", "livenessProbe"):
        done = played.probe(name)
        assert done.returncode == 0, done.stderr
    metrics = read_metrics(f"http://127.0.0.1:{played.ports['8090']}/metrics")
    assert metrics.labels("mpm_model_info", "schedule") == ["2,5"]


def test_it_is_confined(played: Played) -> None:
    assert played.run("id", "-u").stdout == "10001\n"
    for path in ("/", "/opt/mpm", "/models"):
        assert played.run("touch", f"{path}/x").returncode != 0, f"{path} can be written"
    for path in ("/tmp", "/cache", "/dev/shm"):
        assert played.run("touch", f"{path}/x").returncode == 0, f"{path} can't be written"
    status = played.run("cat", "/proc/1/status").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_the_liveness_probe_notices_a_dead_engine_and_so_does_readiness(played: Played) -> None:
    if _serves(played) == "triton":
        pytest.skip("a model that stands still can make this Triton abort; test_triton_launcher.py kills its model")
    code = (
        "import os, signal, psutil\n"
        "for p in psutil.process_iter(['cmdline']):\n"
        "    line = ' '.join(p.info['cmdline'] or [])\n"
        "    if 'model_service_worker' in line and p.pid != os.getpid():\n"
        "        os.kill(p.pid, signal.SIGSTOP)\n"
        "        print(p.pid)\n"
    )
    stopped = played.run("python", "-c", code).stdout.split()
    assert stopped
    url = server_of(played.deployment)["livenessProbe"]["exec"]["command"][-1]
    assert played.run("mpm", "health", "--timeout=3", url).returncode == 1
    for pid in stopped:
        played.run("python", "-c", f"import os, signal; os.kill({pid}, signal.SIGCONT)")
    assert played.probe("livenessProbe").returncode == 0


def test_it_ends_in_time(played: Played) -> None:
    """The last test of each pod."""
    grace = pod_of(played.deployment)["terminationGracePeriodSeconds"]
    start = time.monotonic()
    done = played.podman("stop", "--time", str(grace), played.container)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < grace, "it was killed"
    code = played.podman("inspect", "--format", "{{.State.ExitCode}}", played.container).stdout.strip()
    assert code == "0"
