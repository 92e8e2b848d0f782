"""Stages on OpenVINO's CPU plugin, window by window: x86-64 and arm64, fp32 and, where the chip has it, bf16.

The torch modules are converted stage by stage, each compiled once for any number of tokens. The first starts with the
pixels and the last ends with the logits: every boundary copies tokens between float32 and bf16. Mergers that cut
elsewhere share nothing, because in bf16 every cut moves the last bits: a merger gives the same bytes whatever others
are served beside it.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import openvino as ov
import torch
import torch.nn.functional as F
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from mpm_ops.attention import check_blocks, use_attention
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


class OpenVINORuntime(Runtime):
    """Compiled pieces of a Segmenter. Not thread-safe: one device thread runs it.

    Args:
        model: whose weights are compiled; later changes to them have no effect.
        precision: "fp32" or "bf16".
        mergers: that will be run. Pieces for others, and for windows of another size than the checkpoint's, are
            compiled when they are first met.
    """

    name = "openvino"

    def __init__(self, model: "Segmenter", precision: str, mergers: Sequence["Merger"]) -> None:
        check_blocks(model)
        self.precision = precision
        self._model = with_same_weights(model)
        use_attention(self._model, "plain")
        self._first = lru_cache(_MOST_SHAPES)(self._compile_first)
        self._later = lru_cache(None)(self._compile_later)
        side = model.inference.window_size
        windows = torch.zeros(1, 3, side, side)
        for stage in {stage for merger in mergers for stage in merger.stages}:
            self._piece(stage, None if stage.index else self._padded(windows))

    @classmethod
    def obstacle(cls, model: "Segmenter") -> str | None:
        device = model.encoder.pos_embed.device
        return None if device.type == "cpu" else f"runs on the CPU; expected a model on the CPU, got {device}"

    @classmethod
    def build(
        cls, model: "Segmenter", precision: str, *, mergers: Sequence["Merger"], graph_bytes: int
    ) -> "OpenVINORuntime":
        if graph_bytes:
            raise ValueError("graph_bytes: graphs are captured on a GPU, expected 0 here (graph_mib)")
        return cls(model, resolve_precision(precision), mergers)

    def run(self, stage: Stage, given: Tensor | WindowBatch) -> WindowBatch | Decoded:
        if isinstance(given, Tensor):
            windows = self._padded(given)
            piece, inputs = self._piece(stage, windows), windows.split(1)
            maps: Sequence[Tensor | None] = (None,) * len(inputs)
            size = self._model.config.patch_size
            grid: tuple[int, int] | None = (windows.shape[2] // size, windows.shape[3] // size)
            lengths = (self._length(windows),) * len(inputs)
        else:
            piece, inputs, lengths, grid = self._piece(stage, None), given.tokens.split(), given.tokens.lengths, None
            maps = given.merge_maps or (None,) * len(inputs)
        found = [
            self._run_window(piece, window, length, merge_map, stage)
            for window, length, merge_map in zip(inputs, lengths, maps, strict=True)
        ]
        if not stage.merges:
            return Decoded.of(torch.stack([logits for logits, _ in found]))
        tokens = PackedTokens(torch.cat([tokens for tokens, _ in found]), tuple(lengths))
        keys = torch.cat([keys for _, keys in found if keys is not None]) if stage.wants_keys else None
        return WindowBatch(tokens, None if isinstance(given, Tensor) else given.maps, grid, keys)

    def _run_window(
        self, piece: "Piece", x: Tensor, length: int, merge_map: Tensor | None, stage: Stage
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and keys of a window, or its logits."""
        sizes = None
        if stage.attention_counts or not stage.merges:
            special = self._model.encoder.num_special
            sizes = torch.ones(length)
            if merge_map is not None and (stage.attention_counts or stage.decoder_counts):
                sizes[special:] = merge_map.bincount(minlength=length - special)
        outputs = piece(x, sizes) if piece.takes_sizes and sizes is not None else piece(x)
        keys = outputs[1].clone() if stage.wants_keys else None
        if stage.merges or merge_map is None:
            return outputs[0].clone(), keys  # the next window overwrites it
        return outputs[0][merge_map], None

    def _padded(self, windows: Tensor) -> Tensor:
        if windows.dtype == torch.uint8:
            windows = normalize_windows(windows, self._model.inference.normalization)
        size = self._model.config.patch_size
        return F.pad(windows.float(), (0, -windows.shape[3] % size, 0, -windows.shape[2] % size))

    def _piece(self, stage: Stage, windows: Tensor | None) -> "Piece":
        if windows is not None:
            return self._first(stage.parts, stage.wants_keys, tuple(windows.shape[2:]))
        return self._later(stage.parts, stage.wants_keys, stage.attention_counts)

    def _compile_first(self, parts: range, wants_keys: bool, size: tuple[int, int]) -> "Piece":
        module = _FirstPiece(self._model, parts, wants_keys, attention_counts=False)
        module.fix_positions(size)
        return self._compile(module, torch.zeros(1, 3, *size), ov.PartialShape([1, 3, *size]))

    def _compile_later(self, parts: range, wants_keys: bool, attention_counts: bool) -> "Piece":
        width = self._model.config.d_model
        module = _TracedPiece(self._model, parts, wants_keys, attention_counts)
        return self._compile(module, torch.zeros(_TRACED_LENGTH, width), ov.PartialShape([-1, width]))

    def _compile(self, module: "_TracedPiece", given: Tensor, shape: ov.PartialShape) -> "Piece":
        inputs, shapes = [given], [shape]
        if module.takes_sizes:
            length = _TRACED_LENGTH if given.ndim == 2 else self._length(given)
            inputs.append(torch.ones(length))
            shapes.append(ov.PartialShape([-1 if given.ndim == 2 else length]))
        return Piece(
            compile_graph(convert_graph(module, inputs, shapes), self.precision), takes_sizes=module.takes_sizes
        )

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


class _TracedPiece(nn.Module):
    """Parts of a network for one window: tokens [L, D], and where it counts them sizes [L], to tokens and keys.

    The last parts end with the logits [M, K] of image tokens instead.
    """

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
        self.takes_sizes = attention_counts or self.is_last

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.run(PackedTokens(x, (len(x),)), sizes)

    def run(self, tokens: PackedTokens, sizes: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        key_bias = sizes.log() if self.attention_counts and sizes is not None else None
        tokens, keys = self.model.run_parts(self.parts, tokens, key_bias, wants_keys=self.wants_keys)
        if self.is_last:
            assert sizes is not None
            return self.model.score(tokens, sizes[self.model.encoder.num_special :])
        return tokens.values if keys is None else (tokens.values, keys)


class _FirstPiece(_TracedPiece):
    """The same from a normalised window [1, 3, H, W] of one size on."""

    def fix_positions(self, size: tuple[int, int]) -> None:
        """Make the positions of windows of this size constants: OpenVINO interpolates with other numbers."""
        encoder = self.model.encoder
        grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
        encoder.pos_embed = nn.Parameter(encoder.positions(grid).detach(), requires_grad=False)
        encoder.stored_grid = grid

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.run(self.model.encoder.embed(x), sizes)


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


def compile_graph(graph: ov.Model, precision: str, **options: object) -> ov.CompiledModel:
    """Compile for as many threads as torch has now; options are OpenVINO's own."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # several workers would be pinned to the same cores
        "CPU_RUNTIME_CACHE_CAPACITY": 16,  # lengths hardly repeat: remembering thousands took memory and saved no time
    }
    return ov.Core().compile_model(graph, "CPU", config | options)


class Piece:
    """A compiled graph and its one request. What it returns is overwritten by its next call."""

    def __init__(self, compiled: ov.CompiledModel, *, takes_sizes: bool) -> None:
        self.takes_sizes = takes_sizes
        self._request = compiled.create_infer_request()
        self._num_outputs = len(compiled.outputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for i, value in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(value.contiguous().numpy(), shared_memory=True))
        self._request.infer()
        return [torch.from_numpy(self._request.get_output_tensor(i).data) for i in range(self._num_outputs)]
