"""Whole runs in processes of their own, against a server that computes nothing."""

import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fake_server import FakeServer, serve_grpc

from loadtest.__main__ import main
from loadtest.client.arrivals import Arrival
from loadtest.client.masks import OK
from loadtest.client.records import GIVEN_UP, TIMEOUT, UNSENT
from loadtest.client.session import Session
from loadtest.client.shapes import steady
from loadtest.ports import free_port
from loadtest.report.summary import Limits, summarize
from loadtest.running import RunError, RunResult, run_load, worker_environment
from loadtest.settings import LoadSettings
from loadtest.slo import Slo

pytest_plugins = ("load_fixtures",)

NUM_REFERENCES = 3
RATE, SECONDS, STALL = 25, 2.0, 0.9


def settings(fake: FakeServer, pictures: Path, **more: Any) -> LoadSettings:
    rate, seconds = more.pop("rate", RATE), more.pop("seconds", 1.0)
    fields: dict[str, Any] = {"urls": (fake.url,), "model": "fake", "process": "even", "timeout_seconds": 10.0}
    fields |= {"pictures": str(pictures), "phases": steady(rate, seconds)}
    return LoadSettings(**(fields | more))


def stalled(fake: FakeServer, pictures: Path, **more: Any) -> RunResult:
    """A run during which the server stops for a while after half a second."""
    fake.stall = (NUM_REFERENCES + RATE // 2, STALL)
    return run_load(settings(fake, pictures, seconds=SECONDS, **more))


def test_latency_counts_from_when_a_request_was_due(fake: FakeServer, pictures: Path) -> None:
    result = stalled(fake, pictures)
    end = fake.stalled_until - result.began_at
    waited = [record for record in result.records if end - STALL + 0.1 < record.at < end - 0.1]
    assert len(waited) == pytest.approx(RATE * (STALL - 0.2), abs=2)  # the clock went on
    for record in waited:
        assert record.outcome == OK
        assert record.seconds >= end - record.at - 0.02
    slow = [record for record in result.records if record.seconds > STALL / 2]
    assert len(slow) >= RATE * STALL / 2 - 2


def test_a_closed_loop_sees_one_slow_answer_of_the_same_stall(fake: FakeServer, pictures: Path) -> None:
    fake.delay = 1 / RATE
    result = stalled(fake, pictures, closed=1)
    slow = [record for record in result.records if record.seconds > STALL / 2]
    assert len(slow) == 1  # why arrivals must not wait for answers


def test_latency_counts_from_there_even_if_the_client_was_late(fake: FakeServer, pictures: Path) -> None:
    fake.delay = 0.05
    session = Session(settings(fake, pictures, rate=50, seconds=1.0))
    session.prepare()
    session.run()  # no monkey patches here: a request holds up all others
    records, pulses = session.take()
    assert len(records) == 50
    assert max(record.late for record in records) > 1
    for record in records:
        assert record.seconds >= record.late + fake.delay
    result = RunResult(0.0, False, 1, records, pulses, [], 0)
    summary = summarize(session.settings, result, Limits(slo=Slo.parse("p99=1h")))
    assert not summary["valid"]
    assert "requests left" in summary["doubts"][0]


def test_the_kinds_of_a_mix_are_all_checked(fake: FakeServer, pictures: Path) -> None:
    shares = {"json": 0.2, "raw": 0.2, "bad": 0.2}
    result = run_load(settings(fake, pictures, rate=60, shares=shares), metrics=[f"{fake.url}/metrics"])
    assert {record.outcome for record in result.records} == {OK}
    assert {record.kind for record in result.records} == {"png", "json", "raw", "bad"}
    for record in result.records:
        assert record.agreement == (None if record.kind == "bad" else 1.0)
        assert record.tokens_out == (None if record.kind == "bad" else 600)
    assert len(result.samples) >= 2


@pytest.mark.parametrize("way", ["triton", "triton-grpc"])
def test_triton_is_asked_in_its_own_way(fake: FakeServer, pictures: Path, way: str) -> None:
    fake.delay = 0.2
    shares = {"json": 0.2, "raw": 0.2, "bad": 0.2}
    with serve_grpc(fake) as address:
        urls = (address if way == "triton-grpc" else fake.url,)
        result = run_load(settings(fake, pictures, rate=40, way=way, urls=urls, shares=shares))
    assert len(result.records) == 40
    assert {record.outcome for record in result.records} == {OK}
    assert {record.kind for record in result.records} == {"png", "json", "raw", "bad"}
    waited = sum(record.seconds for record in result.records)
    assert waited > 4 * 1.0  # many at once: no request blocks the others


def test_a_mask_that_changes_under_load_is_found(fake: FakeServer, pictures: Path) -> None:
    def mask(labels: np.ndarray, number: int) -> np.ndarray:
        return labels if number < NUM_REFERENCES + 10 else np.zeros_like(labels)

    fake.mask = mask
    run = settings(fake, pictures)
    result = run_load(run)
    outcomes = Counter(record.outcome for record in result.records)
    assert outcomes["wrong: another mask"] == len(result.records) - 10
    assert not summarize(run, result, Limits(slo=Slo.parse("errors=100%")))["held"]  # wrong is never promised


def test_what_is_beyond_the_bounds_counts_as_failed(fake: FakeServer, pictures: Path) -> None:
    fake.stall = (NUM_REFERENCES, 60.0)
    result = run_load(settings(fake, pictures, max_inflight=5, timeout_seconds=0.5, rate=40))
    outcomes = Counter(record.outcome for record in result.records)
    assert len(result.records) == 40
    assert set(outcomes) == {UNSENT, TIMEOUT}
    assert outcomes[TIMEOUT] >= 5
    for record in result.records:
        assert record.outcome == UNSENT or record.seconds >= 0.5


def test_workers_share_the_same_load(fake: FakeServer, pictures: Path) -> None:
    shares = {"json": 0.3}
    seconds = 5.0  # workers hand in what they have every three
    run = settings(fake, pictures, rate=40, seconds=seconds, shares=shares, process="poisson", num_workers=2)
    result = run_load(run)
    assert result.workers_finished == 2
    assert [record.number for record in result.records] == list(range(len(run.arrivals())))
    assert [record.at for record in result.records] == pytest.approx(
        [arrival.at for arrival in run.arrivals()], abs=1e-6
    )
    assert {pulse.worker for pulse in result.pulses} == {0, 1}
    assert {record.outcome for record in result.records} == {OK}


def test_workers_may_come_over_the_network(fake: FakeServer, pictures: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "loadtest", "worker", "--master", f"127.0.0.1:{port}", "--paint", str(pictures)]
    worker = subprocess.Popen(command, env=worker_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        result = run_load(settings(fake, pictures, num_workers=1), bind=("127.0.0.1", port))
        assert {record.outcome for record in result.records} == {OK}
        assert len(result.records) == RATE
        assert worker.wait(20) == 0  # as a job that is complete
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_a_lost_worker_makes_the_run_not_valid(fake: FakeServer, pictures: Path) -> None:
    run = settings(fake, pictures, num_workers=2, seconds=2.0, timeout_seconds=1.0)

    def kill_one() -> None:
        while len(fake.seen) < 2 * NUM_REFERENCES + 5:
            time.sleep(0.05)
        workers = [child for child in psutil.Process().children() if "--worker" in child.cmdline()]
        assert len(workers) == 2
        workers[0].kill()

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_one)
        result = run_load(run)
        killing.result()
    assert result.workers_finished == 1
    assert "1 of 2 workers were lost" in summarize(run, result, Limits(slo=Slo.parse("errors=0")))["doubts"]


def test_a_hopeless_run_ends_early(fake: FakeServer, pictures: Path) -> None:
    fake.delay = 0.4
    result = run_load(settings(fake, pictures, rate=20, seconds=10.0, give_up="p90=100ms"))
    assert result.gave_up
    given_up = [record for record in result.records if record.outcome == GIVEN_UP]
    assert given_up  # what was in flight is not forgotten
    assert max(record.seconds for record in given_up) >= 0.1
    assert len(result.records) < 150


def test_a_replay_sends_what_was_recorded(fake: FakeServer, pictures: Path) -> None:
    trace = (Arrival(0.1, "1.png", "json"), Arrival(0.2, "0.png", "png"), Arrival(0.2, "", "bad"))
    run = settings(fake, pictures, trace=trace)
    result = run_load(run)
    assert [record.at for record in result.records] == pytest.approx([0.1, 0.2, 0.2], abs=1e-6)
    assert [record.kind for record in result.records] == ["json", "png", "bad"]
    assert [record.name for record in result.records][:2] == ["1.png", "0.png"]
    with pytest.raises(RunError, match=r"trace: .*picture 'gone.png', kind 'png' at 0.5 s"):
        run_load(settings(fake, pictures, trace=(Arrival(0.5, "gone.png", "png"),)))


def test_who_is_ended_ends_what_it_started(fake: FakeServer, pictures: Path, tmp_path: Path) -> None:
    where = ["--url", fake.url, "--model", "fake", "--metrics", "none", "--pictures", str(pictures)]
    command = [sys.executable, "-m", "loadtest", *where, "--out", str(tmp_path / "report.html")]
    load = subprocess.Popen(command, env=worker_environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(fake.seen) <= NUM_REFERENCES and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(load.pid).children(recursive=True)
    assert children
    load.terminate()
    assert load.wait(20) == 2
    assert not [child for child in children if child.is_running()]
    assert not list(tmp_path.iterdir())


def test_servers_that_are_asked_in_turn_have_to_agree(fake: FakeServer, pictures: Path) -> None:
    with FakeServer() as other:
        result = run_load(settings(fake, pictures, urls=(fake.url, other.url), rate=20))
        assert {record.outcome for record in result.records} == {OK}
        assert len(fake.seen) == len(other.seen) == NUM_REFERENCES + len(result.records) // 2
        other.mask = lambda labels, _: np.zeros_like(labels)
        with pytest.raises(RunError, match=rf"0\.png from {other.url} when idle: wrong: another mask"):
            run_load(settings(fake, pictures, urls=(fake.url, other.url)))


def test_a_server_that_is_not_there(pictures: Path, fake: FakeServer) -> None:
    with pytest.raises(RunError, match=r"127\.0\.0\.1:1: ConnectionRefusedError"):
        run_load(settings(fake, pictures, urls=("http://127.0.0.1:1",)))


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ([], 0),
        (["--slo", "p50=1ms"], 1),
        (["--max-lateness", "0ms"], 3),
        (["--slo", "nonsense"], 2),
        (["--shape", "replay"], 2),
        (["--url", "http://127.0.0.1:1"], 2),
        (["--url", "ftp://example.org"], 2),
        (["--closed", "1", "--workers", "2"], 2),
    ],
)
def test_the_exit_status_tells(
    fake: FakeServer, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], status: int
) -> None:
    fake.delay = 0.005
    out = tmp_path / "report.html"
    where = ["--url", fake.url, "--model", "fake", "--metrics", f"{fake.url}/metrics"]
    what = ["--pictures", str(pictures), "--rate", "20", "--seconds", "1", "--out", str(out)]
    told = main([*where, *what, *more])
    assert told == status
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    if status == 2:
        assert printed.err.strip()
        assert not out.exists()
        return
    summary = json.loads(out.with_suffix(".json").read_text())
    assert summary["held"] == (status != 1)
    assert summary["valid"] == (status != 3)
    page = out.read_text()
    assert page.count("<svg") >= 8
    assert "http-equiv" not in page
    for outside in ("<link", "src=", "@import", "url("):
        assert outside not in page
