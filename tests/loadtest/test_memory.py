"""The memory of a server is that of all its processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from fake_server import FakeServer

from loadtest.__main__ import main
from loadtest.client.shapes import steady
from loadtest.options import load_settings, make_parser, server_pid_of
from loadtest.ports import free_port
from loadtest.report.page import render, told
from loadtest.report.summary import Limits, summarize
from loadtest.running import RunResult, run_load
from loadtest.settings import LoadSettings
from loadtest.slo import Slo
from loadtest.watching.memory import MemorySample, check_pid, find_server, read_memory

pytest_plugins = ("load_fixtures",)

MIB = 2**20
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
CHILD = f"held = bytearray({64 * MIB}); held[::4096] = b'1' * {16 * 1024}; print('held', flush=True); input()"
LIMITS = Limits(slo=Slo.parse("errors=0"), max_growth=0.05)


@pytest.fixture
def family() -> Iterator[int]:
    """A process whose child holds 64 MiB."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "held\n"
        yield parent.pid
        parent.stdin.write("\n")


def settings(fake: FakeServer, pictures: Path) -> LoadSettings:
    return LoadSettings(urls=(fake.url,), model="fake", pictures=str(pictures), phases=steady(10, 3.0))


def watched(*totals: float) -> RunResult:
    """A run of so many seconds, with a front end that stays as it is."""
    samples = [MemorySample(1000.0 + i, {"java": 100.0, "python": total - 100}) for i, total in enumerate(totals)]
    return RunResult(1000.0, False, 1, [], [], [], 0, memory=samples)


def test_of_a_process_and_its_children(family: int) -> None:
    found = read_memory(family)
    assert found.total == sum(found.mib.values())
    assert 64 + 5 < found.total < 64 + 60
    assert len(found.mib) == 1  # both are Python
    assert read_memory(os.getpid()).total > found.total  # whose child it is


def test_a_process_that_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(ProcessLookupError):
        read_memory(ended.pid)
    with pytest.raises(ValueError, match=rf"server-pid: expected a process of this machine, got {ended.pid}"):
        check_pid(ended.pid)


def test_who_listens() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        assert find_server(listening.getsockname()[1]) == os.getpid()
    port = free_port()
    assert find_server(port) is None
    arguments = make_parser().parse_args(["--url", f"http://127.0.0.1:{port}", "--server-pid", "auto"])
    assert server_pid_of(arguments, load_settings(arguments)) is None


def test_a_run_watches(fake: FakeServer, pictures: Path) -> None:
    result = run_load(settings(fake, pictures), server_pid=os.getpid())
    summary = summarize(settings(fake, pictures), result, Limits(slo=Slo.parse("errors=0")))
    assert len(result.memory) >= 3
    assert summary["memory"]["last_mib"].keys() == summary["series"]["memory"]["mib"].keys()
    page = render(summary)
    assert "Memory of all processes" in page
    assert "not watched" not in told(summary)
    unwatched = summarize(settings(fake, pictures), replace(result, memory=[]), Limits(slo=Slo.parse("errors=0")))
    assert "Memory of all processes" not in render(unwatched)
    assert "processes: not watched" in told(unwatched)


def test_growth_is_bounded(fake: FakeServer, pictures: Path) -> None:
    def growth(*totals: float) -> dict[str, object]:
        checks = summarize(settings(fake, pictures), watched(*totals), LIMITS)["checks"]
        found: dict[str, object] = next(check for check in checks if check["name"] == "memory growth, total")
        return found

    assert growth(*[200.0] * 16)["kept"]
    assert growth(100.0, 150.0, *[200.0] * 14)["value"] == 0  # what warms up does not count
    leak = growth(*(200.0 + 2 * i for i in range(16)))
    assert leak["value"] == pytest.approx(227 / 211 - 1)
    assert not leak["kept"]
    assert not growth(*[200.0] * 7)["kept"]  # too few to know


@pytest.mark.parametrize(
    ("pid", "status", "message"),
    [
        ("auto", 0, ""),
        (str(os.getpid()), 0, ""),
        ("99999999", 2, "server-pid: expected a process of this machine, got 99999999"),
        ("java", 2, "server-pid: expected the id of a process, or auto, got 'java'"),
    ],
)
def test_the_option(
    fake: FakeServer,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pid: str,
    status: int,
    message: str,
) -> None:
    where = ["--url", fake.url, "--model", "fake", "--metrics", "none", "--server-pid", pid]
    what = ["--pictures", str(pictures), "--rate", "10", "--seconds", "1", "--max-lateness", "1m"]
    assert main([*where, *what, "--out", str(tmp_path / "report.html")]) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert "not watched" not in printed.out
