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
from mpm_ops.kernels import has_triton
from mpm_ops.merging import make_merger
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.eager import TorchRuntime
from mpm_ops.runtime.graphs import (
    CudaCapture,
    GraphPolicy,
    GraphRuntime,
    Shape,
    StaticCall,
    bucket_tokens,
    bucket_windows,
)
from mpm_ops.stages import Decoded, Stage, WindowBatch, WindowView

Make = Callable[..., Segmenter]
pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="triton is not installed: pip install -e '.[kernels]'"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter
]


def shape(num_tokens: int, num_windows: int = 1) -> Shape:
    return Shape(Stage(1, range(4)), num_windows, num_tokens, torch.float32)


@pytest.mark.parametrize("num_tokens", [1, 2, 14, 15, 17, 63, 197, 606, 1025, 8191, 30000, 32 * 1025])
def test_buffers_hold_a_group_and_little_more(num_tokens: int) -> None:
    bucket = bucket_tokens(num_tokens, longest=1025)
    assert num_tokens <= bucket <= 1.032 * num_tokens
    assert bucket - num_tokens < 1025 // 2
    assert bucket_tokens(bucket, longest=1025) == bucket


def test_buffers_come_in_few_sizes() -> None:
    assert len({bucket_tokens(n, longest=1025) for n in range(16384, 32768)}) == 33
    sizes = sorted({bucket_windows(n) for n in range(1, 33)})
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]


def policy(budget: int = 100, *, patience: int = 2) -> GraphPolicy:
    return GraphPolicy(budget, patience=patience)


def test_captures_what_is_asked_for_often() -> None:
    graphs = policy(patience=3)
    assert [graphs.choose(shape(64)) for _ in range(3)] == ["eager", "eager", "capture"]
    assert graphs.captured(shape(64), 10) == []
    assert graphs.choose(shape(64)) == "replay"
    assert graphs.choose(shape(80)) == "eager"
    assert graphs.choose(shape(64, 2)) == "eager"
    assert graphs.counts == {"eager": 4, "capture": 1, "replay": 1, "evicted": 0}


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

    def double(x: Tensor, y: Tensor) -> tuple[Tensor]:
        calls.append(x)
        return (2 * x + y,)

    buffers = (torch.zeros(4), torch.ones(4))
    call = StaticCall(double, buffers, Rerun())
    assert call(torch.tensor([1.0, 2.0]), torch.zeros(4))[0].tolist() == [2, 4, 0, 0]
    (result,) = call(torch.tensor([5.0]), torch.ones(2))
    assert result.tolist() == [11, 5, 0, 0]
    assert call(torch.zeros(4), torch.zeros(4))[0] is result
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
    [
        {"schedule": (1, 2)},
        {"schedule": (2,), "distilled": True},
        {"schedule": ()},
        {"decoder": "linear"},
        {"merger": "mpm:1,2,keep=0.6,weighted,proportional"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_graphs_give_what_packed_execution_gives(fields: dict[str, Any], tiny_model: Make) -> None:
    model = tiny_model(**{name: value for name, value in fields.items() if name != "merger"})
    if "merger" in fields:
        model.merger = make_merger(fields["merger"], model.tower)
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
    graphs = graph_runtime(model)
    graphs.policy._patience = 1
    last, maps = model.stages[1], (torch.arange(16) // 2).expand(2, -1)
    good = WindowBatch(PackedTokens(torch.randn(22, 64), (12, 10)), maps)
    bad = WindowBatch(PackedTokens(torch.full((25, 64), torch.nan), (12, 13)), maps)
    graphs.buffer_size = lambda lengths: (2, 30)  # type: ignore[method-assign]
    expected = Decoded.of(TorchRuntime(model, attention="flash").decode(model.run_blocks(last, good)))
    found = [graphs.launch(last, batch) for batch in (good, bad, good)]
    assert all(isinstance(decoded, Decoded) for decoded in found)
    first, broken, again = (decoded for decoded in found if isinstance(decoded, Decoded))
    torch.testing.assert_close(first.logits, expected.logits, rtol=0, atol=2e-5)
    assert [d.is_finite.tolist() for d in (first, broken, again)] == [[True] * 2, [False] * 2, [True] * 2]
    assert torch.equal(again.logits, first.logits)


@pytest.mark.usefixtures("packed")
@torch.inference_mode()
def test_missing_windows_change_nothing(tiny_model: Make) -> None:
    """Nine windows are computed as ten; windows are regrouped between stages, as a scheduler does."""
    model = tiny_model(schedule=(1, 2))
    graphs = graph_runtime(model)
    graphs.policy._patience = 1
    windows = torch.randn(9, 3, 64, 64)
    model.runtime = TorchRuntime(model, attention="flash")
    expected = model(windows).flatten(2).mT
    firsts = model_launch(model, graphs, 0, windows[:4]) + model_launch(model, graphs, 0, windows[4:])
    views = model_launch(model, graphs, 1, WindowBatch.join(firsts))
    order = [3, 8, 0, 1, 2, 7, 6, 5, 4]
    found = model.launch(model.stages[2], WindowBatch.join([views[i] for i in order]), graphs)
    assert isinstance(found, Decoded)
    torch.testing.assert_close(found.logits, expected[order], rtol=0, atol=2e-5)
    assert {shape.num_windows for shape in graphs._graphs} == {4, 5, 10}
    later = [shape.num_tokens for shape in graphs._graphs if shape.stage.index]
    merged = [sum(view.length for view in batch) for batch in (firsts, views)]
    assert graphs.padding_tokens == sum(later) - sum(merged), (
        "the first stage ran windows of one length, in fours and fives"
    )
    assert graphs.policy.counts["eager"] == 0


def model_launch(model: Segmenter, runtime: GraphRuntime, stage: int, given: Tensor | WindowBatch) -> list[WindowView]:
    launched = model.launch(model.stages[stage], given, runtime)
    assert not isinstance(launched, Decoded)
    return launched().split()


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
    assert graphs.padding_tokens == 0
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
        model(torch.randn(number + 2, 3, 64, 64))
    assert len(graphs._graphs) == 2, "two fit into the budget, four do not"
    assert graphs.policy.counts["evicted"] == 2
    assert capture.renewed == 0
    model.runtime = graphs = graph_runtime(model, budget=10**6, capture=capture)
    graphs.policy._patience = 1
    model(torch.randn(1, 3, 64, 64))
    assert not graphs._graphs
    assert capture.renewed == 1


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
    assert capture.attempts == 1, "none after the first failed"
    assert graphs.policy.counts["failed"] == 1
    assert graphs.policy.counts["replay"] == 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("no more graphs: capturing Shape(")
    assert f"failed: {fault}" in message


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

    def function() -> tuple[Tensor]:
        streams.append(torch_cuda.current)
        if fails == "warm-up" or (fails == "body" and torch_cuda.allocating):
            raise RuntimeError("not while capturing")
        return (torch.zeros(1),)

    capture = CudaCapture(torch.device("cuda", 0))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture(function)
        assert torch_cuda.current == "main"
        assert torch_cuda.allocating == []
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
    assert not graphs._graphs


def test_graphs_are_refused_where_they_cannot_be_captured(tiny_model: Make) -> None:
    with pytest.raises(ValueError, match=r"^graph_bytes: graphs are captured on a GPU, expected 0"):
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
    assert graphs.policy.counts["capture"] >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_lost_capture_graphs_and_operators_go_on() -> None:
    capture = CudaCapture(torch.device("cuda", 0))
    x = torch.ones(1024, device="cuda")

    def waits() -> tuple[Tensor]:
        return (x * float(x.sum()),)  # no capture may wait for the device

    replay, (result,) = capture(lambda: (x + 1,))
    with pytest.raises(RuntimeError):
        capture(waits)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    x.fill_(2)
    replay()
    assert result.sum().item() == 3072
    assert waits()[0].sum().item() == 2 * 2048 * 1024
    assert capture.pool_bytes() > 0
