"""Ways to label one window with the same weights: ours, the plain one, other runtimes and other ways to merge.

A way takes a normalised window to the logits of its patches and says how long its steps took.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.baselines import Algm, RivalSegmenter, ToMe
from mpm_ops.baselines.rivals import MergedWindows
from mpm_ops.merge import compose_maps
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.openvino import Piece, compile_graph
from mpm_ops.runtime.openvino_graphs import decoder_graph, segment_graph, whole_graph
from mpm_ops.stages import WindowBatch

Steps = dict[str, float]  # seconds: network, merge

# With its published threshold ALGM loses 1.4 points of mean IoU on the demo model and CamVid; with this one, none.
ALGM_AS_ACCURATE = 0.999


@dataclass(frozen=True, slots=True)
class Way:
    """A contestant.

    Attributes:
        name: the method.
        runtime: what computes the network.
        run: [1, 3, S, S] window -> [N, K] logits and the seconds of its steps.
        reference: the way that must give the same logits, by name and runtime, or None.
        plain_labels: labels are decoded by upsampling every class, as Segmenter does it.
    """

    name: str
    runtime: str
    run: Callable[[Tensor], tuple[Tensor, Steps]]
    reference: tuple[str, str] | None = None
    plain_labels: bool = False


@dataclass(frozen=True, slots=True)
class Injected:
    """Lengths after each merge that stand in for those of trained weights, drawn anew for each window."""

    means: tuple[int, ...] = (765, 604)
    spread: int = 20
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def apply(self, batch: WindowBatch, before: WindowBatch, merge: int, align: int) -> WindowBatch:
        """Keep as many tokens as are drawn, whatever was merged, spread evenly over the patches."""
        length = self.means[merge] + int(self.random.integers(-self.spread, self.spread + 1))
        length = -(-length // align) * align
        special, num_tokens = 1, before.tokens.lengths[0] - 1
        merge_map = torch.arange(num_tokens) * length // num_tokens
        values = before.tokens.values[: special + length]
        maps = merge_map if before.merge_maps is None else compose_maps(before.merge_maps[0], merge_map)
        return WindowBatch(PackedTokens(values, (len(values),)), (maps,))


def contestants(model: Segmenter, precision: str, injected: Injected | None) -> list[Way]:
    """All ways for one network at one precision; the plain one first."""
    ways = []
    if precision == "fp32":
        ways += [
            Way("upstream", "torch", _segmenter(_with(model, ()), "torch", precision, None), plain_labels=True),
            Way("whole, unmerged", "onnxruntime", _onnxruntime(_with(model, ())), ("upstream", "torch")),
        ]
    reference = ("upstream", "torch") if precision == "fp32" else None
    ways.append(Way("whole, unmerged", "openvino", _whole(_with(model, ()), precision), reference))
    held = precision == "fp32" and not injected  # random tokens have too many near-ties to compare what merges
    for runtime in ("torch", "openvino") if precision == "fp32" else ("openvino",):
        for name, rival in _rivals(model, trained=injected is None).items():
            same = (name, "torch") if held and runtime == "openvino" else None
            ways.append(Way(name, runtime, _rival(rival, runtime, precision), same))
        for name, schedule, align in (("ours, unmerged", (), 1), ("MPM", (2, 5), 1), ("MPM, align 16", (2, 5), 16)):
            same = (name, "torch") if held and runtime == "openvino" else None
            ours = _with(model, schedule, align)
            ways.append(Way(name, runtime, _segmenter(ours, runtime, precision, injected), same))
    return ways


def _rivals(model: Segmenter, *, trained: bool) -> dict[str, RivalSegmenter]:
    """ToMe removes a fixed number; ALGM as many as trained weights make similar, so random ones tell nothing."""
    rivals: dict[str, RivalSegmenter] = {"ToMe": ToMe(model)}
    if trained:
        rivals |= {"ALGM": Algm(model), f"ALGM, {ALGM_AS_ACCURATE}": Algm(model, threshold=ALGM_AS_ACCURATE)}
    return rivals


def _with(model: Segmenter, schedule: tuple[int, ...], align: int = 1) -> Segmenter:
    """The same weights under another schedule."""
    other = Segmenter(model.config, model.inference, schedule=schedule, align=align).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def _segmenter(model: Segmenter, runtime: str, precision: str, injected: Injected | None) -> Any:
    computing = make_runtime(model, runtime, precision)

    def run(window: Tensor) -> tuple[Tensor, Steps]:
        start = perf_counter()
        merging = 0.0
        batch = model.embed(window)
        for stage in model.stages:
            batch = computing.run_blocks(stage, batch)
            if stage.merges:
                before, at = batch, perf_counter()
                batch = model.merge(batch)
                merging += perf_counter() - at
                if injected:
                    batch = injected.apply(batch, before, stage.index, model.align)
        logits = computing.decode(batch)[0]
        return logits, {"network": perf_counter() - start - merging, "merge": merging}

    return run


def _whole(model: Segmenter, precision: str) -> Any:
    side = model.inference.window_size
    network = compile_graph(whole_graph(model, (side, side)), precision)

    def run(window: Tensor) -> tuple[Tensor, Steps]:
        start = perf_counter()
        logits = network(window)[0]
        return logits, {"network": perf_counter() - start, "merge": 0.0}

    return run


def _onnxruntime(model: Segmenter) -> Any:
    import onnxruntime

    side = model.inference.window_size
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants, as they should for windows of one size
        file = Path(folder) / "model.onnx"
        with torch.no_grad():
            torch.onnx.export(model, (torch.zeros(1, 3, side, side),), file, dynamo=False, input_names=["window"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(window: Tensor) -> tuple[Tensor, Steps]:
        start = perf_counter()
        logits = torch.from_numpy(session.run(None, {"window": window.numpy()})[0])
        return logits[0].flatten(1).T, {"network": perf_counter() - start, "merge": 0.0}

    return run


def _rival(rival: RivalSegmenter, runtime: str, precision: str) -> Any:
    if runtime == "openvino":
        _move_to_openvino(rival, precision)
    merging = [0.0]
    merge = rival.merge

    def timed(*arguments: Any) -> MergedWindows:
        start = perf_counter()
        merged = merge(*arguments)
        merging[0] += perf_counter() - start
        return merged

    rival.merge = timed  # type: ignore[assignment, method-assign]
    patch = rival.model.config.patch_size

    def run(window: Tensor) -> tuple[Tensor, Steps]:
        merging[0] = 0.0
        start = perf_counter()
        logits = rival.decode(rival.encode(window, (window.shape[2] // patch, window.shape[3] // patch)))[0]
        return logits, {"network": perf_counter() - start - merging[0], "merge": merging[0]}

    return run


class _CompiledSegment:
    """A rival's segment on OpenVINO."""

    def __init__(self, segment: Any, biased: bool, precision: str) -> None:
        self.attention = segment.attention
        self._piece: Piece = compile_graph(segment_graph(segment, biased=biased), precision)
        self._biased = biased

    def __call__(self, x: Tensor, log_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = (x,) if log_sizes is None else (x, log_sizes[:, None, None, :])
        assert self._biased == (log_sizes is not None)
        found = self._piece.outputs(*inputs)
        return (found[0], found[1]) if self.attention is not None else (found[0], x.new_empty(0))


def _move_to_openvino(rival: RivalSegmenter, precision: str) -> None:
    model, special = rival.model, rival.model.encoder.num_special
    rival.segments = [
        _CompiledSegment(segment, rival.proportional and i > 0, precision)  # type: ignore[misc]
        for i, segment in enumerate(rival.segments)
    ]
    decoder = compile_graph(decoder_graph(model), precision)

    def decode(merged: MergedWindows) -> Tensor:
        bias = torch.zeros(1, 1, 1, merged.x.shape[1] - special + model.config.n_cls)
        if rival.proportional:
            bias[..., : -model.config.n_cls] = merged.sizes[:, special:].log()
        return decoder(merged.x, bias)[0][merged.rows[0, special:] - special][None]

    rival.decode = decode  # type: ignore[method-assign]
