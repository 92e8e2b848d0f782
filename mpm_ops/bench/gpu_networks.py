"""Whole networks on the device at hand: every way to compute a batch, step by step, and its share of the roof.

Weights are random, which gives tokens no meaning and merging no typical length: so lengths after each merge are
imposed (see `Injected`), and the pairs that are found are only timed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops.evaluate.arithmetic import Arithmetic
from mpm_ops.labels import label_maps
from mpm_ops.merging import ToMe
from mpm_ops.runtime import Runtime
from mpm_ops.runtime.eager import DTYPES, TorchRuntime
from mpm_ops.runtime.graphs import PATIENCE, GraphRuntime
from mpm_ops.segmenter import Segmenter, SegmenterConfig
from mpm_ops.stages import Decoded, WindowBatch
from mpm_ops.windows import InferenceConfig, plan_windows

from .dense import DenseSegmenter
from .injected import Injected
from .timing import Laps, Timer, in_turn

PAPER_UNMERGED = {"fp32": {"Ti": 660, "S": 333, "B": 133, "L": 47}, "bf16": {"B": 735, "L": 375}}
PAPER_MERGED = {
    "fp32": {"Ti": 831, "S": 431, "B": 177, "L": 74},
    "bf16": {"Ti": 1260, "S": 1100, "B": 781, "L": 456},
}
MOST_DIFFERENT = {"fp32": 0.02, "bf16": 0.3, "fp16": 0.1}  # mean deviation of logits over their spread; chance is 1.1
GRAPH_BYTES = 8 << 30
BACK_TO_BACK = 10  # batches
PERIOD = 5  # different lengths of a batch

# Logits of a way, whose steps are laps.
Way = Callable[[Laps, Injected], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        batch: windows computed together.
        side, patch: pixels.
        classes: K.
        networks: D, heads, blocks and what ToMe removes in each of them, by name.
        means, spread: see `Injected`.
        align: of the aligned ways.
        groups: numbers of windows in the comparison of small groups.
        repeats: of everything that is timed.
        gemm: side of the matrices whose product tells what the device can do.
    """

    batch: int = 32
    side: int = 512
    patch: int = 16
    classes: int = 150
    networks: Mapping[str, tuple[int, int, int, int]]
    means: tuple[int, int] = (765, 604)
    spread: int = 20
    align: int = 16
    groups: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 15
    gemm: int = 8192

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    def injected(self, schedule: Sequence[int] = (2, 5)) -> Injected:
        """The same lengths for every way; further merges leave the share of tokens that the second one does."""
        share = self.means[1] / self.means[0]
        means = (*self.means, *(round(self.means[1] * share**i) for i in range(1, len(schedule) - 1)))
        return Injected(means[: len(schedule)], self.spread, np.random.default_rng(0), PERIOD)


PAPER = Scale(
    networks={"S": (384, 6, 12, 30), "Ti": (192, 3, 12, 30), "B": (768, 12, 12, 30), "L": (1024, 16, 24, 15)}
)
TINY = Scale(
    batch=2, side=64, patch=16, classes=5, networks={"Ti": (64, 1, 6, 1)}, means=(12, 9), spread=1, align=4,
    groups=(1, 2), repeats=2, gemm=64,
)  # fmt: skip


def config_of(scale: Scale, name: str) -> SegmenterConfig:
    width, heads, blocks, _ = scale.networks[name]
    return SegmenterConfig(
        image_size=(scale.side, scale.side),
        patch_size=scale.patch,
        d_model=width,
        n_heads=heads,
        n_layers=blocks,
        n_cls=scale.classes,
    )


def whole_windows(scale: Scale) -> InferenceConfig:
    side = scale.side
    return InferenceConfig(im_size=side, max_ratio=4, window_size=side, window_stride=side, normalization="vit")


def build(scale: Scale, name: str, device: torch.device, schedule: tuple[int, ...] = (2, 5)) -> Segmenter:
    """A network with seeded random weights, the same in every call."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)  # biases start random
        model = Segmenter(config_of(scale, name), whole_windows(scale), schedule=schedule).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                std = 0.02 if parameter.shape[0] == 1 else parameter.shape[-1] ** -0.5
                parameter.normal_(std=std, generator=generator)
    return model


def make_graphs(model: Segmenter, precision: str) -> GraphRuntime | None:
    """The runtime whose stages are captured graphs; None where there is no GPU to capture them."""
    if not model.encoder.pos_embed.is_cuda:
        return None
    return GraphRuntime(model, precision, budget_bytes=GRAPH_BYTES)


def make_packed(model: Segmenter, precision: str) -> TorchRuntime:
    return TorchRuntime(model, precision, attention="auto")


@torch.inference_mode()
def time_network(
    scale: Scale, name: str, precision: str, device: torch.device, *, compile_mode: str | None = None,
    schedule: tuple[int, ...] = (2, 5),
) -> dict[str, Any]:  # fmt: skip
    """Every way to compute one batch: milliseconds of its steps, and images a second of batches back to back.

    Args:
        schedule: where the merging ways merge.
        compile_mode: of torch.compile, which "plain" is given to then, too; compiling is not part of its time.

    Raises:
        RuntimeError: two ways to compute the same differ.
    """
    timer = Timer(device)
    windows = torch.randn(scale.batch, 3, scale.side, scale.side, device=device)
    lengths: dict[str, list[tuple[int, ...]]] = {}
    ways = network_ways(scale, name, precision, windows, lengths, schedule)
    references = {"unmerged": "plain", "MPM": "MPM grouped"}
    parity = {
        f"{way} and {reference}": check_same(ways[way], ways[reference], scale, timer, precision, schedule)
        for way, reference in references.items()
    }
    del ways["MPM grouped"]  # the reference alone
    rival: dict[str, Any] = {}
    if compile_mode:
        ways["compiled"], rival = _compiled(scale, name, precision, windows, compile_mode, ways["plain"], timer)
        if "error" in rival:
            del ways["compiled"]
    injected = {way: scale.injected(schedule) for way in ways}
    labelled = {
        way: _labelled(run, injected[way], scale, plain=way in ("plain", "compiled")) for way, run in ways.items()
    }
    times = in_turn(labelled, timer, repeats=scale.repeats)
    peak = gemm_tflops(scale, precision, device)
    model = build(scale, name, device, schedule)
    arithmetic = Arithmetic(model)
    found = {way: _summary(times[way], model, arithmetic, lengths.get(way), peak) for way in ways}
    for way, row in found.items():
        run = _once(ways[way], injected[way])
        for key, work in (("images_per_second", run), ("images_per_second_with_labels", labelled[way])):
            row[key] = round(scale.batch / wall_seconds(work, timer), 1)
    result: dict[str, Any] = {"precision": precision, "batch": scale.batch, "schedule": list(schedule)}
    result |= {"gemm_tflops": peak, "parity": parity}
    result["ways"] = found
    plain = found["plain"]
    for row in found.values():
        for key in ("speedup", "speedup_with_labels"):
            images = key.replace("speedup", "images_per_second")
            row[key] = round(row[images] / plain[images], 3)
    if scale.side == PAPER.side and schedule == (2, 5):
        paper = {"unmerged": PAPER_UNMERGED, "MPM": PAPER_MERGED}
        for way, published in paper.items():
            if of_paper := published.get(precision, {}).get(name):
                found[way]["paper_images_per_second"] = of_paper
                found[way]["of_paper"] = round(found[way]["images_per_second"] / of_paper, 3)
    if rival:
        found["compiled"] = found.get("compiled", {}) | rival
        torch.compiler.reset()  # or its graphs would keep their memory
    return result


def network_ways(
    scale: Scale, name: str, precision: str, windows: Tensor, lengths: dict[str, list[tuple[int, ...]]],
    schedule: tuple[int, ...] = (2, 5),
) -> dict[str, Way]:  # fmt: skip
    """Ways by name; each notes the lengths of its stages, special tokens included.

    "plain" is a batch as everybody computes it: one dense attention per block; the others are packed;
    "MPM grouped" attends window by window. For graphs see `time_served`.
    """
    model, unmerged = build(scale, name, windows.device, schedule), build(scale, name, windows.device, ())
    runs: dict[str, tuple[Segmenter, TorchRuntime, int]] = {
        "plain": (unmerged, TorchRuntime(unmerged, precision, attention="grouped"), 1),
        "unmerged": (unmerged, make_packed(unmerged, precision), 1),
        "MPM": (model, make_packed(model, precision), 1),
        "MPM aligned": (model, make_packed(model, precision), scale.align),
        "MPM grouped": (model, TorchRuntime(model, precision, attention="grouped"), 1),
    }
    ways = {
        way: ours(network, runtime, windows, align, lengths.setdefault(way, []))
        for way, (network, runtime, align) in runs.items()
    }
    return ways | {"ToMe": tome(unmerged, precision, windows, scale.networks[name][3])}


def ours(model: Segmenter, runtime: TorchRuntime, windows: Tensor, align: int, lengths: list[tuple[int, ...]]) -> Way:
    """Our stages; merging is computed, and then the lengths imposed."""

    def run(laps: Laps, injected: Injected) -> Tensor:
        lengths.clear()
        batch = runtime.embed(windows)
        laps.lap("embed")
        for stage in model.stages:
            lengths.append(batch.tokens.lengths)
            batch = runtime.run_blocks(stage, batch)
            laps.lap(f"stage {stage.index}")
            if stage.merges:
                merged = batch.merged(num_special=model.encoder.num_special, align=align)
                laps.lap(f"merge {stage.index}")
                batch = injected.apply(merged, batch, stage.index, align)
                laps.lap("imposing lengths")
        logits = runtime.decode(batch)
        laps.lap("decode")
        return logits

    return run


@torch.inference_mode()
def served(model: Segmenter, runtime: Runtime, windows: Tensor, injected: Injected) -> Callable[[], Tensor]:
    """A batch as it is served, stage by stage, with a wait for the lengths after each merge.

    Every stage computes all it does, and then starts from a batch whose lengths are imposed: prepared once, operator
    by operator, so that imposing them takes no time here.
    """
    prepared: list[Tensor | WindowBatch] = [windows]
    packed = make_packed(model, runtime.precision)
    for stage in model.stages:
        if stage.merges:
            given = prepared[-1]
            before = packed.run_blocks(stage, packed.embed(given) if isinstance(given, Tensor) else given)
            imposed = injected.apply(before, before, stage.index, 1)
            assert imposed.merge_maps is not None
            prepared.append(WindowBatch(imposed.tokens, torch.stack(imposed.merge_maps)))

    def run() -> Tensor:
        for stage, given in zip(model.stages, prepared, strict=True):
            launched = model.launch(stage, given, runtime)
            if not isinstance(launched, Decoded):
                launched()
        assert isinstance(launched, Decoded)
        return launched.logits

    return run


def captured(model: Segmenter, graphs: GraphRuntime, windows: Tensor, injected: Injected) -> Callable[[], Tensor]:
    """`served` by graphs that are there already.

    Raises:
        RuntimeError: a stage was not captured; operators would be compared with themselves.
    """
    run = served(model, graphs, windows, injected)
    for _ in range(PATIENCE + 1):
        run()
    if graphs.policy.counts["replay"] < len(model.stages):
        raise RuntimeError(f"parity: not all stages were captured: {dict(graphs.policy.counts)}")
    return run


@torch.inference_mode()
def time_served(scale: Scale, name: str, precision: str, device: torch.device) -> dict[str, Any]:
    """Batches as they are served, by operators and by graphs: wall and device milliseconds, and images per second.

    Raises:
        RuntimeError: graphs give other logits, or were not captured.
    """
    timer = Timer(device)
    windows = torch.randn(scale.batch, 3, scale.side, scale.side, device=device)
    runs: dict[str, Callable[[], Tensor]] = {}
    parity = {}
    for way, schedule in (("unmerged", ()), ("MPM", (2, 5))):
        network = build(scale, name, device, schedule)
        runs[way] = served(network, make_packed(network, precision), windows, scale.injected())
        graphs = make_graphs(network, precision)
        if graphs is None:
            continue
        runs[f"{way}, graphs"] = captured(network, graphs, windows, scale.injected())
        parity[way] = check_logits(runs[f"{way}, graphs"](), runs[way](), precision)
    times = in_turn({way: _lapped(run) for way, run in runs.items()}, timer, repeats=scale.repeats)
    walls = {way: _wall_ms(run, timer, scale.repeats) for way, run in runs.items()}
    rows = {
        way: {
            "wall_ms": round(walls[way], 4),
            "events_ms": round(times[way]["served"], 4),
            "busy_ms": _busy_ms(run, device),
            "images_per_second": round(1000 * scale.batch / walls[way], 1),
        }
        for way, run in runs.items()
    }
    return {"precision": precision, "batch": scale.batch, "ways": rows, "parity": parity}


def _lapped(run: Callable[[], Tensor]) -> Callable[[Laps], object]:
    def work(laps: Laps) -> None:
        run()
        laps.lap("served")

    return work


def _wall_ms(run: Callable[[], Tensor], timer: Timer, repeats: int) -> float:
    """Milliseconds of one batch on the clock, median."""
    samples = []
    for _ in range(repeats):
        timer.synchronize()
        start = perf_counter()
        run()
        timer.synchronize()
        samples.append(1000 * (perf_counter() - start))
    return statistics.median(samples)


def _busy_ms(run: Callable[[], Tensor], device: torch.device) -> float | None:
    """Milliseconds that the device's kernels and copies take, one batch; None on a CPU."""
    if device.type != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return round(sum(e.time_range.elapsed_us() for e in profile.events() if e.device_type == cuda) / 1000, 4)


def tome(model: Segmenter, precision: str, windows: Tensor, r: int) -> Way:
    """ToMe on the same weights and attention."""
    runtime, stages = make_packed(model, precision), ToMe(tower=model.tower, r=r).stages

    def run(laps: Laps, injected: Injected) -> Tensor:
        given: Tensor | WindowBatch = windows
        for stage in stages:
            launched = model.launch(stage, given, runtime)
            if not isinstance(launched, Decoded):
                given = launched()
        assert isinstance(launched, Decoded)
        laps.lap("network")
        return launched.logits

    return run


def compile_plain(model: Segmenter, precision: str, windows: Tensor, mode: str) -> tuple[Way, float]:
    """The network as torch compiles it whole for batches of this shape, and the seconds until it runs at its speed."""
    network, windows = DenseSegmenter(model).to(DTYPES[precision]), windows.to(DTYPES[precision])
    compiled = torch.compile(network, mode=mode, fullgraph=True, dynamic=False)

    def run(laps: Laps, injected: Injected) -> Tensor:
        logits = compiled(windows).to(torch.float32, copy=True)  # the next run may write over them
        laps.lap("network")
        return logits

    start = perf_counter()
    for _ in range(3):  # graphs are captured after the first
        compiled(windows)
    Timer(windows.device).synchronize()
    return run, perf_counter() - start


def _compiled(
    scale: Scale, name: str, precision: str, windows: Tensor, mode: str, plain: Way, timer: Timer
) -> tuple[Way, dict[str, Any]]:
    """The compiled network and what is to be told of it; or the plain one, and why it could not be compiled."""
    told: dict[str, Any] = {"mode": mode}
    try:
        way, seconds = compile_plain(build(scale, name, windows.device, ()), precision, windows, mode)
        told["compile_seconds"] = round(seconds, 1)
        told["parity"] = check_same(way, plain, scale, timer, precision)
    except Exception as error:  # whatever a compiler does, the others have figures
        return plain, told | {"error": f"{type(error).__name__}: {error}"[:2000]}
    return way, told


def _labelled(way: Way, injected: Injected, scale: Scale, *, plain: bool) -> Callable[[Laps], object]:
    """A way and then the labels of every window, on the host; plainly, by upsampling all classes."""
    plan = plan_windows(scale.side, scale.side, whole_windows(scale))
    grid = scale.side // scale.patch

    def run(laps: Laps) -> list[Any]:
        logits = way(laps, injected).transpose(1, 2).unflatten(2, (grid, grid))  # [B, K, Gh, Gw]
        if plain:
            size = (scale.side, scale.side)
            found: list[Any] = [
                F.interpolate(one[None], size, mode="bilinear", align_corners=False)[0].argmax(0).byte().cpu()
                for one in logits
            ]
        else:
            found = list(label_maps([one[None] for one in logits], plan, scale.patch))
        laps.lap("labels")
        return found

    return run


def _once(way: Way, injected: Injected) -> Callable[[Laps], object]:
    return lambda laps: way(laps, injected)


def wall_seconds(work: Callable[[Laps], object], timer: Timer, *, batches: int = BACK_TO_BACK) -> float:
    """Of one batch among some that follow each other, the host's part included."""
    for _ in range(2):
        work(Laps(timer))
    timer.synchronize()
    start = perf_counter()
    for _ in range(batches):
        work(Laps(timer))
    timer.synchronize()
    return (perf_counter() - start) / batches


def check_same(
    way: Way, reference: Way, scale: Scale, timer: Timer, precision: str, schedule: Sequence[int] = (2, 5)
) -> float:
    """Mean deviation of two ways' logits over their spread.

    Raises:
        RuntimeError: it is too large; figures would compare different work.
    """
    found, wanted = (run(Laps(timer), scale.injected(schedule)) for run in (way, reference))
    return check_logits(found, wanted, precision)


def check_logits(found: Tensor, wanted: Tensor, precision: str) -> float:
    """See `check_same`."""
    deviation = float((found - wanted).abs().mean() / wanted.std())
    if not deviation <= MOST_DIFFERENT[precision]:
        raise RuntimeError(f"parity: logits deviate by {deviation:.1e} of their spread; no figures are reported")
    return deviation


@torch.inference_mode()
def time_groups(scale: Scale, name: str, precision: str, device: torch.device) -> dict[str, Any]:
    """Small groups, whose operators take longer to launch than to run: operator by operator, and as graphs.

    Raises:
        RuntimeError: graphs give other logits.
    """
    timer = Timer(device)
    model, unmerged = build(scale, name, device), build(scale, name, device, ())
    rows = []
    for number in scale.groups:
        windows = torch.randn(number, 3, scale.side, scale.side, device=device)
        runs: dict[str, Callable[[], Tensor]] = {}
        parity = {}
        for way, network in (("unmerged", unmerged), ("MPM", model)):
            runs[way] = served(network, make_packed(network, precision), windows, scale.injected())
            if graphs := make_graphs(network, precision):
                runs[f"{way}, graphs"] = captured(network, graphs, windows, scale.injected())
                parity[way] = check_logits(runs[f"{way}, graphs"](), runs[way](), precision)
        times = in_turn({way: _lapped(run) for way, run in runs.items()}, timer, repeats=4 * scale.repeats, warm_ups=8)
        ms = {way: round(laps["served"], 4) for way, laps in times.items()}
        rows.append({"windows": number, "median_ms": ms, "parity": parity})
    return {"precision": precision, "groups": rows}


def network_ms(laps: Mapping[str, float]) -> float:
    """Milliseconds from windows to logits; imposing lengths stands in for nothing."""
    return sum(ms for lap, ms in laps.items() if lap not in ("total", "labels", "rest", "imposing lengths"))


def _summary(
    laps: dict[str, float],
    model: Segmenter,
    arithmetic: Arithmetic,
    lengths: Sequence[tuple[int, ...]] | None,
    peak: float,
) -> dict[str, Any]:
    network = network_ms(laps)
    row: dict[str, Any] = {
        "network_ms": round(network, 4),
        "with_labels_ms": round(network + laps["labels"], 4),
        "median_ms": laps,
    }
    if lengths:
        stages = model.mpm(model.schedule[: len(lengths) - 1]).stages
        special = model.encoder.num_special
        windows = ([length - special for length in of_window] for of_window in zip(*lengths, strict=True))
        tflops = sum(arithmetic.window(stages, window) for window in windows) / network / 1e9
        row |= {"mean_lengths": [round(sum(n) / len(n), 1) for n in lengths]}
        row |= {"tflops": float(f"{tflops:.4g}"), "of_gemm": round(tflops / peak, 3)}
    return row


@torch.inference_mode()
def gemm_tflops(scale: Scale, precision: str, device: torch.device) -> float:
    """What a large matrix product reaches on this device in this precision: the roof."""
    a, b = (torch.randn(scale.gemm, scale.gemm, device=device).to(DTYPES[precision]) for _ in range(2))
    times = in_turn({"gemm": lambda laps: torch.mm(a, b)}, Timer(device), repeats=5)
    return float(f"{2 * scale.gemm**3 / times['gemm']['total'] / 1e9:.4g}")
