"""What merging costs and earns on the GPU at hand, as JSON, in one command.

    python -m mpm_ops.bench gpu [--out result.json] [--seconds 420] [--full]

First the kernels must agree with their specification on this GPU; no figure is reported otherwise. Networks have
random weights, which give tokens no meaning and merging no typical length: so the lengths after each merge are set,
to the paper's means for 512 x 512 and a spread as measured on natural pictures, and the pairs found are only timed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mpm_ops.kernels import has_triton
from mpm_ops.merge import full_precision, merge_tokens
from mpm_ops.merge_gpu import merge_windows_gpu
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime
from mpm_ops.segmenter import Segmenter, SegmenterConfig
from mpm_ops.stages import WindowBatch
from mpm_ops.windows import InferenceConfig

from . import environment

Timed = Callable[[], object]

BATCH = 32
PAPER_MERGE_MS = {1024: 0.99, 4096: 4.5}  # H100, B = 32; fp32 and bf16
PAPER_BF16_IMAGES_PER_SECOND = {"Ti": 1260, "S": 1100, "B": 781, "L": 456}
NETWORKS = {"Ti": (192, 3, 12), "S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24)}  # D, nH, blocks
LENGTHS = (765, 604)  # image tokens after the first and the second merge
SPREAD = 16


def bench_gpu(*, full: bool = False, seconds: float = 420) -> dict[str, Any]:
    """Check parity, then time merging alone and whole networks; sections that do not fit the time are named.

    Args:
        full: also 16,384 tokens, and every network in fp32.
        seconds: start nothing new after these.

    Raises:
        RuntimeError: there is no CUDA device, triton is missing, or the kernels disagree with their specification.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("gpu: no CUDA device is visible to torch; run this on a machine with one")
    if not has_triton():
        raise RuntimeError("gpu: triton is not installed; install the project's extra `kernels`")
    stop = perf_counter() + seconds
    report: dict[str, Any] = {"device": device_facts(), "batch": BATCH, "parity": check_parity(), "left_out": []}
    merges = [(n, d) for n in (1024, 4096) for d in (384, 192, 768, 1024)] + [(16384, 384)] * full
    sections: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        ("merge", f"N={n} D={d}", partial(time_merge, n, d)) for n, d in merges
    ]
    precisions = {"L": ("bf16",), "B": ("bf16",), "S": ("bf16", "fp32"), "Ti": ("bf16", "fp32")}
    for name in NETWORKS:
        for precision in ("bf16", "fp32") if full else precisions[name]:
            sections.append(("network", f"{name} {precision}", partial(time_network, name, precision)))
    for kind, name, measure in sections:
        if perf_counter() > stop:
            report["left_out"].append(f"{kind} {name}")
            continue
        report.setdefault(kind, []).append(measure())
        torch.cuda.empty_cache()
    return report


def add_command(commands: Any) -> None:
    """Add `gpu` to the benchmark's commands."""
    gpu = commands.add_parser("gpu", help="merging and whole networks on the GPU at hand, after a check of parity")
    gpu.add_argument("--full", action="store_true", help="also 16,384 tokens, and every network in fp32")
    gpu.add_argument("--seconds", type=float, default=420, help="start nothing new after these")
    gpu.add_argument("--out", type=Path, help="write the figures as JSON")
    gpu.set_defaults(run=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    """Run the command."""
    try:
        report = bench_gpu(full=arguments.full, seconds=arguments.seconds)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps({"environment": environment(), **report}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


def device_facts() -> dict[str, Any]:
    """The GPU and the software that figures depend on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def check_parity(device: str = "cuda") -> dict[str, float]:
    """Share of tokens whose partner is the specification's, of those with no second best within 1e-6.

    Raises:
        RuntimeError: some are not.
    """
    shares = {}
    for num_tokens, width, dtype in (
        (1000, 384, torch.float32),
        (1024, 192, torch.bfloat16),
        (63, 768, torch.float16),
    ):
        x = random_tokens(2, num_tokens, width, dtype, device)
        merged, merge_map = merge_windows_gpu(PackedTokens.from_batch(x), num_special=0)
        same, total = 0, 0
        for image, found in zip(x, merge_map.view(2, num_tokens), strict=True):
            decided = _decided(image)
            wanted = _partners(merge_tokens(image)[1])
            same += int((_partners(found) == wanted)[decided].sum())
            total += int(decided.sum())
        name = f"N={num_tokens} D={width} {dtype}".replace("torch.", "")
        shares[name] = same / total
        if same < total:
            raise RuntimeError(
                f"parity: {total - same} of {total} tokens merge otherwise at {name}; no figures reported"
            )
        if not merged.values.isfinite().all():
            raise RuntimeError(f"parity: merged tokens are not finite at {name}; no figures reported")
    return shares


@torch.inference_mode()
def time_merge(num_tokens: int, width: int) -> dict[str, Any]:
    """Milliseconds of one merge of a batch, and of plain torch's product and argmax alone."""
    from mpm_ops.kernels.merging import merge_packed
    from mpm_ops.kernels.nearest import nearest

    x = random_tokens(BATCH, num_tokens, width, torch.bfloat16)
    tokens = PackedTokens.from_batch(x)
    arguments = (tokens.values, tokens.cu_seqlens, num_tokens, 0)
    rivals: dict[str, Timed] = {
        "merge": lambda: merge_packed(*arguments, 1),
        "merge_align_16": lambda: merge_packed(*arguments, 16),
        "nearest": lambda: nearest(*arguments),
    }
    if num_tokens <= 4096:
        rivals["nearest_ieee"] = lambda: nearest(*arguments, "ieee")
        rivals["torch_fp32"] = lambda: plain_nearest(x)
    times = interleaved(rivals)
    flops = 3 * BATCH * num_tokens**2 * width  # three products of 2 N^2 D, of half the matrix
    result: dict[str, Any] = {"num_tokens": num_tokens, "width": width, "median_ms": times}
    result["nearest_tflops"] = round(flops / times["nearest"] / 1e9, 1)
    if num_tokens in PAPER_MERGE_MS:
        result["paper_ms"] = PAPER_MERGE_MS[num_tokens]
    return result


@torch.inference_mode()
def time_network(name: str, precision: str) -> dict[str, Any]:
    """Images a second of one network without and with merging, in every way that windows can be grouped."""
    width, heads, layers = NETWORKS[name]
    config = SegmenterConfig(
        image_size=(512, 512), patch_size=16, d_model=width, n_heads=heads, n_layers=layers, n_cls=150
    )
    inference = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
    windows = torch.randn(BATCH, 3, 512, 512, device="cuda")
    model = Segmenter(config, inference, schedule=(2, 5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = model.cuda()
    ways: dict[str, Timed] = {}
    for way, padded, align in (("packed", False, 1), ("padded", True, 1), ("aligned_16", False, 16)):
        runtime = make_runtime(model, "torch", precision, padded=padded)
        ways[way] = partial(run, model, runtime, windows, align)
    runtime = make_runtime(model, "torch", precision)
    ways["unmerged"] = partial(run, model, runtime, windows, None)
    times = interleaved(ways, repeats=15)
    result: dict[str, Any] = {
        "network": name,
        "precision": precision,
        "median_ms": times,
        "images_per_second": {way: round(1000 * BATCH / ms, 1) for way, ms in times.items()},
        "speedup": {way: round(times["unmerged"] / ms, 3) for way, ms in times.items()},
    }
    if precision == "bf16":
        result["paper_images_per_second"] = PAPER_BF16_IMAGES_PER_SECOND[name]
    return result


def run(model: Segmenter, runtime: Any, windows: Tensor, align: int | None) -> Tensor:
    """Logits of windows; merges are computed, and then the set lengths imposed. None for align: no merging."""
    batch = model.embed(windows)
    generator = torch.Generator().manual_seed(0)
    for stage in model.stages:
        batch = runtime.run_blocks(stage, batch)
        if stage.merges and align is not None:
            batch.merged(num_special=1, align=align)
            spread = SPREAD * torch.randn(len(batch.tokens.lengths), generator=generator)
            wanted = (LENGTHS[stage.index] + spread).int().tolist()
            batch = shortened(batch, [1 + -(-length // align) * align for length in wanted])
    return runtime.decode(batch)


def shortened(batch: WindowBatch, lengths: Sequence[int]) -> WindowBatch:
    """The first rows of every window, and maps that spread its patches over them."""
    num_patches = len(batch.merge_maps[0]) if batch.merge_maps else batch.tokens.lengths[0] - 1
    patches = torch.arange(num_patches, device=batch.tokens.values.device)
    tokens = PackedTokens.pack([s[:n] for s, n in zip(batch.tokens.split(), lengths, strict=True)])
    return WindowBatch(tokens, tuple(patches % (length - 1) for length in lengths))


def plain_nearest(x: Tensor) -> Tensor:
    """What plain torch does: normalise, multiply in float32, mask, argmax; image by image to bound the memory."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    with full_precision(x.device.type):
        return torch.stack([(u @ u.T).fill_diagonal_(-torch.inf).argmax(dim=1) for u in unit])


def interleaved(rivals: dict[str, Timed], repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of each, measured in turn, after two calls to warm up."""
    for rival in rivals.values():
        rival()
        rival()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, rival in rivals.items():
            with _events(times[name]):
                rival()
    return {name: round(statistics.median(each), 4) for name, each in times.items()}


@contextmanager
def _events(times: list[float]) -> Iterator[None]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    yield
    stop.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(stop))


def random_tokens(num_images: int, num_tokens: int, width: int, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    """[B, N, D] tokens around a common direction, like those of a ViT."""
    generator = torch.Generator(device).manual_seed(0)
    common = torch.randn(width, device=device, generator=generator)
    noise = torch.randn(num_images, num_tokens, width, device=device, generator=generator)
    return (common + 0.3 * noise).to(dtype)


def _decided(x: Tensor) -> Tensor:
    """Tokens whose own best partner, and whose partner's, leads the second by more than float32 rounding."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    two = (unit @ unit.T).fill_diagonal_(-2).topk(2)
    clear = two.values[:, 0] - two.values[:, 1] > 1e-6
    return clear & clear[two.indices[:, 0]]


def _partners(merge_map: Tensor) -> Tensor:
    """The other token of each token's pair, or itself."""
    same = (merge_map[:, None] == merge_map).fill_diagonal_(False)
    return torch.where(same.any(dim=1), same.int().argmax(dim=1), torch.arange(len(merge_map), device=same.device))
