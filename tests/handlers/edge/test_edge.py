"""The edge in front of a server that writes down what reaches it."""

import base64
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import requests
from fronting import Front, Upstream, ask, fronted
from smuggling import AMBIGUOUS, HEAD

from handlers.cli import main
from handlers.edge.triton import status_of
from handlers.launch.processes import free_port

PICTURE = b"\xff\xd8\xff\xe0 a picture \x00\r\n\r\n--x" + bytes(range(256)) * 40
LIMIT = 2**20


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def _edges(upstream: Upstream) -> Iterator[tuple[Front, Front]]:
    options = ("--max-body-bytes", str(LIMIT), "--cors-origin", "http://a.example")
    with fronted(upstream.url, "torchserve", *options) as first, fronted(upstream.url, "triton", *options) as second:
        yield first, second


@pytest.fixture
def edge(_edges: tuple[Front, Front], upstream: Upstream) -> Front:
    """In front of what it takes for TorchServe."""
    upstream.seen.clear()
    return _edges[0]


@pytest.fixture
def triton_edge(_edges: tuple[Front, Front], upstream: Upstream) -> Front:
    upstream.seen.clear()
    return _edges[1]


def test_passes_requests_on_unchanged(edge: Front, upstream: Upstream) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"X-Request-Id": "mine", "traceparent": trace, "X-Own": "é", "Content-Type": "image/jpeg"}
    for target in ("/predictions/a%2Fb", "/any/../where;x?y=%20b&c=%2F"):
        reply = ask(edge.url, target, PICTURE, headers)
        method, path, seen, body = upstream.seen[-1]
        assert (method, path, body) == ("POST", target, PICTURE)
        assert seen["traceparent"] == trace
        assert seen["x-request-id"] == reply.headers["X-Request-Id"] == "mine"
        assert reply.headers["X-MPM-Tokens"] == "in=5, out=3"
        assert reply.content == PICTURE
    assert requests.get(f"{edge.url}/ping").headers["X-Request-Id"] == upstream.seen[-1][2]["x-request-id"]


def test_what_is_long_or_in_chunks_arrives_with_one_length(edge: Front, upstream: Upstream) -> None:
    data = PICTURE * 100
    reply = requests.post(f"{edge.url}/predictions/m", data=iter([data[:70_000], data[70_000:]]))
    assert reply.content == data == upstream.seen[-1][3]
    assert "transfer-encoding" not in upstream.seen[-1][2]
    too_long = requests.post(f"{edge.url}/predictions/m", data=iter([bytes(2**19)] * 3))
    assert_refused(too_long, 413, "body: expected at most 1048576 bytes, got more")
    too_long = requests.post(f"{edge.url}/predictions/m", data=bytes(LIMIT + 1))
    assert_refused(too_long, 413, "body: expected at most 1048576 bytes, got 1048577")
    expecting = b"POST /predictions/m HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    assert edge.send(expecting % (2**30)).startswith(b"HTTP/1.1 413")  # before anything was sent
    assert edge.send(expecting.replace(b"Host", b"Connection: close\r\nHost") % 4, b"abcd").startswith(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"
    )
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("data", AMBIGUOUS)
def test_refuses_what_two_servers_could_read_differently(edge: Front, upstream: Upstream, data: bytes) -> None:
    answer = edge.send(data, timeout=2)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"405", b"431"), answer[:300]
    assert not upstream.seen
    fields = json.loads(body.splitlines()[0])
    assert fields["code"] == int(head.split()[1])
    assert "expected" in fields["error"]
    assert fields["request_id"]
    assert b"Traceback" not in answer


def test_takes_pictures_from_forms_and_json(edge: Front, upstream: Upstream) -> None:
    url, encoded = f"{edge.url}/predictions/m", base64.b64encode(PICTURE).decode()
    for name in ("image", "data", "body", "file"):
        assert requests.post(url, files={name: ("a.jpg", PICTURE, "image/jpeg")}).content == PICTURE
    for document in (
        {"data": encoded},
        {"image": "data:image/jpeg;base64," + encoded},
        {"instances": [{"b64": encoded}]},
        {"instances": [{"data": {"b64": encoded}}]},
        {"instances": [encoded]},
    ):
        assert requests.post(url, json=document).content == PICTURE
    assert requests.post(url, PICTURE, headers={"Content-Type": "application/x-www-form-urlencoded"}).ok
    assert {seen[2]["content-type"] for seen in upstream.seen} == {"application/octet-stream"}
    assert {seen[3] for seen in upstream.seen} == {PICTURE}
    upstream.answer = b'{"height": 3}\n'
    answer = requests.post(f"{edge.url}/v1/models/m:predict", json={"instances": [{"b64": encoded}] * 3})
    upstream.answer = b""
    assert answer.json() == {"predictions": [{"height": 3}] * 3}
    assert upstream.seen[-1][1] == "/predictions/m"
    assert upstream.seen[-1][2]["accept"] == "application/json"


def test_refuses_by_name_what_holds_no_single_picture(edge: Front, upstream: Upstream) -> None:
    url, encoded = f"{edge.url}/predictions/m", base64.b64encode(PICTURE).decode()
    two = [("image", ("a.jpg", PICTURE)), ("image", ("b.jpg", PICTURE))]
    assert_refused(requests.post(url, files=two), 400, "got 'image', 'image'")
    assert_refused(requests.post(url, files={"photo": PICTURE}), 400, "named image, data, body or file, got 'photo'")
    assert_refused(requests.post(url, files=[("image", b"")] * 3000), 400, "got 'image'")
    form = {"Content-Type": "multipart/form-data"}
    assert_refused(requests.post(url, data=PICTURE, headers=form), 400, "form: expected one picture")
    form = {"Content-Type": "multipart/form-data; boundary=a"}
    assert_refused(requests.post(url, data=PICTURE, headers=form), 400, "form: expected one picture")
    assert_refused(requests.post(url, data=b"\n" * 10**6, headers=form), 400, "does not start with the boundary")
    headers = b"".join(b"a: b\r\n" for _ in range(1000))
    assert_refused(requests.post(url, data=b"--a\r\n" + headers, headers=form), 400, "form: expected one picture")
    for document, told in (
        (
            {"instances": [{"b64": encoded}] * 2},
            "instances: expected one picture, got 2; several go to /v1",
        ),
        ({"instances": [{"b64": encoded}] * 17}, "instances: expected 1 to 16 pictures, got 17"),
        ({"instances": []}, "instances: expected 1 to 16 pictures, got 0"),
        ({"data": "s3://bucket/cat.jpg"}, "got a URL (s3); nothing is fetched"),
        ({"data": encoded, "image": encoded}, "got 'data', 'image'"),
        ({"url": "http://a.example"}, "got 'url'"),
        ({"data": 5}, "data: expected base64, got int"),
        ({"data": "&&&"}, "data: expected base64, got '&&&'"),
        ([encoded], "JSON: expected base64, got list"),
    ):
        assert_refused(requests.post(url, json=document), 400, told)
    as_json = {"Content-Type": "application/json"}
    assert_refused(requests.post(url, data=PICTURE, headers=as_json), 400, "JSON: expected a document")
    assert_refused(requests.post(url, data="[" * 99, headers=as_json), 400, "JSON: expected nesting of at most 64")
    assert_refused(requests.post(url, data="[" + "[]," * 99_999, headers=as_json), 413, "JSON: expected at most")
    assert_refused(requests.post(url, data="https://a.example/cat.jpg"), 400, "got a URL (https); nothing is fetched")
    assert_refused(requests.post(url, files={"image": b" HTTP://a.example/cat.jpg"}), 400, "got a URL (http)")
    assert not upstream.seen


def test_unpacks_gzip_within_the_limit(edge: Front, upstream: Upstream) -> None:
    url, packed = f"{edge.url}/predictions/m", {"Content-Encoding": "gzip", "Content-Type": "image/jpeg"}
    assert requests.post(url, data=gzip.compress(PICTURE), headers=packed).content == PICTURE
    assert "content-encoding" not in upstream.seen[-1][2]
    bomb = requests.post(url, data=gzip.compress(bytes(2**27)), headers=packed)
    assert_refused(bomb, 413, "expected at most 1048576 bytes, got more, unpacked")
    assert_refused(requests.post(url, data=PICTURE, headers=packed), 400, "Content-Encoding: expected gzip")
    assert_refused(requests.post(url, data=gzip.compress(PICTURE)[:-9], headers=packed), 400, "one whole gzip stream")
    brotli = requests.post(url, data=PICTURE, headers={"Content-Encoding": "br"})
    assert_refused(brotli, 415, "Content-Encoding: expected gzip or none, got 'br'")
    assert len(upstream.seen) == 1


def test_a_small_body_reserves_little(upstream: Upstream) -> None:
    """However much it could unpack to: all may hold 256 MiB, and a few clients that wait took it."""
    with (
        fronted(upstream.url, "torchserve", "--max-body-bytes", str(48 * 2**20)) as edge,
        ThreadPoolExecutor(40) as pool,
    ):
        packed = {"Content-Encoding": "gzip"}
        upstream.release.clear()
        waiting = [
            pool.submit(requests.post, f"{edge.url}/wait", gzip.compress(b"a"), headers=packed) for _ in range(40)
        ]
        held = f"mpm_edge_held_bytes {40 * (len(gzip.compress(b'a')) + 1)}.0\n"
        end = time.monotonic() + 10
        while held not in requests.get(f"{edge.url}/metrics").text:
            assert time.monotonic() < end
        upstream.release.set()
        assert {each.result().status_code for each in waiting} == {200}


def test_each_picture_and_output_of_open_inference_is_asked_for(edge: Front, upstream: Upstream) -> None:
    upstream.answer = b'{"height": 3}'
    image = {"name": "IMAGE", "datatype": "BYTES", "shape": [2, 1], "data": 2 * [base64.b64encode(PICTURE).decode()]}
    document = {"inputs": [image], "parameters": {"x-mpm-view": "tokens"}}
    reply = requests.post(f"{edge.url}/v2/models/m/versions/2/infer?schedule=off", json=document).json()
    upstream.answer = b""
    assert [output["name"] for output in reply["outputs"]] == ["MASK_PNG", "RESULT_JSON"]
    assert reply["outputs"][1]["data"] == 2 * ['{"height": 3}']
    assert [seen[:2] for seen in upstream.seen] == 4 * [("POST", "/predictions/m/2")]
    asked = sorted((seen[2]["accept"], seen[2].get("x-mpm-view"), seen[2]["x-mpm-schedule"]) for seen in upstream.seen)
    assert asked == 2 * [("application/json", None, "off")] + 2 * [("image/png", "tokens", "off")]
    assert {seen[3] for seen in upstream.seen} == {PICTURE}
    upstream.seen.clear()
    for shape in ([], [1, 2], [[1]], ["1"], [True, 1], {"a": 1}, [1, 10**400], [-1], [1.0], None, [17]):
        answer = requests.post(f"{edge.url}/v2/models/m/infer", json={"inputs": [image | {"shape": shape}]})
        assert_refused(answer, 400, "IMAGE: expected")
    assert not upstream.seen


def test_options_may_stand_in_the_url(edge: Front, triton_edge: Front, upstream: Upstream) -> None:
    upstream.answer = b"\x05\x00\x00\x00mask"  # as Triton's outputs are
    query = "?view=overlay&schedule=2%2C5&priority=bulk&accept=image%2Fjpeg"
    requests.post(f"{edge.url}/predictions/m{query}", PICTURE, headers={"Accept": "image/png"})
    requests.post(f"{triton_edge.url}/predictions/m{query.replace('jpeg', 'png')}", PICTURE)
    upstream.answer = b""
    for (_, target, headers, _), path in zip(upstream.seen, ("/predictions/m", "/v2/models/m/infer"), strict=True):
        assert target == path
        expected = {"x-mpm-view": "overlay", "x-mpm-schedule": "2,5", "x-mpm-priority": "bulk"}
        assert expected.items() <= headers.items()
    assert upstream.seen[0][2]["accept"] == "image/jpeg"
    upstream.seen.clear()
    for query, headers, told in (
        ("?shedule=off", {}, "query: expected some of view, schedule, merger, fit, priority, accept, got 'shedule'"),
        ("?view=overlay&view=tokens", {}, "got 'view' twice"),
        ("?schedule=off", {"X-MPM-Schedule": "2"}, "schedule: expected it in the URL or as X-MPM-Schedule, got both"),
        ("?merger=a%0d%0ab", {}, "merger: expected plain text"),
    ):
        answer = requests.post(f"{edge.url}/predictions/m{query}", PICTURE, headers=headers)
        assert_refused(answer, 400, told)
    assert not upstream.seen


@pytest.mark.parametrize(
    "nest", ['{"inputs":' + "[" * 300_000, '{"a":' * 65, "[" * 65 + "]" * 65, '{"a":"\\\\","b":' + "[" * 64]
)
def test_refuses_deep_json_before_triton(triton_edge: Front, upstream: Upstream, nest: str) -> None:
    for target, headers in (
        ("/v2/models/m/infer", {}),
        ("/v2/models/m/versions/1/infer", {"Inference-Header-Content-Length": str(len(nest))}),
        ("/v2/models/m/%69nfer", {"Inference-Header-Content-Length": "0"}),
        ("/v2/models/m/generate", {"Inference-Header-Content-Length": "0"}),
        ("/v2/repository/index", {}),
    ):
        for packed in (False, True):
            encoding = {"Content-Encoding": "gzip"} if packed else {}
            body = gzip.compress(nest.encode()) if packed else nest
            answer = ask(triton_edge.url, target, body, headers | encoding)
            assert_refused(answer, 400, "JSON: expected nesting of at most 64, got deeper")
    assert not upstream.seen


def test_triton_gets_json_and_binary_requests_unchanged(triton_edge: Front, upstream: Upstream) -> None:
    requests.put(f"{triton_edge.url}/predictions/m", PICTURE)
    assert upstream.seen.pop()[:2] == ("POST", "/v2/models/m/infer")
    shallow = '{"id":"' + '[\\"{' * 200 + '","inputs":' + "[" * 63 + "]" * 63 + "}"
    url, length = f"{triton_edge.url}/v2/models/m/infer", "Inference-Header-Content-Length"
    assert requests.post(f"{triton_edge.url}/v2/repository/models/m/load", data=shallow).text == shallow
    mixed = shallow.encode() + b"[" * 100_000
    assert requests.post(url, data=mixed, headers={length: str(len(shallow))}).content == mixed
    assert requests.post(url, data=PICTURE, headers={length: "0"}).content == PICTURE
    assert requests.post(f"{triton_edge.url}/v2/repository/index").ok
    assert len(upstream.seen) == 4
    assert_refused(requests.post(url, data=PICTURE), 400, "send a picture with 'Inference-Header-Content-Length: 0'")
    for wrong in ("+0", "-1", "0x10", "99999", "00", "\u0660".encode()):
        answer = requests.post(url, data=shallow, headers={length: wrong})
        assert_refused(answer, 400, "Inference-Header-Content-Length: expected a number")
    long = {length: str(LIMIT + 2)}
    assert_refused(
        requests.post(url, data="{" + "a" * LIMIT + "}", headers=long), 413, "expected at most 1048576 bytes"
    )
    assert len(upstream.seen) == 4


def test_only_named_origins_may_call_from_pages(edge: Front, upstream: Upstream) -> None:
    url, origin = f"{edge.url}/predictions/m", {"Origin": "http://a.example"}
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-mpm-view"}
    preflight = requests.options(url, headers=origin | asking)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "http://a.example"
    assert preflight.headers["Access-Control-Allow-Headers"] == "x-mpm-view"
    assert not upstream.seen
    for answer in (requests.post(url, PICTURE, headers=origin), requests.post(url, json={}, headers=origin)):
        assert answer.headers["Access-Control-Allow-Origin"] == "http://a.example"
        assert "X-MPM-Tokens" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.headers["Vary"] == "Origin"
    for headers in ({"Origin": "http://b.example"}, {"Origin": "null"}, {}):
        for answer in (requests.options(url, headers=headers | asking), requests.post(url, b"a", headers=headers)):
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_a_client_that_leaves_ends_its_request_behind(edge: Front, upstream: Upstream) -> None:
    with socket.create_connection(edge.address) as client:
        client.sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd")
        assert upstream.asked.wait(5)
        left = time.monotonic()
    assert upstream.left.wait(5)
    assert time.monotonic() - left < 0.5


def test_slow_clients_are_ended_and_hold_nobody_up(upstream: Upstream) -> None:
    """100 of each kind: silent, half a head, half a body; good ones meanwhile are as fast as before."""
    with fronted(upstream.url, "torchserve", "--patience-seconds", "1") as edge:

        def percentile() -> float:
            seconds = []
            with requests.Session() as session:
                for _ in range(100):
                    begin = time.monotonic()
                    assert session.post(f"{edge.url}/predictions/m", PICTURE).content == PICTURE
                    seconds.append(time.monotonic() - begin)
            return sorted(seconds)[-2]

        percentile()
        before = percentile()
        starts = (
            b"",
            HEAD,
            HEAD + b"Content-Length: 10\r\n\r\nabcd",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nab",
        )
        slow = [(socket.create_connection(edge.address, timeout=10), start) for start in starts for _ in range(100)]
        for connection, start in slow:
            connection.sendall(start)
        num_before = len(upstream.seen)
        during = percentile()
        assert len(upstream.seen) == num_before + 100, "a part of a request reached the server"
        expected = {b"": b"", HEAD: b"408"}
        for connection, start in slow:
            answer = connection.recv(4096)
            assert answer[9:12] == expected.get(start, b"408"), answer
            connection.close()
        assert during < 2 * before + 0.02, (before, during)


def test_at_the_end_accepts_no_more_and_finishes(upstream: Upstream) -> None:
    upstream.asked.clear()
    with fronted(upstream.url, "torchserve") as edge, ThreadPoolExecutor() as pool, requests.Session() as session:
        session.get(f"{edge.url}/ping")  # leaves an idle connection, which must not hold the end
        waiting = pool.submit(requests.post, f"{edge.url}/wait", PICTURE)
        assert upstream.asked.wait(5)
        with socket.create_connection(edge.address, timeout=5) as uploading:
            uploading.sendall(HEAD + b"Content-Length: 4\r\n\r\nab")
            time.sleep(0.1)
            edge.process.terminate()
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(edge.address)
            uploading.sendall(b"cd")
            assert b"Connection: close" in uploading.recv(4096)
        upstream.release.set()
        assert waiting.result().content == PICTURE
        assert edge.process.wait(2) == 0


def test_says_so_while_no_server_is_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with fronted(f"http://127.0.0.1:{port}", "torchserve") as edge:
        answer = requests.post(f"{edge.url}/predictions/m", PICTURE)
        assert_refused(answer, 503, "the server is being started; ask again")
        assert answer.headers["Retry-After"] == "2"


def test_counts_and_stays_small(edge: Front) -> None:
    requests.post(f"{edge.url}/predictions/m", PICTURE)
    text = requests.get(f"{edge.url}/metrics").text
    assert 'mpm_edge_requests_total{status="200"}' in text
    assert "mpm_edge_connections" in text
    assert "mpm_edge_held_bytes 0.0" in text
    assert psutil.Process(edge.process.pid).memory_info().rss < 60 * 2**20


def assert_refused(answer: requests.Response, status: int, told: str) -> None:
    assert answer.status_code == status, answer.text
    fields = answer.json()
    assert told in fields["error"]
    assert fields["code"] == status
    assert fields["request_id"] == answer.headers["X-Request-Id"]


def test_an_edge_of_its_own_container(upstream: Upstream) -> None:
    """`mpm edge` listens itself, tells metrics apart, ends requests whose client left, and drains on SIGTERM."""
    upstream.seen.clear()
    upstream.left.clear()
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "handlers", "edge", "--server=torchserve", f"--upstream={upstream.url}/"]
    command += [f"--port={port}", f"--metrics-port={metrics_port}", "--answer-seconds=20"]
    told = f"http://127.0.0.1:{metrics_port}/metrics"
    with subprocess.Popen(command) as process:
        until(lambda: requests.get(told, timeout=5).ok)
        assert requests.post(f"http://127.0.0.1:{port}/predictions/m", data=PICTURE).content == PICTURE
        assert 'mpm_edge_requests_total{status="200"} 1.0' in requests.get(told, timeout=5).text
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            until(lambda: upstream.seen[-1][1] == "/slow")
        assert upstream.left.wait(5), "the server behind should hear that nobody waits"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /predictions/m HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
            until(lambda: "mpm_edge_connections 1.0" in requests.get(told, timeout=5).text)
            process.terminate()
            until(lambda: not is_open(port))
            assert requests.get(told, timeout=5).ok, "watched to the end"
            client.sendall(b"cd")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert process.wait(10) == 0


def test_an_edge_that_cannot_listen(upstream: Upstream, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["edge", "--server=triton", f"--port={upstream.server_port}"]) == 2
    assert capfd.readouterr().err == f"cannot listen on 127.0.0.1:{upstream.server_port}: Address already in use\n"


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while True:
        with suppress(requests.ConnectionError, IndexError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_tells_a_lack_of_shared_memory_from_a_fault() -> None:
    for told in ("Failed to increase the shared memory pool size for key 'a'", "expected a single response, got 0"):
        status, text = status_of(500, told)
        assert status == 503
        assert "/dev/shm" in text
    assert status_of(500, "broken") == (500, "broken")
