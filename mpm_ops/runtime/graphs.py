"""Stages as captured graphs: small groups, whose operators take longer to launch than to run, are launched at once.

A graph works on buffers of its own, of one size. A group's tokens are copied in; what is left of the buffer is one
more sequence, which nobody reads and which no other attends to. So results are those of packed execution, up to the
kernel that the matrix product picks for the number of rows.
"""

import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpm_ops.merge_gpu import packed_rows
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch

from .eager import TorchRuntime

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

PATIENCE = 3  # how often a shape is asked for before it is captured
_MOST_FAILURES = 8  # captures that fail before no more are tried: it is not the shape, then
_CAPTURE_ERRORS = range(900, 909)  # CUDA's, of a capture: it is lost, the device is not
Captured = tuple[Callable[[], object], Tensor]  # how to run a graph again, and where its result lies then


class Capture(Protocol):
    """Captures functions into memory that all their graphs share: they run one after the other."""

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        """Capture a function of no arguments; its result lies in the same place after every run."""

    def pool_bytes(self) -> int:
        """What the shared memory takes of the device."""

    def renew(self) -> None:
        """Give the shared memory back, once no graph that was captured so far is left."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for.

    Attributes:
        work: "blocks", or "decode" of merged or "decode unmerged" tokens.
        blocks: of the encoder; empty for decoding.
        num_windows: of the group.
        num_tokens: of the buffer, more than the group's.
    """

    work: str
    blocks: range
    num_windows: int
    num_tokens: int


class GraphPolicy:
    """Which shapes have a graph: those that were asked for often enough, until those not used for longest must go.

    Args:
        budget_bytes: what graphs and their buffers may take.
        most_tokens: larger groups keep the device busy without a graph.
        longest: tokens of a window before merging.
        patience: how often a shape is asked for before it is captured.
    """

    def __init__(self, budget_bytes: int, *, most_tokens: int, longest: int, patience: int = PATIENCE) -> None:
        self._budget_bytes = budget_bytes
        self._most_tokens = most_tokens
        self._longest = longest
        self._patience = patience
        self._asked: Counter[Shape] = Counter()
        self._bytes: OrderedDict[Shape, int] = OrderedDict()  # of what is captured, least recently used first
        self.counts: Counter[str] = Counter()

    def bucket(self, num_tokens: int) -> int:
        """Tokens of the buffer for a group: two more at least, and 16 sizes for each doubling."""
        least = num_tokens + 2  # the last sequence holds special tokens too
        step = max(1, min(2 ** (least.bit_length() - 1) // 16, self._longest // 2))
        return -(-least // step) * step

    def choose(self, shape: Shape) -> str:
        """What to do with a group now: "replay", "capture" or "eager"; counted in `counts`."""
        if shape in self._bytes:
            self._bytes.move_to_end(shape)
            choice = "replay"
        elif shape.num_tokens > self._most_tokens or self.counts["failed"] >= _MOST_FAILURES:
            choice = "eager"
        else:
            self._asked[shape] += 1
            choice = "capture" if self._asked[shape] >= self._patience else "eager"
        self.counts[choice] += 1
        return choice

    def failed(self, shape: Shape) -> None:
        """Capturing failed: run groups of this shape without a graph from now on."""
        self.counts["failed"] += 1
        self._give_up(shape)

    def _give_up(self, shape: Shape) -> None:
        self._asked[shape] = -(10**6)

    def captured(self, shape: Shape, num_bytes: int) -> list[Shape]:
        """Take note of a graph's size; returns the shapes whose graphs must go, this one itself if it is too large."""
        self._bytes[shape] = num_bytes
        self._asked.pop(shape, None)
        gone = []
        while sum(self._bytes.values()) > self._budget_bytes:
            victim = shape if num_bytes > self._budget_bytes else next(iter(self._bytes))
            del self._bytes[victim]
            if victim == shape:
                self._give_up(victim)  # too large once, too large always
            gone.append(victim)
        self.counts["evicted"] += len(gone)
        return gone


class StaticCall:
    """A function captured on buffers of its own.

    Args:
        function: of as many tensors as there are buffers.
        buffers: its arguments from now on, with contents that it can run on.
        capture: runs it and says how to run it again.
    """

    def __init__(self, function: Callable[..., Tensor], buffers: tuple[Tensor, ...], capture: Capture) -> None:
        self._buffers = buffers
        self._replay, self._result = capture(lambda: function(*buffers))

    def __call__(self, *values: Tensor) -> Tensor:
        """Run on these values, each copied to the start of its buffer. The next call overwrites the result."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[: len(value)].copy_(value)
        self._replay()
        return self._result

    def num_bytes(self, pool_growth: int) -> int:
        """What it takes, where the pool that its result lies in grew by so much for it."""
        return sum(buffer.nbytes for buffer in self._buffers) + max(self._result.nbytes, pool_growth)


class CudaCapture:
    """Captures with torch, see `Capture`.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device, priority=-1)  # torch hands out 32 in turn; no other thread draws these
        self._abandoned: list[torch.cuda.CUDAGraph] = []
        self.renew()

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        side, current = self._side, torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):  # libraries set themselves up in the first calls, which can't be captured
                function()
                function()
        finally:
            current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda._POOL_HANDLE(self._pool.id)
        try:
            # Uploads and labels go on in other threads meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = function()
        except Exception:
            self._abandon(graph)
            raise
        finally:
            torch.cuda.set_stream(current)  # torch leaves the other one where a capture fails to begin or to end
        return graph.replay, result

    def pool_bytes(self) -> int:
        return sum(segment["total_size"] for segment in self._pool.snapshot())

    def renew(self) -> None:
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.MemPool()  # held: torch captures nothing into a pool whose graphs are all gone

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Make torch's allocator forget a lost capture: before 2.12 it goes on where ending one fails."""
        with contextlib.suppress(RuntimeError):  # it has forgotten
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool.id)
        self._abandoned.append(graph)  # the one for pinned memory can't be told, and would ask a graph that is gone


class GraphRuntime(TorchRuntime):
    """`TorchRuntime` with graphs for small groups; others run operator by operator. One thread runs it.

    Args:
        model, precision, attention: see `TorchRuntime`; attention must be one that takes packed sequences.
        budget_bytes: see `GraphPolicy`.
        most_tokens: see `GraphPolicy`.
        capture: how functions are captured.
    """

    def __init__(
        self,
        model: "Segmenter",
        precision: str = "fp32",
        *,
        attention: str | None = "auto",
        budget_bytes: int,
        most_tokens: int = 8192,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, precision, attention=attention)
        grid = -(-model.inference.window_size // model.config.patch_size)
        self._special = model.encoder.num_special
        self._longest = grid**2 + self._special
        self._capture = capture or CudaCapture(model.encoder.pos_embed.device)
        self.policy = GraphPolicy(budget_bytes, most_tokens=most_tokens, longest=self._longest)
        self._graphs: dict[Shape, StaticCall] = {}

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        batch = self._in_precision(stage, batch)
        tokens = batch.tokens

        def blocks(values: Tensor, bounds: Tensor) -> Tensor:
            return self._network.run_tokens(PackedTokens(values, lengths, bounds), stage.blocks).values

        shape, lengths = self._shape("blocks", stage.blocks, tokens)
        graph = self._graph(shape, blocks, tokens)
        if graph is None:
            return super().run_blocks(stage, batch)
        values = graph(tokens.values, tokens.cu_seqlens)[: len(tokens.values)].clone()
        return batch.with_tokens(tokens.with_values(values))

    def decode(self, batch: WindowBatch) -> Tensor:
        tokens, num_windows = batch.tokens, len(batch.tokens.lengths)
        rows: tuple[Tensor, ...] = ()
        if batch.merge_maps is not None:
            rows = (packed_rows(batch.merge_maps, [length - self._special for length in tokens.lengths]),)

        def decode(values: Tensor, bounds: Tensor, *rows: Tensor) -> Tensor:
            return self._network.decode_rows(PackedTokens(values, lengths, bounds), rows[0] if rows else None).float()

        shape, lengths = self._shape("decode" if rows else "decode unmerged", range(0), tokens)
        graph = self._graph(shape, decode, tokens, *rows)
        if graph is None:
            return super().decode(batch)
        num_rows = len(rows[0]) if rows else len(tokens.values) - num_windows * self._special
        return graph(tokens.values, tokens.cu_seqlens, *rows)[:num_rows].clone().unflatten(0, (num_windows, -1))

    def _shape(self, work: str, blocks: range, tokens: PackedTokens) -> tuple[Shape, tuple[int, ...]]:
        shape = Shape(work, blocks, len(tokens.lengths), self.policy.bucket(len(tokens.values)))
        return shape, tuple(_some_lengths(shape, self._longest, self._special))

    def _graph(
        self, shape: Shape, function: Callable[..., Tensor], tokens: PackedTokens, *rows: Tensor
    ) -> StaticCall | None:
        """The graph for a shape, captured now if it is time; None where there is none."""
        num_patches = shape.num_windows * (self._longest - self._special)
        if max(tokens.lengths) > self._longest or any(len(row) != num_patches for row in rows):
            return None  # windows of another size than the checkpoint's
        choice = self.policy.choose(shape)
        if choice == "replay":
            return self._graphs[shape]
        if choice == "eager":
            return None
        try:
            return self._captured(shape, function, tokens, rows)
        except Exception as error:
            if _is_fatal(error):
                raise
            self.policy.failed(shape)
            _log.warning("%s runs without a graph, capturing failed: %s; %s", shape, error, dict(self.policy.counts))
            return None  # without a graph it may still fit, or may be allowed

    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(
        self, shape: Shape, function: Callable[..., Tensor], tokens: PackedTokens, rows: Sequence[Tensor]
    ) -> StaticCall:
        """A new graph; not in inference mode, whose buffers nobody could write to outside of it."""
        before = self._capture.pool_bytes()
        values = tokens.values.new_zeros(shape.num_tokens, tokens.values.shape[1])
        values[: len(tokens.values)] = tokens.values
        end = torch.tensor([shape.num_tokens], dtype=torch.int32, device=values.device)
        buffers = (values, torch.cat([tokens.cu_seqlens, end]), *(row.clone() for row in rows))
        graph = StaticCall(function, buffers, self._capture)
        num_bytes = graph.num_bytes(self._capture.pool_bytes() - before)
        self._graphs[shape] = graph
        gone = self.policy.captured(shape, num_bytes)
        for victim in gone:
            del self._graphs[victim]
        if not self._graphs:
            self._capture.renew()
        _log.info(
            "captured %s, %.1f MiB; %d evicted; %s", shape, num_bytes / 2**20, len(gone), dict(self.policy.counts)
        )
        return graph  # even one that must go runs this group


def _some_lengths(shape: Shape, longest: int, num_special: int) -> Iterator[int]:
    """Lengths that fit a buffer: their sum, their number and their maximum count, the device reads the real ones."""
    longest = min(longest, shape.num_tokens - shape.num_windows * num_special)
    yield longest
    rest = shape.num_tokens - longest
    for i in range(shape.num_windows):
        yield rest * (i + 1) // shape.num_windows - rest * i // shape.num_windows


def _is_fatal(error: Exception) -> bool:
    """The device is beyond help, not only the capture."""
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) not in _CAPTURE_ERRORS


_log = logging.getLogger(__name__)
