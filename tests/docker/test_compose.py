"""The files for one host: read as the client reads them, and held against the images and the files they mount."""

import inspect
import re
import shlex
import shutil
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from debian_tools import MissingToolError, find_tool
from dockerfile import METRICS_PORT, TARGETS, TRITON_METRICS_PORT, command_of, last

from handlers.cli import main, serve
from handlers.edge.limits import Limits
from loadtest.protocols import PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "compose"
FILES = ("compose.yml", "cuda.yml", "gpus.yml", "model.yml")
GPUS = ["compose.yml", "gpus.yml", "model.yml"]
ALL = ["compose.yml", "cuda.yml", "model.yml"]
OURS = r"mpm-segmenter-(loadtest|\$\{SERVER:-torchserve\}):\$\{TAG:-latest\}(-cuda|\$\{VARIANT_SUFFIX:-\})?"


def read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / file).read_text())
    return content


SERVICES = [(file, name, service) for file in FILES for name, service in read(file)["services"].items()]
IDS = [f"{file} {name}" for file, name, _ in SERVICES]


@pytest.fixture(scope="module")
def client() -> list[str]:
    """Compose's own client, which knows all there is to know of its format."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither docker's plugin compose nor docker-compose is installed")


@pytest.mark.parametrize("server", TARGETS)
@pytest.mark.parametrize(
    "files", [["compose.yml"], ["compose.yml", "cuda.yml"], ["compose.yml", "model.yml"], GPUS, ALL]
)
def test_the_client_takes_them(client: list[str], files: list[str], server: str) -> None:
    chosen = [argument for file in files for argument in ("-f", str(FOLDER / file))]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "SERVER": server, "CHECKPOINT": "/somewhere"}
    done = subprocess.run([*client, *chosen, "config"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)["services"]["server"]
    assert made["build"]["target"] == server
    assert made["image"].startswith(f"mpm-segmenter-{server}:")
    assert made["image"].endswith("-cuda") == bool({"cuda.yml", "gpus.yml"} & set(files))


def test_a_checkpoint_has_to_be_named(client: list[str]) -> None:
    command = [*client, "-f", str(FOLDER / "compose.yml"), "-f", str(FOLDER / "model.yml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert done.returncode
    assert "a folder with checkpoint.pth" in done.stderr


@pytest.mark.parametrize(("file", "name", "service"), SERVICES, ids=IDS)
def test_what_is_mounted_exists(file: str, name: str, service: dict[str, Any]) -> None:
    named = {volume for one in FILES for volume in read(one).get("volumes", {})}
    for mount in service.get("volumes", []):
        source = re.sub(r"\$\{[^}]*\}", "/", mount).split(":")[0]
        made = source.startswith("../../build/")  # by who runs it
        assert source in named or made or (FOLDER / source).exists(), mount
    if "build" in service and "dockerfile" in service["build"]:
        context = FOLDER / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).is_file()
        assert (context / "pyproject.toml").is_file()


@pytest.mark.parametrize(("file", "name", "service"), SERVICES, ids=IDS)
def test_images_have_a_version(file: str, name: str, service: dict[str, Any]) -> None:
    image = service.get("image", "")
    if name in ("server", "server-2", "edge", "model", "loadtest"):
        assert not image or re.fullmatch(OURS, image)
    else:
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image)


def test_our_containers_have_no_rights() -> None:
    services = read("compose.yml")["services"]
    ours = [services[name] for name in ("server", "edge", "loadtest")]
    ours += [read("model.yml")["services"]["model"], read("gpus.yml")["services"]["server-2"]]
    for service in ours:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_port_is_on_loopback() -> None:
    ports = [port for _, _, service in SERVICES for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_servers_ports_are_the_images() -> None:
    published = {port.split(":")[2] for port in read("compose.yml")["services"]["server"]["ports"]}
    exposed = {port for target in TARGETS for port in last(target, "EXPOSE").split()}
    assert published == exposed - {METRICS_PORT, TRITON_METRICS_PORT}
    ours, tritons, edges = read("prometheus.yml")["scrape_configs"]
    assert ours["static_configs"] == [{"targets": [f"server:{METRICS_PORT}"]}]
    assert ours["job_name"].endswith("mpm")  # the rules look for it
    command = command_of("triton")
    assert command[command.index("--triton-metrics-port") + 1] == TRITON_METRICS_PORT
    assert tritons["static_configs"] == [{"targets": [f"server:{TRITON_METRICS_PORT}"]}]
    edge = dict(word.partition("=")[::2] for word in services()["edge"]["command"])
    assert edges["static_configs"] == [{"targets": [f"edge:{edge['--metrics-port']}"]}]
    for others in (tritons, edges):
        assert not others["job_name"].endswith("mpm"), "not everybody has such a port, and nobody should be told so"


@pytest.mark.parametrize("server", TARGETS)
def test_the_edge_finds_the_server_and_ends_before_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the server's own port, whichever it is; compose stops what depends on another first."""
    edge = services()["edge"]
    assert set(edge["depends_on"]) == {"server"}
    upstream: list[str] = []

    def serve(coroutine: Coroutine[Any, Any, None]) -> None:
        upstream.append(str(inspect.getcoroutinelocals(coroutine)["upstream"]))
        coroutine.close()

    monkeypatch.setattr("handlers.launch.processes.listen", lambda *_: None)
    monkeypatch.setattr("asyncio.run", serve)
    assert main([word.replace("${SERVER:-torchserve}", server) for word in edge["command"][1:]]) == 0
    port = command_of(server)[command_of(server).index("--port") + 1]
    assert upstream[0].rstrip("/") == f"http://server:{port}"
    assert [port.rsplit(":", 1)[1] for port in edge["ports"]] == ["8088"]
    assert "--port=8088" in edge["command"]
    assert int(edge["stop_grace_period"].removesuffix("s")) > Limits().answer_seconds


def test_the_proxy_finds_a_server_for_each_gpu() -> None:
    made = read("gpus.yml")["services"]
    servers = [made["server"], made["server-2"]]
    devices = [each["deploy"]["resources"]["reservations"]["devices"] for each in servers]
    assert [one["device_ids"] for (one,) in devices] == [["0"], ["1"]]
    proxied = (FOLDER.parent / "haproxy.cfg").read_text()
    aliases = [alias for each in servers for alias in each["networks"]["default"]["aliases"]]
    options = dict(word.partition("=")[::2] for word in made["server"]["command"])
    wanted = re.findall(
        r'server replica-\d "\$\{REPLICA_\d-([\w-]+):(\d+)\}" port "\$\{REPLICA_\d_READY-(\d+)\}"', proxied
    )
    assert wanted == [(alias, options["--port"], options["--ready-port"]) for alias in aliases]
    assert made["proxy"]["depends_on"].keys() == {"server", "server-2"}
    assert made["proxy"]["ports"][0].endswith(re.findall(r"LISTEN-(:\d+)", proxied)[0])
    grace = int(made["server-2"]["stop_grace_period"].removesuffix("s"))
    assert grace == int(services()["server"]["stop_grace_period"].removesuffix("s")) + int(
        options["--lame-duck-seconds"]
    )
    for field in ("restart", "read_only", "shm_size", "tmpfs"):
        assert services()["server"][field] == made["server-2"][field]
    (ours, *_) = read("prometheus.yml")["scrape_configs"]
    assert ours["dns_sd_configs"] == [{"names": ["server-2"], "type": "A", "port": int(METRICS_PORT)}]


@pytest.mark.parametrize("server", TARGETS)
def test_mpm_takes_the_command_of_each_gpu(server: str) -> None:
    command = read("gpus.yml")["services"]["server"]["command"]
    words = [word.replace("${SERVER:-torchserve}", server) for word in command]
    with serve.make_context("serve", words[2:]) as context:
        assert context.params["server"] == server


def services() -> dict[str, Any]:
    found: dict[str, Any] = read("compose.yml")["services"]
    return found


def test_the_server_may_take_its_time_to_end() -> None:
    """Longer than the 60 s that launchers give to what is in flight, and the 14 s in which they end the rest."""
    assert int(read("compose.yml")["services"]["server"]["stop_grace_period"].removesuffix("s")) > 74


def test_what_ends_is_started_again() -> None:
    """A launcher ends with status 1 when nothing inside brings its model back; jobs that are done stay so."""
    merged: dict[str, dict[str, Any]] = {}
    for _, name, service in SERVICES:
        merged[name] = merged.get(name, {}) | service
    once = {"model", "loadtest"}
    assert {name for name in merged if "restart" not in merged[name]} == once
    assert {merged[name]["restart"] for name in merged.keys() - once} == {"unless-stopped"}


def test_a_server_by_hand_is_started_again_too() -> None:
    """The commands of the README that leave a server running; docker refuses --restart together with --rm."""
    text = (ROOT / "docker" / "README.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("docker run ")]
    servers = [words for words in commands if "-p" in words]
    assert len(servers) == 2
    for words in servers:
        assert words[words.index("--restart") + 1] == "unless-stopped"
        assert "--rm" not in words


def test_a_model_of_ones_own_is_built_where_the_server_looks() -> None:
    services = read("model.yml")["services"]
    command = dict(word.split("=", 1) for word in services["model"]["command"] if "=" in word)
    assert "--alone" in services["model"]["command"], "else the image's demo, which fills the volume, is served too"
    assert command["--out"] in command_of("torchserve")
    assert command["--out"] in command_of("triton")
    assert command["--metrics-port"] == METRICS_PORT
    for option, place in (("--checkpoint", "/checkpoint/"), ("--config", "/config/"), ("--out", "/models")):
        assert command[option].startswith(place)
        assert any(f":{place}"[:-1] in mount for mount in services["model"]["volumes"])


@pytest.mark.parametrize("server", TARGETS)
def test_the_load_test_finds_the_server(server: str) -> None:
    """On its own loopback, at the port that the protocol has by itself, for either server."""
    services = read("compose.yml")["services"]
    assert services["loadtest"]["network_mode"] == "service:server"
    command = dict(word.split("=", 1) for word in services["loadtest"]["command"] if "=" in word)
    assert command["--protocol"].replace("${SERVER:-torchserve}", server) == f"${{LOADTEST_PROTOCOL:-{server}}}"
    assert "--host" not in command
    port = command_of(server)[command_of(server).index("--port") + 1]
    assert PROTOCOLS[server].host == f"http://127.0.0.1:{port}"
    assert command["--metrics"] == f"http://127.0.0.1:{METRICS_PORT}/metrics"


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    try:
        promtool = find_tool("promtool")
    except MissingToolError as error:
        pytest.skip(str(error))
    mounts = read("compose.yml")["services"]["prometheus"]["volumes"]
    config = (FOLDER / "prometheus.yml").read_text()
    for mount in mounts:
        source, target = mount.split(":")[:2]
        config = config.replace(target, str((FOLDER / source).resolve()))
    (tmp_path / "prometheus.yml").write_text(config)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rules found" in done.stdout


def test_prometheus_keeps_what_the_dashboards_show_of_single_requests() -> None:
    """Here, and as k8s/README.md has it installed."""
    shown = [
        path for path in (ROOT / "k8s/monitoring/dashboards").glob("*.json") if '"exemplar": true' in path.read_text()
    ]
    assert shown
    assert "--enable-feature=exemplar-storage" in read("compose.yml")["services"]["prometheus"]["command"]
    assert "prometheusSpec.enableFeatures={exemplar-storage}" in (ROOT / "k8s/README.md").read_text()


def test_grafana_finds_its_dashboards() -> None:
    mounts = dict(mount.split(":")[1::-1] for mount in read("compose.yml")["services"]["grafana"]["volumes"])
    (provider,) = read("grafana-dashboards.yml")["providers"]
    folder = FOLDER / mounts[provider["options"]["path"]]
    boards = sorted(path.name for path in folder.glob("*.json"))
    assert boards
    environment = read("compose.yml")["services"]["grafana"]["environment"]
    assert Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).name in boards
    (source,) = read("grafana-datasources.yml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
