"""Graphs: what is captured and dropped, and that buffers of fixed size give what packed execution gives.

The graphs here run the captured function again on its buffers, which is all that a real one does.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_cuda import Rerun, compute_packed
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.eager import TorchRuntime
from mpm_ops.runtime.graphs import CudaCapture, GraphPolicy, GraphRuntime, Shape, StaticCall
from mpm_ops.stages import WindowBatch

Make = Callable[..., Segmenter]


def shape(num_tokens: int, num_windows: int = 1) -> Shape:
    return Shape("blocks", range(2), num_windows, num_tokens)


def policy(budget: int = 100, *, most_tokens: int = 1000, longest: int = 197, patience: int = 2) -> GraphPolicy:
    return GraphPolicy(budget, most_tokens=most_tokens, longest=longest, patience=patience)


@pytest.mark.parametrize("num_tokens", [1, 2, 14, 15, 17, 63, 197, 606, 1025, 8191, 30000])
def test_buffers_hold_the_group_and_one_more_sequence(num_tokens: int) -> None:
    sizes = policy(longest=1025)
    bucket = sizes.bucket(num_tokens)
    assert num_tokens + 2 <= bucket <= 1.07 * (num_tokens + 2) + 1
    assert bucket - num_tokens <= 1025
    assert sizes.bucket(bucket - 2) == bucket


def test_buffers_come_in_few_sizes() -> None:
    sizes = policy(longest=1025)
    assert len({sizes.bucket(n) for n in range(4096, 8191)}) <= 17


def test_captures_what_is_asked_for_often() -> None:
    graphs = policy(patience=3)
    assert [graphs.choose(shape(64)) for _ in range(3)] == ["eager", "eager", "capture"]
    assert graphs.captured(shape(64), 10) == []
    assert graphs.choose(shape(64)) == "replay"
    assert graphs.choose(shape(80)) == "eager"
    assert graphs.choose(shape(64, 2)) == "eager"
    assert graphs.counts == {"eager": 4, "capture": 1, "replay": 1, "evicted": 0}


def test_large_groups_need_no_graph() -> None:
    graphs = policy(most_tokens=64)
    assert {graphs.choose(shape(65)) for _ in range(9)} == {"eager"}


def test_what_was_not_used_for_longest_makes_room() -> None:
    graphs = policy(budget=100, patience=1)
    for size in (10, 20, 30):
        assert graphs.choose(shape(size)) == "capture"
        assert graphs.captured(shape(size), 30) == []
    assert graphs.choose(shape(10)) == "replay"
    assert graphs.choose(shape(40)) == "capture"
    assert graphs.captured(shape(40), 60) == [shape(20), shape(30)]
    assert graphs.choose(shape(10)) == "replay"
    assert graphs.choose(shape(20)) == "capture"  # as often as is asked for it from now on
    assert graphs.counts["evicted"] == 2


def test_what_exceeds_the_budget_alone_stays_eager_and_costs_nobody_else() -> None:
    graphs = policy(budget=100, patience=1)
    graphs.choose(shape(10))
    graphs.captured(shape(10), 30)
    assert graphs.choose(shape(50)) == "capture"
    assert graphs.captured(shape(50), 101) == [shape(50)]
    assert {graphs.choose(shape(50)) for _ in range(9)} == {"eager"}
    assert graphs.choose(shape(10)) == "replay"


def test_a_call_copies_its_arguments_into_place_and_runs_on_them() -> None:
    calls = []

    def double(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x + y

    buffers = (torch.zeros(4), torch.ones(4))
    call = StaticCall(double, buffers, Rerun())
    assert call(torch.tensor([1.0, 2.0]), torch.zeros(4)).tolist() == [2, 4, 0, 0]
    result = call(torch.tensor([5.0]), torch.ones(2))
    assert result.tolist() == [11, 5, 0, 0]
    assert call(torch.zeros(4), torch.zeros(4)) is result
    assert all(x is buffers[0] for x in calls)
    assert [call.num_bytes(growth) for growth in (0, 16, 100)] == [3 * 16, 3 * 16, 2 * 16 + 100]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_packed(monkeypatch)


def graph_runtime(model: Segmenter, budget: int = 2**30, capture: Rerun | None = None) -> GraphRuntime:
    return GraphRuntime(model, attention="flash", budget_bytes=budget, capture=capture or Rerun())


def window_groups(sizes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    groups = [torch.randn(number, 3, 64, 64, generator=generator) for number in sizes]
    for i, group in enumerate(groups):
        group[0, :, : 16 * (i % 4)] = group[0, :, :1, :1]  # blank parts merge more, so lengths differ
    return groups


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(
    "fields",
    [{"schedule": (1, 2)}, {"schedule": (2,), "distilled": True}, {"schedule": ()}, {"decoder": "linear"}],
    ids=str,
)
@torch.inference_mode()
def test_graphs_give_what_packed_execution_gives(fields: dict[str, Any], tiny_model: Make) -> None:
    model = tiny_model(**fields)
    plain, graphs = TorchRuntime(model, attention="flash"), graph_runtime(model)
    graphs.policy._patience = 1
    for windows in window_groups([1, 2, 3, 2, 1, 1, 2, 3, 1, 2]):
        model.runtime = plain
        expected = model(windows)
        model.runtime = graphs
        torch.testing.assert_close(model(windows), expected, rtol=0, atol=2e-5)
    assert graphs.policy.counts["replay"] > 3
    assert graphs.policy.counts["eager"] == 0


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_results_stay_when_the_graph_runs_again(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1,))
    model.runtime = graph_runtime(model)
    first, second = window_groups([2, 2])
    for _ in range(4):
        model(first)
    kept = model(first)
    before = kept.clone()
    assert not torch.equal(model(second), before)
    assert torch.equal(kept, before)


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_a_broken_window_leaves_no_trace_in_the_buffers(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1,))
    model.runtime = graphs = graph_runtime(model)
    graphs.policy._patience = 1
    good = WindowBatch(PackedTokens(torch.randn(20, 64), (12, 8)))
    bad = WindowBatch(PackedTokens(torch.full((22, 64), torch.nan), (12, 10)))
    stage = model.stages[0]
    assert graphs.policy.bucket(20) == graphs.policy.bucket(21) - 1
    expected = TorchRuntime(model, attention="flash").run_blocks(stage, good).tokens.values
    found = []
    for batch in (good, bad, good):
        graphs.policy.bucket = lambda num_tokens: 24  # type: ignore[method-assign]
        found.append(graphs.run_blocks(stage, batch).tokens.values)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-5)
    assert found[1].isnan().all()
    assert torch.equal(found[2], found[0])


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_without_room_everything_runs_eagerly(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = graphs = graph_runtime(model, budget=0)
    plain = TorchRuntime(model, attention="flash")
    windows = window_groups([2])[0]
    found = [model(windows) for _ in range(6)]
    model.runtime = plain
    assert all(torch.allclose(logits, model(windows), atol=2e-5) for logits in found)
    assert graphs.policy.counts["replay"] == 0
    assert not graphs._graphs


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_the_memory_that_graphs_share_counts_and_is_given_back_with_the_last(tiny_model: Make) -> None:
    model = tiny_model()
    capture = Rerun(growth=10**6)
    model.runtime = graphs = graph_runtime(model, budget=3 * 10**6, capture=capture)
    graphs.policy._patience = 1
    for number in (1, 2):
        model(torch.randn(number, 3, 64, 64))
    assert len(graphs._graphs) == 2, "one of blocks and one of the decoder fit, two of each do not"
    assert graphs.policy.counts["evicted"] == 2
    assert capture.renewed == 0
    model.runtime = graphs = graph_runtime(model, budget=10**6, capture=capture)
    graphs.policy._patience = 1
    model(torch.randn(1, 3, 64, 64))
    assert not graphs._graphs
    assert capture.renewed == 2, "for the blocks, and for the decoder"


CAPTURE_ERROR = torch.AcceleratorError("operation failed due to a previous error during capture")
CAPTURE_ERROR.error_code = 901  # type: ignore[attr-defined]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("fault", [RuntimeError("no"), torch.OutOfMemoryError("full"), CAPTURE_ERROR], ids=repr)
@torch.inference_mode()
def test_what_cannot_be_captured_runs_without(
    fault: Exception, tiny_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(schedule=(1,))
    windows = window_groups([2])[0]
    model.runtime = TorchRuntime(model, attention="flash")
    expected = model(windows)
    capture = Rerun(fault=fault)
    model.runtime = graphs = graph_runtime(model, capture=capture)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert torch.equal(model(windows), expected)
    assert capture.attempts == 3, "once for the blocks of each stage, and for the decoder"
    assert graphs.policy.counts["failed"] == 3
    assert graphs.policy.counts["replay"] == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all(f"runs without a graph, capturing failed: {fault}" in message for message in messages)


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_a_device_that_fails_while_capturing_is_not_eager(tiny_model: Make) -> None:
    model = tiny_model()
    fault = torch.AcceleratorError("an illegal memory access was encountered")
    fault.error_code = 700  # type: ignore[attr-defined]
    model.runtime = graphs = graph_runtime(model, capture=Rerun(fault=fault))
    graphs.policy._patience = 1
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        model(torch.randn(1, 3, 64, 64))


def test_after_many_failures_nothing_more_is_captured() -> None:
    graphs = policy(patience=1)
    tried = []
    for size in range(20):
        if graphs.choose(shape(size)) == "capture":
            tried.append(size)
            graphs.failed(shape(size))
    assert tried == list(range(8))


class FakeTorchCuda:
    """What capturing asks of torch, with one current stream, and captures that fail where they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
        self.fails = fails
        self.current = "main"
        self.allocating: list[Any] = []
        self.pools = 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "current_stream", lambda *_: FakeStream(self.current))
        monkeypatch.setattr(cuda, "Stream", lambda *_, **__: FakeStream("side"))
        monkeypatch.setattr(cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))
        monkeypatch.setattr(cuda, "stream", self.stream)
        monkeypatch.setattr(cuda, "device", lambda device: self.stream(FakeStream(self.current)))
        monkeypatch.setattr(cuda, "MemPool", self.pool)
        monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def pool(self) -> Any:
        self.pools += 1
        pool = type(
            "Pool", (), {"id": (0, self.pools), "snapshot": lambda self: [{"total_size": 2}, {"total_size": 3}]}
        )
        return pool()

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, pool: Any, stream: "FakeStream", capture_error_mode: str) -> Iterator[None]:
        """As torch's own, which leaves the stream and the allocator as they are where it fails."""
        assert not self.allocating, "already recording to this pool"
        before, self.current = self.current, stream.name
        self.allocating.append(pool)
        if self.fails == "begin":
            raise CAPTURE_ERROR
        try:
            yield
        finally:
            if self.fails == "end":
                raise CAPTURE_ERROR
            self.allocating.remove(pool)
        self.current = before

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to mempool_id")
        self.allocating.remove(pool)


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "FakeStream") -> None:
        assert self.name != other.name


class FakeGraph:
    def replay(self) -> None:
        pass


@pytest.mark.parametrize("fails", ["begin", "body", "end", "warm-up"])
def test_a_lost_capture_leaves_torch_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cuda = FakeTorchCuda(monkeypatch, fails)
    streams = []

    def function() -> Tensor:
        streams.append(torch_cuda.current)
        if fails == "warm-up" or (fails == "body" and torch_cuda.allocating):
            raise RuntimeError("not while capturing")
        return torch.zeros(1)

    capture = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture(function)
        assert torch_cuda.current == "main"
        assert torch_cuda.allocating == []
    torch_cuda.fails = fails = ""  # what is broken heals
    _, result = capture(function)
    assert result.tolist() == [0]
    assert torch_cuda.current == "main"
    assert set(streams) == {"side"}
    assert torch_cuda.pools == 1, "the pool is held, whatever becomes of its graphs"
    assert capture.pool_bytes() == 5
    capture.renew()
    assert torch_cuda.pools == 2


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_windows_of_another_size_run_eagerly(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1,))
    model.runtime = graphs = graph_runtime(model)
    for side in (96, 48):
        for _ in range(4):
            logits = model(torch.randn(1, 3, side, side))
        assert logits.shape[2:] == (side // 16, side // 16)
    assert all(shape.work == "blocks" for shape in graphs._graphs)  # smaller windows still fit the blocks' buffers


def test_graphs_are_refused_where_they_cannot_be_captured(tiny_model: Make) -> None:
    with pytest.raises(ValueError, match=r"^graph_bytes: graphs are captured on a GPU and without padding"):
        make_runtime(tiny_model(), "torch", graph_bytes=2**20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("schedule", [(), (1, 2)])
@torch.inference_mode()
def test_captured_graphs_give_what_operators_give(schedule: tuple[int, ...], precision: str, tiny_model: Make) -> None:
    model = tiny_model(schedule=schedule).cuda()
    plain = make_runtime(model, "torch", precision)
    graphs = make_runtime(model, "torch", precision, graph_bytes=2**30)
    assert isinstance(graphs, GraphRuntime)
    tolerance = 1e-4 if precision == "fp32" else 0.2  # logits are standardised over the classes
    for windows in 4 * window_groups([1, 2, 3, 2, 1]):
        model.runtime = plain
        expected = model(windows.cuda())
        model.runtime = graphs
        found = model(windows.cuda())
        same = (found - expected).abs().mean() < tolerance  # a near-tie may pair others
        assert same, graphs.policy.counts
    assert graphs.policy.counts["replay"] > 10
    assert graphs.policy.counts["capture"] > 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_lost_capture_and_without_any_graph_left_others_are_captured() -> None:
    capture = CudaCapture(torch.device("cuda", 0))
    x = torch.ones(1024, device="cuda")

    def waits() -> Tensor:
        return x * float(x.sum())  # no capture may wait for the device

    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture(waits)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        replay, result = capture(lambda: x + 1)  # whose graph is gone at the next round
        replay()
        assert result.sum().item() == 2048
        assert capture.pool_bytes() > 0
        del replay, result
