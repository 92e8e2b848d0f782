"""Whole stages as captured graphs: a group costs a few copies, one launch, and one read of its new lengths.

Launching hundreds of operators one by one takes the host longer than even full groups take a large GPU. A graph works
on buffers of its own, of one size, from a small set. A group's tokens are copied in; windows that are missing have
special tokens only, and what is left of the buffer is one more sequence, which nobody reads and which no other attends
to. So results are those of packed execution, up to the kernel that the matrix product picks for the number of rows.
"""

import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mpm_ops.kernels import has_triton
from mpm_ops.merge_gpu import image_starts, packed_rows
from mpm_ops.merging import Mpm
from mpm_ops.packed import PackedTokens, bounds_of
from mpm_ops.stages import Decoded, Stage, WindowBatch, extended
from mpm_ops.transfers import fetch

from .eager import TorchRuntime

if TYPE_CHECKING:
    from mpm_ops.segmenter import Segmenter

PATIENCE = 3  # how often a shape is asked for before it is captured
_CAPTURE_ERRORS = range(900, 909)  # CUDA's, of a capture: it is lost, the device is not
Results = tuple[Tensor, ...]
Captured = tuple[Callable[[], object], Results]  # how to run a graph again, and where its results lie then


class Capture(Protocol):
    """Captures functions into memory that all their graphs share: they run one after the other."""

    def __call__(self, function: Callable[[], Results]) -> Captured:
        """Capture a function of no arguments; its results lie in the same places after every run."""

    def pool_bytes(self) -> int:
        """What the shared memory takes of the device."""

    def renew(self) -> None:
        """Give the shared memory back, once no graph that was captured so far is left."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for.

    Attributes:
        stage: that it runs.
        num_windows: that its buffers hold.
        num_tokens: of its buffer.
        dtype: of windows or tokens that come in.
    """

    stage: Stage
    num_windows: int
    num_tokens: int
    dtype: torch.dtype


def bucket_windows(num_windows: int) -> int:
    """Windows that buffers for a group hold: four sizes for each doubling, from 4 on."""
    return _round_up(num_windows, parts=4)


def bucket_tokens(num_tokens: int, *, longest: int) -> int:
    """Tokens of the buffer for a group: 32 sizes for each doubling, so that at most 3 % more are computed.

    Args:
        num_tokens: that it must hold.
        longest: no more than this may be added, half of it at most is.
    """
    return _round_up(num_tokens, parts=32, most=longest // 2)


def _round_up(number: int, *, parts: int, most: int | None = None) -> int:
    step = max(1, 2 ** (number.bit_length() - 1) // parts)
    step = step if most is None else max(1, min(step, most))
    return -(-number // step) * step


class GraphPolicy:
    """Which shapes have a graph: those that were asked for often enough, until those not used for longest must go.

    Args:
        budget_bytes: what graphs and their buffers may take.
        patience: how often a shape is asked for before it is captured.
    """

    def __init__(self, budget_bytes: int, *, patience: int = PATIENCE) -> None:
        self._budget_bytes = budget_bytes
        self._patience = patience
        self._asked: Counter[Shape] = Counter()
        self._bytes: OrderedDict[Shape, int] = OrderedDict()  # of what is captured, least recently used first
        self.counts: Counter[str] = Counter()

    def choose(self, shape: Shape) -> str:
        """What to do with a group now: "replay", "capture" or "eager"; counted in `counts`."""
        if shape in self._bytes:
            self._bytes.move_to_end(shape)
            choice = "replay"
        elif self.counts["failed"]:
            choice = "eager"
        else:
            self._asked[shape] += 1
            choice = "capture" if self._asked[shape] >= self._patience else "eager"
        self.counts[choice] += 1
        return choice

    def failed(self) -> None:
        """Capture nothing more: a lost capture may leave torch's allocator in a state that fails the next."""
        self.counts["failed"] += 1

    def captured(self, shape: Shape, num_bytes: int) -> list[Shape]:
        """Take note of a graph's size; returns the shapes whose graphs must go, this one itself if it is too large."""
        self._bytes[shape] = num_bytes
        self._asked.pop(shape, None)
        gone = []
        while sum(self._bytes.values()) > self._budget_bytes:
            victim = shape if num_bytes > self._budget_bytes else next(iter(self._bytes))
            del self._bytes[victim]
            if victim == shape:
                self._asked[victim] = -(10**6)  # too large once, too large always
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

    def __init__(self, function: Callable[..., Results], buffers: tuple[Tensor, ...], capture: Capture) -> None:
        self._buffers = buffers
        self._replay, self._results = capture(lambda: function(*buffers))

    def __call__(self, *values: Tensor) -> Results:
        """Run on these values, each copied to the start of its buffer. The next call overwrites the results."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[: len(value)].copy_(value)
        self._replay()
        return self._results

    def num_bytes(self, pool_growth: int) -> int:
        """What it takes, where the pool that its results lie in grew by so much for it."""
        return sum(b.nbytes for b in self._buffers) + max(sum(r.nbytes for r in self._results), pool_growth)


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

    def __call__(self, function: Callable[[], Results]) -> Captured:
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
                results = function()
        except Exception:
            self._abandon(graph)
            raise
        finally:
            torch.cuda.set_stream(current)  # torch leaves the other one where a capture fails to begin or to end
        return graph.replay, results

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
    """`TorchRuntime` with whole stages as graphs, merges of MPM included. One thread runs it.

    Args:
        model, precision, attention: see `TorchRuntime`; attention must be one that takes packed sequences.
        budget_bytes: see `GraphPolicy`.
        capture: how functions are captured.
    """

    def __init__(
        self,
        model: "Segmenter",
        precision: str = "fp32",
        *,
        attention: str | None = "auto",
        budget_bytes: int,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, precision, attention=attention)
        self._side = model.inference.window_size
        self._special = model.encoder.num_special
        self._longest = (-(-self._side // model.config.patch_size)) ** 2 + self._special
        self._capture = capture or CudaCapture(model.encoder.pos_embed.device)
        self.policy = GraphPolicy(budget_bytes)
        self._graphs: dict[Shape, StaticCall] = {}

    def launch(
        self, stage: Stage, given: Tensor | WindowBatch, *, before_merge: Callable[[], None] = lambda: None
    ) -> Callable[[], WindowBatch] | Decoded:
        launched = self._replayed(stage, given)
        return super().launch(stage, given, before_merge=before_merge) if launched is None else launched

    def _replayed(self, stage: Stage, given: Tensor | WindowBatch) -> Callable[[], WindowBatch] | Decoded | None:
        """See `Segmenter.launch`; None where there is no graph for a group like this."""
        if not stage.decoder_counts or (stage.merger and not (isinstance(stage.merger, Mpm) and has_triton())):
            return None
        shape = self._shape(stage, given)
        graph = shape and self._graph(shape, given)
        if not shape or not graph:
            return None
        results = graph(*self._inputs(shape, given))
        lengths = (self._longest,) * len(given) if isinstance(given, Tensor) else given.tokens.lengths
        number = len(lengths)
        self.padding_tokens += shape.num_tokens - sum(lengths)
        if not stage.merges:
            logits, is_finite = results
            return Decoded(logits[:number].clone(), is_finite[:number].clone())
        merged, maps, bounds = results
        arriving, merged, maps = fetch(bounds[: number + 1]), merged.clone(), maps[:number].clone()

        def wait() -> WindowBatch:
            starts = arriving().tolist()
            left = tuple(stop - start for start, stop in pairwise(starts))
            return WindowBatch(PackedTokens(merged[: starts[-1]], left), maps)

        return wait

    def buffer_size(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Windows and tokens that a group of these lengths, special tokens included, is computed as."""
        num_windows = bucket_windows(len(lengths))
        missing = num_windows - len(lengths)
        filler = self._special + 1  # a patch for whatever points nowhere
        return num_windows, bucket_tokens(sum(lengths) + missing * self._special + filler, longest=self._longest)

    def _shape(self, stage: Stage, given: Tensor | WindowBatch) -> Shape | None:
        """The shape for a group; None for windows of another size than the checkpoint's."""
        if isinstance(given, Tensor):
            sides = given.shape[1:3] if given.dtype == torch.uint8 else given.shape[2:]
            number = bucket_windows(len(given))
            fits = tuple(sides) == (self._side, self._side)
            return Shape(stage, number, number * self._longest, given.dtype) if fits else None
        lengths, num_patches = given.tokens.lengths, self._longest - self._special
        if not isinstance(given.maps, Tensor) or given.maps.shape[1] != num_patches or max(lengths) > self._longest:
            return None
        return Shape(stage, *self.buffer_size(lengths), given.tokens.values.dtype)

    def _inputs(self, shape: Shape, given: Tensor | WindowBatch) -> tuple[Tensor, ...]:
        if isinstance(given, Tensor):
            return (given,)
        assert isinstance(given.maps, Tensor)
        tokens = given.tokens
        missing = shape.num_windows - len(tokens.lengths)
        lengths = (*tokens.lengths, *[self._special] * missing)
        bounds = bounds_of((*lengths, shape.num_tokens - sum(lengths)), tokens.values.device)
        return tokens.values, bounds, given.maps

    def _graph(self, shape: Shape, given: Tensor | WindowBatch) -> StaticCall | None:
        """The graph for a shape, captured now if it is time; None where there is none."""
        choice = self.policy.choose(shape)
        if choice == "replay":
            return self._graphs[shape]
        if choice == "eager":
            return None
        try:
            return self._captured(shape, given)
        except Exception as error:
            if _is_fatal(error):
                raise
            self.policy.failed()
            _log.warning("no more graphs: capturing %s failed: %s; %s", shape, error, dict(self.policy.counts))
            return None  # without a graph it may still fit, or may be allowed

    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, shape: Shape, given: Tensor | WindowBatch) -> StaticCall:
        """A new graph; not in inference mode, whose buffers nobody could write to outside of it."""
        before = self._capture.pool_bytes()
        values = self._inputs(shape, given)
        sizes = (shape.num_windows,) if isinstance(given, Tensor) else (
            shape.num_tokens, shape.num_windows + 2, shape.num_windows,
        )  # fmt: skip
        buffers = tuple(v.new_zeros(size, *v.shape[1:]) for v, size in zip(values, sizes, strict=True))
        for buffer, value in zip(buffers, values, strict=True):
            buffer[: len(value)].copy_(value)
        graph = StaticCall(self._function(shape), buffers, self._capture)
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

    def _function(self, shape: Shape) -> Callable[..., Results]:
        """What is captured: of windows, or of tokens, bounds and maps."""
        lengths = tuple(_some_lengths(shape, self._longest, self._special))

        def first(windows: Tensor) -> Results:
            return self._stage(shape.stage, self._in_precision(shape.stage, self.embed(windows)).tokens, None)

        def later(values: Tensor, bounds: Tensor, maps: Tensor) -> Results:
            return self._stage(shape.stage, PackedTokens(values, lengths, bounds), maps)

        return later if shape.stage.index else first

    def _stage(self, stage: Stage, tokens: PackedTokens, maps: Tensor | None) -> Results:
        """A stage that waits for nothing: logits and whether they are finite, or merged rows, maps and bounds."""
        batch = self._network.run_blocks(stage, WindowBatch(tokens, maps))
        tokens, merger = batch.tokens, stage.merger
        if isinstance(merger, Mpm):
            from mpm_ops.kernels.merging import merge_packed

            sizes = batch.sizes(self._special) if merger.weighted else None
            merged, merge_map, bounds = merge_packed(
                tokens.values, tokens.cu_seqlens, tokens.max_seqlen, self._special, merger.align, merger.keep, sizes
            )
            longer = extended(maps, merge_map, tokens, self._special)
            assert isinstance(longer, Tensor)
            return merged, longer, bounds
        num_windows, rows = len(tokens.lengths), None
        if maps is not None:
            num_patches = len(tokens.values) - num_windows * self._special
            num_windows = len(maps)
            starts = image_starts(tokens.cu_seqlens, self._special)[:num_windows]
            rows = packed_rows(maps, starts).clamp_(max=num_patches - 1)  # those of missing windows may be anything
        logits = self._network.decode_rows(tokens, rows).float().unflatten(0, (num_windows, -1))
        decoded = Decoded.of(logits)
        return decoded.logits, decoded.is_finite


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
