"""Stages on OpenVINO's CPU plugin, window by window: x86-64 and arm64, fp32 and, where the chip has it, bf16.

The torch modules are converted stage by stage. The first starts with the pixels and is compiled for their size; the
last ends with the logits: every boundary copies tokens between float32 and bf16. Others are compiled once for any
number of tokens, and build their primitives for each number that they meet: so windows are filled up to buckets, under
a mask that hides what fills them, and the primitives of few shapes stay cached. A window's bucket depends on its own
length alone. Mergers that cut elsewhere share nothing, because in bf16 every cut moves the last bits: a merger gives
the same bytes whatever others are served beside it.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING

import openvino as ov
import torch
import torch.nn.functional as F
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from mpm_ops.attention import check_blocks, use_attention
from mpm_ops.cpus import usable_cores
from mpm_ops.decoders import DecoderLinear
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Decoded, Stage, WindowBatch
from mpm_ops.windows import normalize_windows

from .base import Runtime
from .eager import with_same_weights

if TYPE_CHECKING:
    from mpm_ops.merging import Merger
    from mpm_ops.segmenter import Segmenter

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_TRACED_LENGTH = 37  # of tokens; any does
_MOST_SHAPES = 8  # of windows, beside each other in memory
_BUCKET = 32  # tokens; as fast as 16 and 64, at half of the first one's memory and half of the other's padding
_WARM_UP_SECONDS = 10.0


class OpenVINORuntime(Runtime):
    """Compiled pieces of a Segmenter. Not thread-safe: one thread runs it, and one each of its streams.

    Every piece is compiled once for all threads, and where there are streams a second time for all of these together,
    which share its weights.

    Args:
        model: whose weights are compiled; later changes to them have no effect.
        precision: "fp32" or "bf16".
        mergers: that will be run. Pieces for others, and for windows of another size than the checkpoint's, are
            compiled when they are first met.
        threads: of all streams together; 0 for the usable cores.
        streams: into which they are divided; "auto" for one thread each, 1 for none.

    Raises:
        ValueError: there are more streams than threads.
    """

    name = "openvino"

    def __init__(
        self,
        model: "Segmenter",
        precision: str,
        mergers: Sequence["Merger"],
        *,
        threads: int = 0,
        streams: int | str = 1,
    ) -> None:
        check_blocks(model)
        self.precision = precision
        self._threads = threads or usable_cores()
        self._num_streams = self._threads if isinstance(streams, str) else streams
        if self._num_streams > self._threads:
            raise ValueError(f"streams: expected auto or at most {self._threads}, one a thread, got {streams}")
        self._model = with_same_weights(model)
        use_attention(self._model, "plain")
        self._first = lru_cache(_MOST_SHAPES)(self._compile_first)
        self._later = lru_cache(None)(self._compile_later)
        side = model.inference.window_size
        windows = torch.zeros(1, 3, side, side)
        for stage in {stage for merger in mergers for stage in merger.stages}:
            if stage.index:
                self._later(stage.parts, stage.wants_keys, stage.attention_counts)
            else:
                self._first(stage.parts, stage.wants_keys, tuple(self._padded(windows).shape[2:]))
        self._place = 0  # of its pieces among those for all threads and for each stream
        self.streams = [self._on_stream(i) for i in range(self._num_streams)] if self._num_streams > 1 else []

    def _on_stream(self, index: int) -> "OpenVINORuntime":
        stream = copy.copy(self)
        stream._place = 1 + index
        return stream

    @classmethod
    def obstacle(cls, model: "Segmenter") -> str | None:
        device = model.encoder.pos_embed.device
        return None if device.type == "cpu" else f"runs on the CPU; expected a model on the CPU, got {device}"

    @classmethod
    def build(
        cls,
        model: "Segmenter",
        precision: str,
        *,
        mergers: Sequence["Merger"],
        graph_bytes: int = 0,
        threads: int = 0,
        streams: int | str = 1,
    ) -> "OpenVINORuntime":
        if graph_bytes:
            raise ValueError("graph_bytes: graphs are captured on a GPU, expected 0 here (graph_mib)")
        return cls(model, resolve_precision(precision), mergers, threads=threads, streams=streams)

    def bucket(self, length: int) -> int:
        return -(-length // _BUCKET) * _BUCKET

    def warm_up(self, mergers: Sequence["Merger"]) -> None:
        """Build the primitives of the buckets that windows of the checkpoint's size can reach, the likely ones first,
        for all threads and for every stream at once; those that a slow machine can't build in time are built when they
        are met. Streams that give other bytes than all threads together are given up."""
        begun = monotonic()
        grid = self._model.inference.window_size // self._model.config.patch_size
        visits = _likely_first(mergers, grid**2, self.bucket, self._model.encoder.num_special)
        everywhere = [self, *self.streams]
        with ThreadPoolExecutor(len(everywhere)) as threads:
            found = [*threads.map(lambda place: place._visit(visits, begun + _WARM_UP_SECONDS), everywhere)]
        done = min(map(len, found))
        _log.info("warm-up: %d of %d shapes of stages in %.1f s", done, len(visits), monotonic() - begun)
        if any(others[:done] != found[0][:done] for others in found[1:]):
            _log.warning("streams: not used, for this processor rounds otherwise with fewer threads")
            self.streams = []

    def _visit(self, visits: Iterable[tuple[Stage, int]], until: float) -> list[int]:
        """Run stages on windows of these lengths until it is late; hashes of what they give."""
        random = torch.Generator().manual_seed(0)
        side = self._model.inference.window_size
        window = torch.randn(1, 3, side, side, generator=random)
        tokens = torch.randn(self._length(window), self._model.config.d_model, generator=random)
        found = []
        for stage, length in visits:
            if monotonic() > until:
                break
            batch = WindowBatch(PackedTokens(tokens[:length], (length,)))
            done = self.run(stage, batch if stage.index else window)
            found.append(
                hash((done.tokens.values if isinstance(done, WindowBatch) else done.logits).numpy().tobytes())
            )
        return found

    def launch(
        self, stage: Stage, given: Tensor | WindowBatch, *, before_merge: Callable[[], None] = lambda: None
    ) -> Callable[[], WindowBatch] | Decoded:
        with _one_torch_thread():
            return super().launch(stage, given, before_merge=before_merge)

    def run(self, stage: Stage, given: Tensor | WindowBatch) -> WindowBatch | Decoded:
        grid, maps = None, None
        if isinstance(given, Tensor):
            windows = self._padded(given)
            size = self._model.config.patch_size
            grid = (windows.shape[2] // size, windows.shape[3] // size)
            lengths = (self._length(windows),) * len(windows)
            piece = self._first(stage.parts, stage.wants_keys, tuple(windows.shape[2:]))[self._place]
            inputs: Iterable[tuple[Tensor, ...]] = zip(windows.split(1), strict=True)
        else:
            lengths, maps = given.tokens.lengths, given.merge_maps
            piece = self._later(stage.parts, stage.wants_keys, stage.attention_counts)[self._place]
            inputs = (
                self._filled(window, merge_map, stage)
                for window, merge_map in zip(given.tokens.split(), maps or (None,) * len(lengths), strict=True)
            )
        dropped = 0 if stage.merges else self._model.encoder.num_special  # which get no logits
        found, keys = [], []
        for its_inputs, length in zip(inputs, lengths, strict=True):  # the next window overwrites what a piece gives
            outputs = piece(*its_inputs)
            found.append(outputs[0][: length - dropped].clone())
            if stage.wants_keys:
                keys.append(outputs[1][:length].clone())
        if not stage.merges:
            return Decoded.of(torch.stack(found if maps is None else [x[m] for x, m in zip(found, maps, strict=True)]))
        batch_maps = None if isinstance(given, Tensor) else given.maps
        return WindowBatch(PackedTokens.pack(found), batch_maps, grid, torch.cat(keys) if keys else None)

    def _filled(self, x: Tensor, merge_map: Tensor | None, stage: Stage) -> tuple[Tensor, Tensor]:
        """Tokens of a window and what each counts as, with rows that count nothing up to its bucket."""
        special, length = self._model.encoder.num_special, len(x)
        padding = self.bucket(length) - length
        sizes = torch.ones(length)
        if merge_map is not None and (stage.attention_counts or stage.decoder_counts):
            sizes[special:] = merge_map.bincount(minlength=length - special)
        return F.pad(x, (0, 0, 0, padding)), F.pad(sizes, (0, padding))

    def _padded(self, windows: Tensor) -> Tensor:
        if windows.dtype == torch.uint8:
            windows = normalize_windows(windows, self._model.inference.normalization)
        size = self._model.config.patch_size
        return F.pad(windows.float(), (0, -windows.shape[3] % size, 0, -windows.shape[2] % size))

    def _compile_first(self, parts: range, wants_keys: bool, size: tuple[int, int]) -> "list[Piece]":
        module = _FirstPiece(self._model, parts, wants_keys, attention_counts=False)
        module.fix_positions(size)
        return self._compile(module, [torch.zeros(1, 3, *size)], [[1, 3, *size]])

    def _compile_later(self, parts: range, wants_keys: bool, attention_counts: bool) -> "list[Piece]":
        width = self._model.config.d_model
        module = _LaterPiece(self._model, parts, wants_keys, attention_counts)
        inputs = [torch.zeros(_TRACED_LENGTH, width), torch.ones(_TRACED_LENGTH)]
        return self._compile(module, inputs, [[-1, width], [-1]])

    def _compile(self, module: nn.Module, inputs: Sequence[Tensor], shapes: Sequence[list[int]]) -> "list[Piece]":
        """The piece for all threads, and those for each stream."""
        graph = convert_graph(module, inputs, [*map(ov.PartialShape, shapes)])
        pieces = [Piece(compile_graph(graph, self.precision, self._threads))]
        if self._num_streams > 1:
            several = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self._num_streams}
            compiled = compile_graph(graph, self.precision, self._threads, **several)
            pieces += [Piece(compiled) for _ in range(self._num_streams)]
        return pieces

    def _length(self, windows: Tensor) -> int:
        """Tokens of each window."""
        num_patches = windows.shape[2] * windows.shape[3] // self._model.config.patch_size**2
        return self._model.encoder.num_special + num_patches


def convert_graph(module: nn.Module, inputs: Sequence[Tensor], shapes: Sequence[ov.PartialShape]) -> ov.Model:
    """A graph that holds a copy of the weights. (`openvino.convert_model` would also send usage data home.)"""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing says that lengths become constants: none that matters does
        traced = torch.jit.trace(module, tuple(inputs), check_trace=False)
        decoder = TorchScriptPythonDecoder(traced, example_input=tuple(inputs), shared_memory=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    loaded = frontend.load(decoder)
    for place, shape in zip(loaded.get_inputs(), shapes, strict=True):
        loaded.set_partial_shape(place, shape)
        loaded.set_element_type(place, ov.Type.f32)
    graph = frontend.convert(loaded)
    graph.validate_nodes_and_infer_types()
    return graph


class _Piece(nn.Module):
    """Parts of a network for one window: to tokens [L, D] and keys, or the last parts to logits [L - special, K]."""

    def __init__(self, model: "Segmenter", parts: range, wants_keys: bool, attention_counts: bool) -> None:
        super().__init__()
        self.wants_keys = wants_keys
        self.attention_counts = attention_counts
        self.is_last = parts.stop == 2 * model.config.n_layers
        first, last = parts.start // 2, -(-parts.stop // 2)
        self.parts = range(parts.start - 2 * first, parts.stop - 2 * first)
        self.model = with_same_weights(model)  # and nothing else in it: tracing and conversion take all they find
        self.model.encoder.blocks = nn.Sequential(*list(self.model.encoder.blocks)[first:last])
        if not self.is_last:
            self.model.decoder = DecoderLinear(n_cls=1, d_encoder=1)

    def run(self, tokens: PackedTokens, sizes: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        key_bias = None
        if sizes is not None:
            key_bias = (sizes if self.attention_counts else sizes.clamp(max=1)).log()
        tokens, keys = self.model.run_parts(self.parts, tokens, key_bias, wants_keys=self.wants_keys)
        if self.is_last:
            return self.model.score(tokens, None if sizes is None else sizes[self.model.encoder.num_special :])
        return tokens.values if keys is None else (tokens.values, keys)


class _LaterPiece(_Piece):
    """From tokens [L, D] and sizes [L] on: no token attends to one of size 0."""

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.run(PackedTokens(x, (len(x),)), sizes)


class _FirstPiece(_Piece):
    """From a normalised window [1, 3, H, W] of one size on."""

    def fix_positions(self, size: tuple[int, int]) -> None:
        """Make the positions of windows of this size constants: OpenVINO interpolates with other numbers."""
        encoder = self.model.encoder
        grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
        encoder.pos_embed = nn.Parameter(encoder.positions(grid).detach(), requires_grad=False)
        encoder.stored_grid = grid

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.run(self.model.encoder.embed(x))


def _likely_first(
    mergers: Iterable["Merger"], num_patches: int, bucket: Callable[[int], int], num_special: int
) -> list[tuple[Stage, int]]:
    """Stages, and lengths in all buckets that they may meet, those in the middle of each range first."""
    found: dict[tuple[Stage, int], float] = {}
    for merger in mergers:
        shortest = longest = num_patches
        for stage in merger.stages:
            lengths = {bucket(n): n for n in range(shortest + num_special, longest + num_special + 1)}.values()
            for n in lengths:
                found[stage, n] = abs(2 * n - shortest - longest) / num_patches
            shortest, longest = merger.lengths_after(shortest)[0], merger.lengths_after(longest)[-1]
    return sorted(found, key=lambda visit: found[visit])


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Let torch's operators run in the calling thread alone: its pool's threads would spin, when they have no more to
    do, on the cores of OpenVINO's. Cosines then round alike whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_precision(precision: str) -> str:
    """bf16 for "auto" where the chip multiplies it natively.

    Raises:
        ValueError: bf16 is asked for where it isn't, or fp16; OpenVINO would silently run fp32.
    """
    if precision == "fp16":
        raise ValueError("precision: openvino runs fp32 or bf16, got fp16")
    native = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not native:
        raise ValueError("precision: this CPU has no native bf16, expected fp32 or auto")
    return ("bf16" if native else "fp32") if precision == "auto" else precision


def compile_graph(graph: ov.Model, precision: str, threads: int, **options: object) -> ov.CompiledModel:
    """Compile for so many threads; options are OpenVINO's own."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # several workers would be pinned to the same cores
        "CPU_RUNTIME_CACHE_CAPACITY": 1024,  # primitives: those of all buckets of a window of 1,024 patches
    }
    return ov.Core().compile_model(graph, "CPU", config | options)


class Piece:
    """A compiled graph and its one request. What it returns is overwritten by its next call."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._request = compiled.create_infer_request()
        self._num_outputs = len(compiled.outputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for i, value in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(value.contiguous().numpy(), shared_memory=True))
        self._request.infer()
        return [torch.from_numpy(self._request.get_output_tensor(i).data) for i in range(self._num_outputs)]


_log = logging.getLogger(__name__)
