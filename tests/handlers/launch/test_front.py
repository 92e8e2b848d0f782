"""The edge, a server behind it, and their launcher: who is started again, and in which order they end."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from launched import Launched

from handlers.launch.processes import ServerError, check_port, free_port, url_of

# A launcher of a server that needs no model: it answers every body with itself, after as many seconds as a path says.
LAUNCHER = """
import sys, time
from handlers.launch import processes, supervision
from handlers.launch.edge import Front
from handlers.launch.processes import Server, run_in_foreground

BEHIND = '''
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Echo(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(float(self.path.rpartition("/")[2]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
'''

supervision._LOOK_SECONDS, supervision._ASK_SECONDS, supervision._ANSWER_SECONDS = 0.1, 0.3, 1.0
processes._LOST_SECONDS = 0.5

class Echo(Server):
    max_body_bytes, answer_seconds = 1000, 20.0
    @property
    def watched(self): return {f"{self._own_url}/predictions/0": ""}  # a mask of a tiny picture may be that picture
    def __init__(self, front):
        super().__init__("Echo", sys.argv[1], 0, None, front)
        self._spawn([sys.executable, "-c", BEHIND, str(self.port)], {})
    def wait_ready(self, timeout_seconds=0):
        while True:
            try:
                check_port(self.http_host, self.port)
            except ServerError:
                return
            self._check_starting(time.monotonic() + 20)
            time.sleep(0.05)
    def drain(self): print("drained", flush=True)
    def examples(self, sample): return sample
    def ailment(self): return ""
    def forget(self): pass
    def may_recover(self, num_failures, ill_seconds): return num_failures < 2

from handlers.launch.processes import ServerError, check_port
sys.exit(run_in_foreground(Echo, front=lambda: Front(sys.argv[1], int(sys.argv[2]), server="torchserve"),
    host=sys.argv[1], ready_port=int(sys.argv[3])))
"""


@pytest.fixture(params=["127.0.0.1", "::"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launched]:
    log, port, ready_port = tmp_path / "log", free_port(), free_port()
    command = [sys.executable, "-c", LAUNCHER, request.param, str(port), str(ready_port)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        running = Launched(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ready_port}", log)
        running.wait_until(lambda: "Ctrl-C stops the server" in running.told, 20)
        assert f"Ready on {url_of(request.param, port)}." in running.told
        processes = psutil.Process(process.pid).children(recursive=True)
        yield running
        process.terminate()
        process.wait(20)
    assert not [child for child in processes if child.is_running()]
    assert "Traceback" not in running.told


def test_both_are_started_again_and_end_in_order(running: Launched) -> None:
    (server,), (edge,) = running.children("ThreadingHTTPServer(("), running.children("handlers.edge")
    server.kill()
    running.wait_until(lambda: not running.is_ready, 10)
    running.wait_until(lambda: running.is_ready, 10)
    edge.kill()
    edge.wait(10)
    assert requests.post(f"{running.url}/0", data=b"a").content == b"a"  # waited for the next edge
    host = running.told.partition("Ready on ")[2].partition(". Try")[0]
    assert f"Or open {host} in a browser." in running.told
    assert requests.get(host).headers["Content-Type"].startswith("text/html")
    counted = requests.get(f"{host}/metrics").text
    for process in ("server", "edge"):
        assert f'mpm_restarts_total{{process="{process}"}} 1' in counted
    assert "Echo ended with status -9; starting it again" in running.told
    assert "the edge ended with status -9; starting it again" in running.told
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(requests.post, f"{running.url}/1.5", data=b"late")
        time.sleep(0.5)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
        assert "drained" not in running.told
        assert waiting.result().content == b"late"
    assert running.process.wait(10) == 0
    assert "drained" in running.told


def test_a_server_that_lives_and_answers_nothing_is_started_again(running: Launched) -> None:
    (server,) = running.children("ThreadingHTTPServer((")
    server.suspend()
    running.wait_until(lambda: not running.is_ready, 20)
    assert "not answered within 1 s" in running.told
    running.wait_until(lambda: running.is_ready, 30)
    assert not server.is_running()
    assert requests.post(f"{running.url}/0", data=b"a").content == b"a"
    assert "no model comes back here" in running.told
    assert "Echo ended with status 1; starting it again" in running.told
    host = running.told.partition("Ready on ")[2].partition(". Try")[0]
    assert 'mpm_restarts_total{process="server"} 1' in requests.get(f"{host}/metrics").text


def test_a_server_that_keeps_ending_is_given_up(running: Launched) -> None:
    for number in range(6):
        running.wait_until(lambda seen=number: running.told.count("Ready on") == seen + 1, 20)  # type: ignore[misc]
        running.children("ThreadingHTTPServer((")[0].kill()
    assert running.process.wait(20) != 0
    assert running.told.count("starting it again") == 5


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_a_taken_port_is_named(host: str, told: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError) as raised:
            check_port(host, port)
    assert str(raised.value) == f"cannot listen on {told}{port}: Address already in use"
