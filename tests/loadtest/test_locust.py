"""Locust runs of the locustfile in processes of their own, against a server that computes nothing."""

import csv
import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_server import FakeServer, Service, serve_grpc
from locust_runs import COMMAND, Run

from handlers.launch.processes import free_port
from loadtest.masks import OK, environment
from loadtest.run import GIVEN_UP, TIMEOUT, UNSENT

pytest_plugins = ("load_fixtures",)

NUM_REFERENCES = 3
RATE, SECONDS, STALL = 25, 3, 0.9
ALL_KINDS = ("--accept=png=70%,json=30%", "--raw=20%", "--bad=20%")


def slow_requests(run: Run, **options: object) -> int:
    """How many requests took long of a run in which the server stops for a while."""
    run.fake.stall = (NUM_REFERENCES + RATE // 2, STALL)
    summary = run(run_time=SECONDS, **options).summary
    assert set(summary["outcomes"]) == {OK}
    return sum(ms > 1000 * STALL / 2 for _, ms, _ in summary["series"]["requests"])


class TestOpenLoop:
    def test_latency_counts_from_when_a_request_was_due(self, run_locust: Run) -> None:
        slow = slow_requests(run_locust, rate=RATE)
        assert slow >= RATE * STALL / 2 - 2  # the clock went on while the server stood still

    def test_a_closed_loop_sees_few_slow_answers_of_the_same_stall(self, run_locust: Run) -> None:
        run_locust.fake.delay = 1 / RATE
        slow = slow_requests(run_locust, users=1)
        assert 1 <= slow <= 1 + SECONDS / (STALL / 2)  # one after the other: why arrivals must not wait for answers

    @pytest.mark.slow
    def test_users_bound_what_is_in_flight_and_what_is_beyond_fails(self, run_locust: Run) -> None:
        run_locust.fake.stall = (NUM_REFERENCES, 60.0)
        ended = run_locust(rate=40, users=5, run_time=1)
        assert ended.outcomes == {TIMEOUT: 5, UNSENT: 35}
        assert ended.status == 1

    def test_processes_share_the_same_arrivals_and_pictures(self, run_locust: Run) -> None:
        options: dict[str, object] = {"rate": 40, "run_time": 3, "arrivals": "poisson", "accept": "png=70%,json=30%"}
        alone, shared = run_locust(**options), run_locust("--processes=2", **options)
        assert shared.status == 0
        for rows in ("kinds", "pictures"):
            counts = [{row["name"]: row["requests"] for row in run.summary[rows]} for run in (alone, shared)]
            assert counts[0] == counts[1]
        assert shared.due == pytest.approx(alone.due, abs=0.01)
        assert shared.summary["series"]["client"]["lag_ms"]

    def test_a_run_whose_promises_are_broken_ends_early(self, run_locust: Run) -> None:
        run_locust.fake.delay = 0.4
        ended = run_locust("--give-up", rate=20, run_time=20, slo="p90=100ms")
        assert ended.status == 1
        assert ended.outcomes[GIVEN_UP]  # what was in flight is not forgotten
        assert sum(ended.outcomes.values()) < 300


class TestAnswers:
    def test_every_kind_is_checked(self, run_locust: Run) -> None:
        ended = run_locust(*ALL_KINDS, rate=60, run_time=1, metrics=f"{run_locust.fake.url}/metrics")
        assert (ended.status, set(ended.outcomes)) == (0, {OK})
        kinds = {row["name"]: row for row in ended.summary["kinds"]}
        assert set(kinds) == {"png", "json", "raw", "bad"}
        assert {kind: row["tokens_out"] for kind, row in kinds.items()} == {
            "png": 600,
            "json": 600,
            "raw": 600,
            "bad": None,
        }
        checked = sum(row["requests"] for kind, row in kinds.items() if kind != "bad")
        assert ended.summary["agreement"] == {"compared": checked, "least": 1.0}
        assert ended.summary["server"]["images"] >= checked
        assert ended.summary["served"]["schedule"] == "2,5"

    @pytest.mark.parametrize("protocol", ["triton", "triton-grpc"])
    def test_triton(self, run_locust: Run, protocol: str) -> None:
        run_locust.fake.delay = 0.3
        with serve_grpc(run_locust.fake) as address:
            host = address if protocol == "triton-grpc" else run_locust.fake.url
            ended = run_locust(*ALL_KINDS, rate=40, run_time=1, protocol=protocol, host=host)
        assert (ended.status, ended.outcomes) == (0, {OK: 40})
        assert {row["name"] for row in ended.summary["kinds"]} == {"png", "json", "raw", "bad"}
        assert ended.summary["elapsed_seconds"] < 40 * 0.3  # many at once: no request blocks the others

    def test_a_mask_that_changes_under_load_is_found(self, run_locust: Run) -> None:
        def mask(labels: np.ndarray, number: int) -> np.ndarray:
            return labels if number < NUM_REFERENCES + 10 else np.zeros_like(labels)

        run_locust.fake.mask = mask
        ended = run_locust(rate=RATE, run_time=1, slo="errors=100%")
        assert ended.outcomes == {OK: 10, "wrong: another mask": RATE - 10}
        assert ended.status == 1  # wrong is never promised

    def test_servers_that_are_asked_in_turn_have_to_agree(self, run_locust: Run) -> None:
        with FakeServer() as other:
            ended = run_locust(rate=20, run_time=1, host=f"{run_locust.fake.url},{other.url}")
            assert ended.status == 0
            assert len(run_locust.fake.seen) == len(other.seen) == NUM_REFERENCES + 10
            other.mask = lambda labels, _: np.zeros_like(labels)
            ended = run_locust(rate=20, run_time=1, host=f"{run_locust.fake.url},{other.url}")
            assert f"0.png from {other.url} when idle: wrong: another mask" in ended.output
            assert ended.status == 2

    @pytest.mark.parametrize(("seconds", "shares"), [("", [1.0, 0.0]), ("0", [0.5, 0.5])])
    def test_a_load_through_a_service_reaches_every_replica(
        self, run_locust: Run, seconds: str, shares: list[float]
    ) -> None:
        with FakeServer(delay=0.02) as other:
            run_locust.fake.delay = 0.02
            replicas = [run_locust.fake, other]
            metrics = ",".join(f"{replica.url}/metrics" for replica in replicas)
            with Service(replicas) as service:
                ended = run_locust(users=1, run_time=2, host=service.url, metrics=metrics, connection_seconds=seconds)
            found = {row["name"]: row["share"] for row in ended.summary["replicas"]}
            names = [replica.url.removeprefix("http://") for replica in replicas]
        assert [found[name] for name in names] == pytest.approx(shares, abs=0.1)


class TestLocustAsItIs:
    def test_users_that_wait_tags_csv_and_html(self, run_locust: Run, tmp_path: Path) -> None:
        run_locust.fake.delay = 0.02
        files = [f"--csv={tmp_path / 'stats'}", f"--html={tmp_path / 'locust.html'}"]
        ended = run_locust(*ALL_KINDS, *files, "--tags=json", "-u3", "-r3", "-t2")
        assert ended.status == 0
        assert {row["name"] for row in ended.summary["kinds"]} == {"json"}
        rows = read_csv(tmp_path / "stats_stats.csv")
        assert 0 < int(rows["Aggregated"]["Request Count"]) <= ended.summary["requests"]  # written once a second
        assert rows["json"]["Type"] == "torchserve"
        assert "torchserve" in (tmp_path / "locust.html").read_text()

    def test_statistics_tell_waiting_from_service(self, run_locust: Run, tmp_path: Path) -> None:
        run_locust.fake.delay = 0.1
        run_locust.fake.serial = True  # 10 a second of the 20 that are asked for
        ended = run_locust(f"--json-file={tmp_path / 'stats'}", rate=20, run_time=2, users=3)
        rows = {row["name"]: row for row in json.loads((tmp_path / "stats.json").read_text())}
        assert rows["png"]["num_requests"] == ended.summary["requests"] == 40
        assert rows["png"]["num_failures"] == ended.outcomes[UNSENT] > 5
        assert rows["png, from sending"]["min_response_time"] >= 100

    def test_workers_may_come_over_the_network(self, run_locust: Run) -> None:
        port = free_port()
        where = ["--master-port", str(port)]
        worker = subprocess.Popen(
            [*COMMAND, "--worker", *where], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            ended = run_locust("--master", "--expect-workers=1", f"--master-bind-port={port}", rate=RATE, run_time=1)
            assert (ended.status, ended.outcomes) == (0, {OK: RATE})
            assert worker.wait(20) == 0  # as a job that is complete
        finally:
            worker.kill()
            worker.wait()

    @pytest.mark.slow
    def test_a_lost_worker_makes_the_run_not_valid(self, run_locust: Run) -> None:
        command = run_locust.command("--processes=2", rate=RATE, run_time=3, request_timeout="1s")
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as load:
            while len(run_locust.fake.seen) < 2 * NUM_REFERENCES + 5:
                time.sleep(0.05)
            psutil.Process(load.pid).children()[0].kill()
            assert load.wait(60) == 3
        doubts = json.loads((run_locust.folder / "report.json").read_text())["doubts"]
        assert "1 of 2 workers were lost" in doubts

    def test_shapes_change_the_rate(self, run_locust: Run) -> None:
        ended = run_locust(rate=20, run_time=2, shape="steps", steps="0.25,2")
        counts = [sum(start <= each < start + 0.8 for each in ended.due) for start in (0, 1)]
        assert counts == pytest.approx([0.8 * 5, 0.8 * 40], abs=1.5)

    @pytest.mark.slow
    def test_shapes_change_the_users(self, run_locust: Run) -> None:
        run_locust.fake.delay = 0.2
        ended = run_locust(users=10, spawn_rate=100, run_time=6, shape="steps", steps="0.1,1")
        early, late = (sum(start <= each < start + 2 for each in ended.due) for start in (0.5, 4))
        assert late > 2 * early > 0

    def test_its_page_starts_a_run_with_our_options(self, run_locust: Run) -> None:
        port = free_port()
        command = [each for each in run_locust.command(web_port=port) if each != "--headless"]
        page = f"http://127.0.0.1:{port}"
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as locust:
            try:
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    try:
                        text = read(page)
                        break
                    except OSError:
                        time.sleep(0.2)
                assert "min_agreement" in text
                form = {"user_count": 5, "spawn_rate": 5, "host": run_locust.fake.url, "rate": "30", "bad": "20%"}
                assert json.loads(read(f"{page}/swarm", form))["success"]
                while len(run_locust.fake.seen) < NUM_REFERENCES + 30 and time.monotonic() < deadline:
                    time.sleep(0.1)
                read(f"{page}/stop", {})
                stats = {
                    (each["name"], each["method"]): each
                    for each in json.loads(read(f"{page}/stats/requests"))["stats"]
                }
                assert stats["bad", "torchserve"]["num_failures"] == 0
                assert stats["bad", "torchserve"]["num_requests"] > 0
            finally:
                locust.terminate()
                assert locust.wait(30) == 0
        assert json.loads((run_locust.folder / "report.json").read_text())["held"]


def read_csv(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as lines:
        return {row["Name"]: row for row in csv.DictReader(lines)}


def read(url: str, form: dict[str, object] | None = None) -> str:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, data, timeout=30) as response:
        text: str = response.read().decode()
    return text


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({}, 0, "kept   errors: 0 %"),
        ({"slo": "p50=1ms"}, 1, "BROKEN p50"),
        ({"max_lateness": "0ms"}, 3, "NOT VALID: requests left"),
        ({"slo": "nonsense"}, 2, "slo: expected NAME=VALUE, each name once, got 'nonsense'"),
        ({"host": "http://127.0.0.1:1"}, 2, "127.0.0.1:1: ConnectionRefusedError"),
        ({"pictures": "missing"}, 2, "pictures: expected a folder, got missing"),
        ({"library_masks": "missing"}, 2, "library-masks: expected what `mpm loadtest masks` writes in missing"),
        ({"server_pid": "99999999"}, 2, "server-pid: expected a process of this machine, or auto, got 99999999"),
    ],
)
def test_the_exit_status_tells(run_locust: Run, options: dict[str, object], status: int, message: str) -> None:
    run_locust.fake.delay = 0.005
    ended = run_locust(**{"rate": 20, "run_time": 1} | options)
    assert ended.status == status, ended.output
    assert message in ended.output
    if status == 2:
        assert not ended.summary
    else:
        assert (ended.summary["held"], ended.summary["valid"]) == (status != 1, status != 3)


def test_who_is_ended_answers_what_was_sent(run_locust: Run) -> None:
    run_locust.fake.delay = 0.5
    with subprocess.Popen(
        run_locust.command(rate=10, run_time=60), env=environment(), stdout=subprocess.DEVNULL
    ) as load:
        while len(run_locust.fake.seen) < NUM_REFERENCES + 5:
            time.sleep(0.05)
        load.terminate()
        assert load.wait(30) == 0
    summary = json.loads((run_locust.folder / "report.json").read_text())
    assert set(summary["outcomes"]) == {OK}
    assert not summary["doubts"]


def test_the_command_passes_everything_on_to_locust() -> None:
    command = [sys.executable, "-m", "handlers", "loadtest", "run", "--list"]
    listed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "SegmentUser" in listed.stdout
