"""Dashboards and rules against a real server that a real Prometheus watches."""

import json
import math
import re
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from debian_tools import MissingToolError, find_tool
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from handlers.api.formats.views import encode_picture
from handlers.client import connect, fetch
from handlers.edge.metrics import render
from handlers.launch.processes import free_port
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from k8s.cli import graph_url
from k8s.generate import dashboards
from k8s.monitoring.boards import BOARDS, OBJECTIVES, Board, concrete
from k8s.monitoring.grafana import RUNBOOK, render_runbook
from k8s.monitoring.prometheus import RULES, Prometheus

pytest_plugins = ("tiny_server",)

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "k8s" / "monitoring"
PANELS = [(board, panel) for board in BOARDS for panel in board.panels]
RULES_TESTS = ("rules_test.yml", "rules_days_test.yml")
RECORDED, ALERTS = (group["rules"] for group in yaml.safe_load(RULES.read_text())["groups"])
# What components/monitoring adds of a pod
OF_THE_POD = {"track": "stable", "node": "node-1", "gpu_product": "NVIDIA-H100-80GB-HBM3"}
FOREIGN = {"mpm_ops"}  # what looks like a metric's name and is none
OF_THE_EDGE = {
    "mpm_restarts_total",
    *(line.split()[2] for line in render(None).decode().splitlines() if "TYPE" in line),
}


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return find_tool("promtool")
    except MissingToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def program() -> Path:
    """Prometheus's."""
    try:
        return find_tool("prometheus")
    except MissingToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prometheus(program: Path, metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with Prometheus([f"127.0.0.1:{metrics_port}"], folder, program=program, labels=OF_THE_POD) as started:
        yield started


def ask(server: TorchServe, picture: bytes) -> int:
    """The status of an answer."""
    return fetch(f"{server.url}/predictions/tiny", picture, timeout_seconds=60).status


@pytest.fixture(scope="module")
def watched(server: TorchServe, prometheus: Prometheus, photo: Callable[..., np.ndarray]) -> tuple[float, float]:
    """Puts load on the server while Prometheus watches; when it began and ended, in seconds since the epoch."""
    pictures = [encode_picture(photo(seed), "image/jpeg") for seed in range(4)]
    start = time.time()

    def send(worker: int) -> None:
        while time.time() < start + 8:
            assert ask(server, pictures[worker]) == 200
        ask(server, b"no picture")

    with ThreadPoolExecutor(len(pictures)) as clients:
        list(clients.map(send, range(len(pictures))))
    time.sleep(3)  # scraped, and evaluated
    return start, time.time()


def scrape(port: int) -> dict[str, float]:
    """Every sample's name, and the sum of its values."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(fetch(f"http://127.0.0.1:{port}/metrics").body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def numbers(series: list[dict[str, Any]]) -> list[float]:
    """All finite values of a range query's series."""
    values = [float(value) for one in series for _, value in one["values"]]
    return [value for value in values if math.isfinite(value)]


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=[f"{b.uid}: {p.title}" for b, p in PANELS])
def test_every_panel_shows_numbers(
    board: Board, panel: Any, prometheus: Prometheus, watched: tuple[float, float]
) -> None:
    for query in panel.queries:
        series = prometheus.query_range(concrete(query.expr), *watched, 1)
        assert numbers(series), f"{query.expr} found {series}"
        labels = {name for one in series for name in one["metric"]}
        assert set(re.findall(r"{{(\w+)}}", query.legend)) <= labels, "the legend names a label that isn't there"


@pytest.mark.parametrize("rule", RECORDED, ids=[rule["record"] for rule in RECORDED])
def test_every_recorded_series_has_numbers(
    rule: dict[str, str], prometheus: Prometheus, watched: tuple[float, float]
) -> None:
    assert numbers(prometheus.query_range(rule["record"], *watched, 1))


@pytest.mark.usefixtures("watched")
def test_prometheus_evaluates_every_rule_and_nothing_fires(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert len(rules) == len(RECORDED) + len(ALERTS)
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]


@pytest.mark.usefixtures("watched")
def test_every_metric_named_anywhere_is_on_the_server(server: TorchServe, metrics_port: int) -> None:
    exported = set(scrape(metrics_port)) | OF_THE_EDGE
    files = subprocess.run(
        ["git", "ls-files", "k8s", "loadtest", "docker", "handlers", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    texts = {name: (ROOT / name).read_text(errors="replace") for name in files if not name.endswith(".jpg")}
    assert "k8s/monitoring/rules.yml" in texts
    recorded = {rule["record"] for rule in RECORDED}
    named: dict[str, str] = {}
    for name, text in texts.items():
        for match in re.finditer(r"(?<![\w:.\-/])mpm_\w+(?![\w:]*:)|\b\w+:mpm_\w+:\w+", text):
            named.setdefault(match[0], name)
    families = exported | {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in exported} | recorded
    missing = {name: file for name, file in named.items() if name not in families | FOREIGN}
    assert not missing
    assert len(named) > 30


@pytest.mark.usefixtures("watched")
def test_triton_exports_the_same_names(
    triton: Triton, triton_metrics_port: int, metrics_port: int, photo: Callable[..., np.ndarray]
) -> None:
    before = scrape(triton_metrics_port)
    with connect(f"grpc://{triton.grpc_url}/tiny") as client:
        assert client.ask(encode_picture(photo(0), "image/jpeg")).status == 200
        assert "X-MPM-View: expected one of" in client.ask(b"", headers={"x-mpm-view": "funny"}).error
    after = scrape(triton_metrics_port)
    assert after["mpm_images_total"] == before["mpm_images_total"] + 1
    assert after["mpm_requests_total"] == before["mpm_requests_total"] + 2, "what could not be submitted counts too"
    sampled = {name for name in scrape(metrics_port) if name.startswith("mpm_agreement_pixels")}
    assert set(after) | sampled == set(scrape(metrics_port))


@pytest.mark.usefixtures("watched")
def test_counts_hold_together(metrics_port: int) -> None:
    found = scrape(metrics_port)
    waited = time.monotonic() + 10  # for the last sample
    while found["mpm_group_windows_count"] != found["mpm_stage_seconds_count"] and time.monotonic() < waited:
        time.sleep(0.2)
        found = scrape(metrics_port)
    assert found["mpm_inflight_requests"] == 0
    assert found["mpm_waiting_windows"] == 0
    assert found["mpm_images_total"] == found["mpm_decode_seconds_count"] == found["mpm_encode_seconds_count"]
    assert found["mpm_requests_total"] == found["mpm_request_seconds_count"] > found["mpm_images_total"]
    assert found["mpm_group_windows_count"] == found["mpm_group_release_total"] == found["mpm_stage_seconds_count"]
    assert found["mpm_agreement_ratio_count"] >= 0.1 * (found["mpm_images_total"] - 10)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("board", BOARDS, ids=[board.uid for board in BOARDS])
def test_a_board_is_a_page_of_prometheus(board: Board, prometheus: Prometheus) -> None:
    url = urllib.parse.urlsplit(graph_url(prometheus.url, board.uid))  # one that isn't installed has no pages
    assert url.path == "/graph"
    fields = urllib.parse.parse_qs(url.query)
    asked = [values[0] for name, values in fields.items() if name.endswith(".expr")]
    assert len(asked) == sum(len(panel.queries) for panel in board.panels)
    assert all(prometheus.get("query", query=expr)["resultType"] == "vector" for expr in asked)


@pytest.mark.usefixtures("watched")
def test_a_latency_leads_to_its_request(prometheus: Prometheus, watched: tuple[float, float]) -> None:
    """Through an exemplar that Prometheus keeps, for the panel that shows such."""
    start, end = watched
    panels = [panel for _, panel in PANELS if panel.exemplars]
    assert panels
    for query in (query for panel in panels for query in panel.queries):
        found = prometheus.get("query_exemplars", query=concrete(query.expr), start=start, end=end)
        named = [exemplar["labels"] for series in found for exemplar in series["exemplars"]]
        assert named
        assert all(labels.keys() <= {"trace_id", "request_id"} and all(labels.values()) for labels in named)


GPU_POD = {"pod": "segmenter-0", "namespace": "segmentation"}
# One GPU computes for our pod, one for another, and one for nobody, which has no pod.
DCGM = """\
# HELP {name} As dcgm-exporter gives it.
# TYPE {name} gauge
{name}{{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H100 80GB HBM3",Hostname="node-1",\
container="segmenter",namespace="segmentation",pod="segmenter-0"}} 71
{name}{{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100 80GB HBM3",Hostname="node-1",\
container="train",namespace="research",pod="train-0"}} 99
{name}{{gpu="2",UUID="GPU-c",device="nvidia2",modelName="NVIDIA H100 80GB HBM3",Hostname="node-1"}} 0
"""


@pytest.fixture(scope="module")
def dcgm_exporter() -> Iterator[int]:
    """The port of what exports as DCGM's exporter does."""
    body = "".join(DCGM.format(name=name) for name in ("DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED")).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A test's output is no log."""

    exporter = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=exporter.serve_forever)
    thread.start()
    yield exporter.server_port
    exporter.shutdown()
    exporter.server_close()
    thread.join()


@pytest.mark.parametrize("honor_labels", [False, True], ids=["exported_pod", "pod"])
def test_gpus_are_those_of_the_pods_that_serve(
    honor_labels: bool,
    dcgm_exporter: int,
    server: TorchServe,
    metrics_port: int,
    photo: Callable[..., np.ndarray],
    program: Path,
    tmp_path: Path,
) -> None:
    gpus = {
        "job_name": "dcgm",
        "honor_labels": honor_labels,
        "static_configs": [
            {
                "targets": [f"127.0.0.1:{dcgm_exporter}"],
                "labels": {"pod": "dcgm-exporter-x7k", "namespace": "gpu-operator"},
            }
        ],
    }
    picture = encode_picture(photo(0), "image/jpeg")
    watched = Prometheus([f"127.0.0.1:{metrics_port}"], tmp_path, program=program, labels=GPU_POD, others=[gpus])
    with watched as prometheus:
        deadline = time.monotonic() + 30  # Prometheus takes five seconds to look at its targets for the first time
        while not (len(prometheus.query("DCGM_FI_DEV_GPU_UTIL")) == 3 and prometheus.query("mpm_model_info")):
            assert time.monotonic() < deadline, "nothing was scraped"
            time.sleep(0.2)
        start = time.time()
        while time.time() < start + 5:
            assert ask(server, picture) == 200
        queries = [query.expr for _, panel in PANELS for query in panel.queries if "DCGM_" in query.expr]
        assert queries
        for expr in queries:
            shown = numbers(prometheus.query_range(concrete(expr), start, time.time(), 1))
            assert shown
            assert max(shown) > 0
        (per_hour,) = queries
        at = time.time() - 1
        (found,) = numbers(prometheus.query_range(concrete(per_hour), at, at, 1))
        (rate,) = numbers(prometheus.query_range(concrete("sum(rate(mpm_images_total[$__rate_interval]))"), at, at, 1))
        assert found == pytest.approx(3600 * rate), "one GPU is ours, of three"


def test_a_killed_worker_comes_back_with_its_metrics_on_the_same_port(
    server: TorchServe, metrics_port: int, photo: Callable[..., np.ndarray]
) -> None:
    picture = encode_picture(photo(0), "image/jpeg")
    assert ask(server, picture) == 200
    before = scrape(metrics_port)
    management = f"http://127.0.0.1:{server.management_port}/models/tiny"
    psutil.Process(json.loads(fetch(management).body)[0]["workers"][0]["pid"]).kill()
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, "the worker did not come back"
        time.sleep(0.2)
        try:
            after = scrape(metrics_port)
            if ask(server, picture) == 200:
                break
        except OSError:
            continue
    after = scrape(metrics_port)
    assert after["process_start_time_seconds"] > before["process_start_time_seconds"]
    assert 1 <= after["mpm_images_total"] <= 2, "counted from zero, without the warm-up: only our own requests"


@pytest.fixture
def alertmanager() -> Iterator[tuple[str, set[str]]]:
    """Where an Alertmanager's API takes alerts, and the names of those that came."""
    names: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/api/v2/alerts":
                names.update(alert["labels"]["alertname"] for alert in alerts)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """A test's output is no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        yield f"127.0.0.1:{receiver.server_port}", names
        receiver.shutdown()
        thread.join()


def test_an_alert_reaches_the_alertmanager(program: Path, alertmanager: tuple[str, set[str]], tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(re.sub(r"for: \w+", "for: 1s", RULES.read_text()))
    address, names = alertmanager
    nobody = f"127.0.0.1:{free_port()}"
    with Prometheus([nobody], tmp_path / "prometheus", program=program, rules=rules, alertmanager=address):
        deadline = time.monotonic() + 40
        while names != {"SegmenterNotStarting", "SegmenterMetricsMissing"}:
            assert time.monotonic() < deadline, f"only {names} arrived"
            time.sleep(0.5)


def test_a_missing_prometheus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^prometheus: not installed; install your distribution's package"):
        Prometheus([], tmp_path)


RENDERED = dashboards()


@pytest.mark.parametrize("uid", RENDERED)
def test_dashboards_are_those_of_the_code_and_fit_the_schema(uid: str) -> None:
    text = (MONITORING / "dashboards" / f"{uid}.json").read_text()
    assert text == RENDERED[uid], "run `make dashboards`"
    register_default_plugins()  # the schemas of panels and queries
    read = json.loads(json.dumps(Dashboard.from_json(json.loads(text)), cls=JSONEncoder))
    assert read == json.loads(text), "the schema drops or changes something"


def test_rules_are_sound(promtool: Path) -> None:
    command = [str(promtool), "check", "rules", "--lint=all", "--lint-fatal", str(RULES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_fire_when_they_should(promtool: Path) -> None:
    done = subprocess.run(
        [str(promtool), "test", "rules", *RULES_TESTS], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_error_budget_is_what_failures_leave(promtool: Path, tmp_path: Path) -> None:
    """One of 2,000 fails: half of the budget, burnt half as fast as allowed; of a canary three, which is too fast."""
    failing = {"stable": 1, "canary": 3}
    samples = {  # of every series: left, burn rate, seconds
        "Error budget left": {"stable": 0.5, "canary": 0.0},
        "Burn rate": {"stable": 0.5, "canary": 1.5},
        "Until the budget is spent": {"stable": 0.5 * 30 * 86_400, "canary": 0.0},
    }
    series = [
        {"series": f'mpm_requests_total{{model="s", track="{track}", code="{code}"}}', "values": f"0+{number}x180"}
        for track, bad in failing.items()
        for code, number in (("200", 1990), ("503", 10 - bad), ("500", bad - bad // 2), ("504", bad // 2))
    ]
    asked = [
        {
            "expr": f"round({concrete(query.expr)}, 0.001)",
            "eval_time": "3h",
            "exp_samples": [
                {"labels": f'{{model="s", track="{track}"}}', "value": value}
                for track, value in samples[panel.title].items()
            ],
        }
        for panel in OBJECTIVES.panels
        if panel.title in samples
        for query in panel.queries
    ]
    assert len(asked) == 6
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": asked}]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    done = subprocess.run(
        [str(promtool), "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_firing_case_a_silent_case_and_a_runbook_entry() -> None:
    cases = [
        case
        for file in RULES_TESTS
        for test in yaml.safe_load((MONITORING / file).read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    names = {alert["alert"] for alert in ALERTS}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names
    entries = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert entries == [alert["alert"] for alert in ALERTS]
    assert {alert["labels"]["severity"] for alert in ALERTS} <= {"warning", "critical"}


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_an_alert_links_to_its_entry(alert: dict[str, Any]) -> None:
    """To the panel of the board that compose's Grafana serves, under its address."""
    link = urllib.parse.urlsplit(alert["annotations"]["runbook_url"])
    published = yaml.safe_load((ROOT / "docker/compose/compose.yml").read_text())["services"]["grafana"]["ports"]
    assert (link.scheme, link.netloc) == ("http", published[0].removesuffix(":3000"))
    board = json.loads((MONITORING / "dashboards" / "mpm-runbook.json").read_text())
    assert link.path == f"/d/{board['uid']}"
    (number,) = urllib.parse.parse_qs(link.query)["viewPanel"]
    (panel,) = [panel for panel in board["panels"] if panel["id"] == int(number)]
    assert panel["title"] == alert["alert"]
    assert len(panel["options"]["content"]) > 50


def test_the_runbook_links_to_boards_and_knows_them() -> None:
    (panel,) = json.loads(render_runbook("# Title\n\nHead.\n\n## Alert\nSee *Overview*, *here*.\n"))["panels"]
    assert panel["options"]["content"] == "See [Overview](/d/mpm-overview), *here*."
    with pytest.raises(
        ValueError, match=r"^runbook: expected a board, one of overview, objectives, merging, .*, got Nowhere$"
    ):
        render_runbook("## Alert\nSee *Nowhere*.\n")


def test_a_tool_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"^prometheus is not installed, and there is no"):
        find_tool("promtool", cache=tmp_path / "cache")
