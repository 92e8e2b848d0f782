"""Windows through the network, ours beside others on the same weights; merging alone; and labelling.

Every contestant sees every window once, in random order; no two windows are equal, and those that warm up are not
timed: no length repeats that traffic would not repeat. Ti has the checkpoint's weights. S and B have random ones; how
many tokens those would merge means nothing, so the demo model's lengths on street pictures are imposed after MPM's
merges (774 and 614, plus or minus 20), and ALGM, which merges by a threshold, is left out.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpm_ops import Segmenter, SegmenterConfig, load_segmenter, merge_tokens
from mpm_ops.attention import use_attention
from mpm_ops.cpus import usable_cores
from mpm_ops.labels import label_map
from mpm_ops.merge_cpu import merge_tokens_cpu
from mpm_ops.merging import Merger, Mpm, make_merger
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.eager import with_same_weights
from mpm_ops.stages import Decoded, WindowBatch
from mpm_ops.windows import WindowPlan, cut_windows, plan_windows

from . import environment, model_shapes, percentile_ms, read_images, time_in_turn, write_report
from .dense import DenseSegmenter
from .injected import Injected

DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo" / "checkpoint.pth"
SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}  # width and heads
MERGERS = ("mpm:2,5", "mpm:2,5,align=16", "tome", "algm")
MOST_DIFFERENT = 1e-3  # of logits between runtimes in fp32; they are standardised over the classes
LEAST_AGREEMENT = 0.999  # of labels where a near-tie may have merged another pair
WARM_UP = 3  # windows that are not timed
LEAST_WINDOWS = 50  # that are; with fewer, caches of lengths look better than they are
IMPOSED = {  # schedule and keep of MPM: image tokens after each merge, of the demo model on street pictures
    ((2, 5), 1.0): (774, 614),
    ((1, 2, 4, 6), 0.75): (839, 702, 591, 500),
}
LENGTHS = (256, 1024, 4096, 16384)
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "torch imported first": ("import torch", {}),
    "OMP_NUM_THREADS=1": ("", {"OMP_NUM_THREADS": "1"}),
}

Run = Callable[[Tensor], tuple[Tensor, float]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way through the network.

    Attributes:
        merger, runtime: what merges, and what computes.
        run: [1, 3, S, S] window -> [N, K] logits, and seconds of merging.
    """

    merger: str
    runtime: str
    run: Run


def contestants(
    model: Segmenter, precision: str, mergers: Sequence[str], *, imposed: bool = False, compiled: bool = False
) -> list[Contestant]:
    """The whole network as others run it, then ours without merging, then each merger on each runtime of ours.

    Torch's ways and ONNX Runtime run in fp32 only.

    Args:
        imposed: lengths of MPM are those of `imposed_lengths`.
        compiled: torch.compile (inductor) too; it needs a C++ compiler and takes a minute.
    """
    dense = DenseSegmenter(model).eval()
    found = []
    runtimes = ["openvino"]
    if precision == "fp32":
        runtimes = ["torch", "openvino"]
        found.append(Contestant("none", "torch, plain", whole(dense)))
        if compiled:
            found.append(Contestant("none", "torch.compile", whole(torch.compile(dense, dynamic=False))))
        found.append(Contestant("none", "onnxruntime, whole", _onnxruntime(model)))
    found.append(Contestant("none", "openvino, whole", _openvino_run(model, precision)))
    for merger, runtime in product(("none", *mergers), runtimes):
        injected = imposed_lengths(make_merger(merger, model.tower)) if imposed else None
        found.append(Contestant(merger, runtime, ours(model, merger, runtime, precision, injected)))
    return found


def imposed_lengths(merger: Merger) -> Injected | None:
    """The demo model's lengths, for random weights; None for a merger whose lengths do not depend on weights.

    Raises:
        ValueError: MPM's lengths for these parameters are not known.
    """
    if not isinstance(merger, Mpm):
        return None
    means = IMPOSED.get((merger.schedule, merger.keep))
    if means is None:
        known = ", ".join(f"{','.join(map(str, schedule))} with keep={keep:g}" for schedule, keep in IMPOSED)
        raise ValueError(f"mergers: expected with random weights mpm of {known}, got {merger}; or give trained ones")
    return Injected(means=means)


def whole(network: Callable[[Tensor], Tensor]) -> Run:
    """A network that doesn't merge, windows [1, 3, S, S] to logits [1, N, K]."""
    return lambda window: (network(window)[0], 0.0)


def _openvino(model: Segmenter, precision: str, **options: object) -> Any:
    """The whole network for one static shape, compiled."""
    import openvino as ov

    from mpm_ops.runtime.openvino import compile_graph, convert_graph

    shape = (1, 3, model.inference.window_size, model.inference.window_size)
    copied = with_same_weights(model)
    use_attention(copied, "plain")
    graph = convert_graph(DenseSegmenter(copied).eval(), [torch.zeros(*shape)], [ov.PartialShape(shape)])
    return compile_graph(graph, precision, usable_cores(), **options)


def _openvino_run(model: Segmenter, precision: str) -> Run:
    request = _openvino(model, precision).create_infer_request()

    def run(window: Tensor) -> tuple[Tensor, float]:
        request.infer([window.numpy()])
        return torch.from_numpy(request.get_output_tensor(0).data)[0], 0.0

    return run


def throughput_ms(model: Segmenter, precision: str, windows: Sequence[Tensor]) -> float:
    """Milliseconds a window of the whole network on OpenVINO, one stream a core, all windows asked for at once."""
    import openvino as ov

    threads = usable_cores()
    compiled = _openvino(model, precision, PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=threads)
    queue = ov.AsyncInferQueue(compiled, 2 * threads)
    for timed in (windows[:WARM_UP], windows[WARM_UP:]):
        start = perf_counter()
        for window in timed:
            queue.start_async([window.numpy()])
        queue.wait_all()
    return round(1000 * (perf_counter() - start) / len(timed), 3)


def ours(model: Segmenter, merger: str, runtime: str, precision: str, injected: Injected | None) -> Run:
    """The stages of a merger on a runtime; lengths are imposed after it merged, where that is wanted."""
    chosen = make_merger(merger, model.tower)
    computing = make_runtime(model, runtime, precision, mergers=[chosen])

    def run(window: Tensor) -> tuple[Tensor, float]:
        given: Tensor | WindowBatch = window
        merging = 0.0
        for stage in chosen.stages:
            done = computing.run(stage, given)
            if isinstance(done, Decoded):
                break
            start = perf_counter()
            given = chosen.launch(done)()
            merging += perf_counter() - start
            if injected:
                given = injected.apply(given, done, stage.index, getattr(chosen, "align", 1))
        assert isinstance(done, Decoded)
        return done.logits[0], merging

    return run


def _onnxruntime(model: Segmenter) -> Run:
    import onnxruntime

    side = model.inference.window_size
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants, as they should for windows of one size
        file = Path(folder) / "model.onnx"
        with torch.no_grad():
            torch.onnx.export(model, (torch.zeros(1, 3, side, side),), file, dynamo=False, input_names=["window"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = usable_cores()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda window: (torch.from_numpy(session.run(None, {"window": window.numpy()})[0])[0].flatten(1).T, 0.0)


def build(size: str, demo: Segmenter) -> Segmenter:
    """A network of the checkpoint's depth: its own weights where the width is its own, random ones elsewhere."""
    width, heads = SIZES[size]
    if width == demo.config.d_model:
        return demo
    config = dataclasses.asdict(demo.config) | {"d_model": width, "n_heads": heads}
    model = Segmenter(SegmenterConfig(**config), demo.inference).eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.ndim > 1:
            value.normal_(std=0.02 if value.shape[0] == 1 else value.shape[-1] ** -0.5, generator=generator)
    return model


def read_windows(path: Path, model: Segmenter, most: int) -> list[Tensor]:
    """Windows [1, 3, S, S] of which no two are equal, one of each picture in turn.

    Raises:
        ValueError: there are too few to time anything.
    """
    cut = []
    for image in read_images(path, most):
        plan = plan_windows(image.shape[0], image.shape[1], model.inference)
        cut.append(cut_windows(image, plan, model.inference).split(1))
    turns = (ways[i].contiguous() for i in range(max(map(len, cut))) for ways in cut if i < len(ways))
    windows = list({window.numpy().tobytes(): window for window in turns}.values())[:most]
    if len(windows) < LEAST_WINDOWS + WARM_UP:
        raise ValueError(
            f"images: expected at least {LEAST_WINDOWS + WARM_UP} different windows, got {len(windows)} in {path}; "
            "give a folder of more pictures, and --most as many"
        )
    return windows


@torch.inference_mode()
def bench_size(
    size: str,
    demo: Segmenter,
    windows: Sequence[Tensor],
    precision: str,
    mergers: Sequence[str],
    *,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Milliseconds a window of every contestant: median, 90th percentile, and the median of merging.

    In throughput mode windows overlap: that row has the mean time between answers instead.
    """
    model = build(size, demo)
    trained = model is demo
    chosen = [merger for merger in mergers if trained or not merger.startswith("algm")]
    running = contestants(model, precision, chosen, imposed=not trained, compiled=compiled)
    for window in windows[:WARM_UP]:
        check_parity(running, window, strict=precision == "fp32" and trained)
    seconds: list[list[tuple[float, float]]] = [[] for _ in running]
    order = random.Random(0)
    for window in windows[WARM_UP:]:
        for i in order.sample(range(len(running)), len(running)):
            start = perf_counter()
            _, merging = running[i].run(window)
            seconds[i].append((perf_counter() - start, merging))
    rows: list[dict[str, Any]] = [
        {
            "size": size,
            "precision": precision,
            "merger": contestant.merger,
            "runtime": contestant.runtime,
            "median_ms": percentile_ms([total for total, _ in taken]),
            "p90_ms": percentile_ms([total for total, _ in taken], 90),
            "merging_ms": percentile_ms([merging for _, merging in taken]),
        }
        for contestant, taken in zip(running, seconds, strict=True)
    ]
    overlapping = {"merger": "none", "runtime": "openvino, whole, a stream a core", "merging_ms": 0.0}
    mean = throughput_ms(model, precision, windows)
    return [*rows, {"size": size, "precision": precision, **overlapping, "median_ms": mean, "p90_ms": None}]


def check_parity(running: Sequence[Contestant], window: Tensor, *, strict: bool) -> None:
    """Contestants with one merger must give the same logits, or where they merge, labels. All run once in any case.

    Args:
        strict: compare; elsewhere rounding or imposed lengths make them differ.

    Raises:
        RuntimeError: they don't; figures would compare different work.
    """
    found = [(contestant, contestant.run(window)[0].clone()) for contestant in running]
    firsts: dict[str, tuple[Contestant, Tensor]] = {}
    for contestant, logits in found if strict else ():
        first, expected = firsts.setdefault(contestant.merger, (contestant, logits))
        difference = float((logits - expected).abs().max())
        agreement = float((logits.argmax(1) == expected.argmax(1)).float().mean())
        tied = contestant.merger != "none" and agreement >= LEAST_AGREEMENT
        if difference > MOST_DIFFERENT and not tied:
            raise RuntimeError(
                f"parity: {contestant.merger} on {contestant.runtime} differs from {first.runtime} by "
                f"{difference:.1e} in logits and in {1 - agreement:.2%} of labels; no figures are reported"
            )


@torch.inference_mode()
def plain_way(logits: Tensor, plan: WindowPlan, patch_size: int) -> Tensor:
    """[K, H, W] logits of the picture, as Segmenter computes them."""
    size = plan.window_size
    side = logits.shape[2] * patch_size
    pixels = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)[:, :, :size, :size]
    if plan.num_windows == 1 and plan.original_size == (size, size):
        return pixels[0]
    total = torch.zeros(logits.shape[1], *plan.frame_size)
    count = torch.zeros(plan.frame_size)
    for window, (top, left) in zip(pixels, product(plan.tops, plan.lefts), strict=True):
        total[:, top : top + size, left : left + size] += window
        count[top : top + size, left : left + size] += 1
    return F.interpolate((total / count)[None], plan.original_size, mode="bilinear", align_corners=False)[0]


def bench_labels(demo: Segmenter, windows: Sequence[Tensor], num_classes: int) -> dict[str, float]:
    """Milliseconds to label a window, ours and by upsampling all classes: the checkpoint's beside weak noise."""
    side = demo.inference.window_size
    plan = plan_windows(side, side, demo.inference)
    noise = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for window in windows:
        trained = demo.window_logits(window)
        shape = (1, max(0, num_classes - trained.shape[1]), *trained.shape[2:])
        weak = torch.randn(shape, generator=noise) - 3  # the checkpoint's best class lies near 5
        logits = torch.cat([trained, weak], dim=1)[:, :num_classes].contiguous()
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: label_map(logits, plan, demo.config.patch_size),  # noqa: B023
            "plain": lambda: plain_way(logits, plan, demo.config.patch_size).argmax(dim=0),  # noqa: B023
        }
        for name, taken in time_in_turn(ways, repeats=1).items():
            seconds[name] += taken
    return {name: percentile_ms(taken[1:]) for name, taken in seconds.items()}


def bench_merging(width: int, repeats: int = 9) -> dict[int, dict[str, float]]:
    """Milliseconds of one merge by number of tokens: the specification, to 4096, and what the CPU runs.

    Raises:
        RuntimeError: the two choose other pairs for more than near-ties explain.
    """
    found = {}
    for number in LENGTHS:
        generator = torch.Generator().manual_seed(number)  # around a common direction, as a ViT's tokens are
        x = torch.randn(width, generator=generator) + 0.3 * torch.randn(number, width, generator=generator)
        ways: dict[str, Callable[[], Any]] = {"cpu": lambda x=x: merge_tokens_cpu(x)}  # type: ignore[misc]
        if number <= 4096:
            ways["specification"] = lambda x=x: merge_tokens(x)  # type: ignore[misc]
            differ = float((ways["cpu"]()[1] != ways["specification"]()[1]).float().mean())
            if differ > 0.01:
                raise RuntimeError(f"parity: {differ:.2%} of {number} tokens merge elsewhere; no figures are reported")
        found[number] = {name: percentile_ms(taken) for name, taken in time_in_turn(ways, repeats=repeats).items()}
    return found


def add_command(commands: Any) -> None:
    """Add `model` to the commands of `python -m mpm_ops.bench`."""
    command = commands.add_parser("model", help="windows through the network: ours beside everybody else's")
    command.add_argument("--checkpoint", type=Path, default=DEMO, help="a Ti whose weights and classes are used")
    command.add_argument("--images", type=Path, required=True, help="a folder of different pictures")
    command.add_argument("--most", type=int, default=63, help="different windows, each of them timed once")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes a minute")
    command.add_argument("--settings", action="store_true", help="again with torch imported first, and on one thread")
    command.add_argument("--mergers", nargs="+", default=list(MERGERS), help="as in load_segmenter(merger=...)")
    command.add_argument("--sizes", nargs="+", choices=SIZES, default=["Ti"])
    command.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    command.add_argument("--classes", type=int, default=150, help="for the labels")
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    demo = load_segmenter(arguments.checkpoint)
    windows = read_windows(arguments.images, demo, arguments.most)
    results: list[dict[str, Any]] = []
    for size, precision in product(arguments.sizes, arguments.precisions):
        rows = bench_size(size, demo, windows, precision, arguments.mergers, compiled=not arguments.no_compile)
        results += rows
        print_table(rows)
    labels = bench_labels(demo, windows[:12], arguments.classes)
    print(f"labels of a window, {arguments.classes} classes: ours {labels['ours']} ms, plainly {labels['plain']} ms")
    merging = bench_merging(demo.config.d_model)
    for number, ms in merging.items():
        print(f"one merge of {number} tokens: {', '.join(f'{name} {value} ms' for name, value in ms.items())}")
    if arguments.settings:
        for setting in SETTINGS:
            results += in_setting(setting, arguments)
    fields = {"windows": len(windows) - WARM_UP, "results": results, "labels_ms": labels, "merging_ms": merging}
    write_report(arguments.out, fields, shapes=model_shapes(demo) | {"sizes": SIZES, "classes": arguments.classes})
    return 0


def in_setting(setting: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of our ways in a process that was started otherwise.

    Raises:
        RuntimeError: it failed; the message is what it said.
    """
    first, variables = SETTINGS[setting]
    program = f"{first}\nfrom mpm_ops.bench.__main__ import main; raise SystemExit(main())"
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-c", program, "model", "--no-compile", "--out", str(out)]
        for name in ("checkpoint", "images", "most", "mergers", "sizes", "precisions", "classes"):
            value = getattr(arguments, name)
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{setting}: {done.stderr.strip()}")
        rows = json.loads(out.read_text())["results"]
    print(f"{setting}:")
    print_table(rows)
    return [row | {"setting": setting} for row in rows]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds, and how many times faster than the best that does not merge."""
    unmerged = min(row["median_ms"] for row in rows if row["merger"] == "none")
    facts = environment()
    print(f"{rows[0]['size']}, {rows[0]['precision']}, {facts['processor']}, {facts['threads']} threads")
    for row in rows:
        tail = "       -" if row["p90_ms"] is None else f"{row['p90_ms']:8.1f}"
        print(
            f"  {row['merger']:<18} {row['runtime']:<32} median {row['median_ms']:8.1f} ms, p90 {tail}, "
            f"of it merging {row['merging_ms']:6.1f}   {unmerged / row['median_ms']:5.2f}x the best unmerged"
        )
    shares = [row["merging_ms"] / row["median_ms"] for row in rows if row["merger"].startswith("mpm")]
    if shares:
        print(f"  MPM's merging is {statistics.median(shares):.0%} of its time")
