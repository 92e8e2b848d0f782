"""A server that answers like ours but computes nothing: tests decide how long it takes and when it stalls."""

import io
import itertools
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import grpc
import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from tritonclient.grpc import service_pb2

_ACCEPTED = {"MASK_PNG": "image/png", "RESULT_JSON": "application/json"}
PALETTE = [16 * i for i in range(15)]  # five classes


class FakeServer:
    """Answers `/predictions/fake` and `/metrics` on a free loopback port; a context manager.

    Attributes:
        delay: seconds that an answer takes.
        mask: changes the class ids of a picture, given how many were asked for before; the identity at first.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.mask: Callable[[np.ndarray, int], np.ndarray] = lambda labels, _: labels
        self.busy_until = 0.0  # on the monotonic clock; nothing is answered before
        self.stall: tuple[int, float] | None = None  # from which request on, and for how many seconds
        self.stalled_until = 0.0  # seconds since the epoch
        self.serial = False  # one at a time
        self.status = 200
        self.refusals = 0  # requests from now on that find no room, and are to come again at once
        self.num_connections = 0
        self.seen: list[str] = []
        self._one = threading.Lock()
        self._registry = CollectorRegistry()
        self._tokens = Counter("mpm_tokens", "", ["point", "stage", "schedule"], registry=self._registry)
        self._padding = Counter("mpm_padding_tokens", "", registry=self._registry)
        self._images = Counter("mpm_images", "", registry=self._registry)
        self._waiting = Gauge("mpm_waiting_tokens", "", registry=self._registry)
        self._inflight = Gauge("mpm_inflight_requests", "", registry=self._registry)
        Gauge("process_resident_memory_bytes", "", registry=self._registry).set(5e8)
        names = {"variant": "fake", "schedule": "2,5", "align": "1", "runtime": "none", "device": "cpu"}
        self._info = Gauge("mpm_model_info", "", list(names), registry=self._registry)
        self._info.labels(**names).set(1)
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, body: bytes, accept: str) -> tuple[int, dict[str, str], bytes]:
        """A mask by brightness: the same picture always has the same."""
        self._inflight.inc()
        number = len(self.seen)
        self.seen.append(accept)
        if self.stall and number == self.stall[0]:
            self.busy_until = time.monotonic() + self.stall[1]
            self.stalled_until = time.time() + self.stall[1]
        try:
            if self.serial:
                with self._one:
                    self._work()
            else:
                self._work()
            if self.refusals:
                self.refusals -= 1
                return 503, {"Retry-After": "0"}, b'{"error": "no room"}\n'
            if self.status != 200:
                return self.status, {}, b'{"error": "no room"}\n'
            try:
                frame = _read(body)
            except (OSError, ValueError, Image.DecompressionBombError):
                return 400, {}, b'{"code": 400, "error": "not a picture"}\n'
        finally:
            self._inflight.dec()
        labels = self.mask((frame.mean(axis=2) // 52).astype(np.uint8), number)
        self._count()
        headers = {"X-MPM-Tokens": "in=1000, out=600"}
        if accept == "application/json":
            ids, areas = np.unique(labels, return_counts=True)
            classes = [{"id": int(i), "area": int(area)} for i, area in zip(ids, areas, strict=True)]
            told = {"height": labels.shape[0], "width": labels.shape[1], "classes": classes}
            return 200, headers, json.dumps(told).encode()
        image = Image.fromarray(labels)
        image.putpalette(PALETTE)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return 200, headers, buffer.getvalue()

    def also_serve(self, variant: str) -> None:
        """Have the metrics name another model, as those of two servers would."""
        self._info.labels(variant, "2,5", "1", "none", "cpu").set(1)

    def metrics(self) -> bytes:
        return generate_latest(self._registry)

    def _work(self) -> None:
        time.sleep(max(0.0, self.busy_until - time.monotonic()) + self.delay)

    def _count(self) -> None:
        self._images.inc()
        self._padding.inc(10)
        for stage, lengths in enumerate(((1000, 760), (760, 600), (600, 600))):
            for point, tokens in zip(("in", "out"), lengths, strict=True):
                self._tokens.labels(point, str(stage), "2,5").inc(tokens)

    def _handler(fake) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                fake.num_connections += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.path.startswith("/v2/"):
                    self._reply(*fake.answer(body, self.headers.get("Accept", "")))
                    return
                status, _, answer = fake.answer(body, _ACCEPTED[self.headers["X-MPM-Outputs"]])
                if status == 200:  # a description, then the only value and its length before it
                    answer = b"{}" + struct.pack("<I", len(answer)) + answer
                self._reply(status, {"Inference-Header-Content-Length": "2"}, answer)

            def do_GET(self) -> None:
                self._reply(200, {"Content-Type": "text/plain"}, fake.metrics())

            def log_message(self, *_: object) -> None: ...

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler


@contextmanager
def serve_grpc(fake: FakeServer, meet: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """The same server as Triton's gRPC; gives its address, and tells of every request who sent it."""

    def infer(request: Any, context: Any) -> Any:
        meet(context.peer())
        accepted = _ACCEPTED[request.outputs[0].name]
        status, _, answer = fake.answer(request.raw_input_contents[0][4:], accepted)
        if status != 200:
            code = grpc.StatusCode.UNAVAILABLE if status == 503 else grpc.StatusCode.INVALID_ARGUMENT
            context.abort(code, answer.decode())
        return service_pb2.ModelInferResponse(raw_output_contents=[struct.pack("<I", len(answer)) + answer])

    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=service_pb2.ModelInferRequest.FromString,
        response_serializer=service_pb2.ModelInferResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(32))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


class Service:
    """Hands every connection to the next server, as a Service of Kubernetes does; a context manager."""

    def __init__(self, servers: Sequence[FakeServer]) -> None:
        self._addresses = itertools.cycle([("127.0.0.1", int(server.url.rpartition(":")[2])) for server in servers])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(next(self._addresses))
                threading.Thread(target=_join, args=(near, far), daemon=True).start()


def _join(near: socket.socket, far: socket.socket) -> None:
    """Hand on what comes from either side until one has ended."""
    with near, far, suppress(OSError):
        while True:
            for source in select.select([near, far], [], [])[0]:
                if not (data := source.recv(65_536)):
                    return
                (far if source is near else near).sendall(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None: ...  # a client that gave up is no news


def _read(body: bytes) -> np.ndarray:
    if body.startswith(b"\x93NUMPY"):
        frame: np.ndarray = np.load(io.BytesIO(body))
        return frame
    with Image.open(io.BytesIO(body)) as opened:
        if opened.width * opened.height > 10**7:
            raise ValueError("too large")
        return np.asarray(opened.convert("RGB"))
