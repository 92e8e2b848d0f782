"""What merging costs and earns on the GPU at hand, as JSON, in one command.

    python -m mpm_ops.bench gpu [--out result.json] [--seconds 420] [--full]

First the kernels must agree with their specification on this GPU; no figure of what they merge is reported otherwise.
Each section is written down when it is over, and one that fails leaves its error. `--device cpu --tiny` runs the same
code anywhere, at sizes that say nothing. The engine, pictures and all, has a command of its own: `handlers.bench.gpu`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpm_ops.kernels import has_triton
from mpm_ops.merge import full_precision, merge_tokens
from mpm_ops.merge_gpu import merge_windows_gpu
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import format_schedule, parse_schedule

from .gpu_labels import time_labels
from .gpu_networks import PAPER, TINY, Scale, time_groups, time_network, time_served
from .timing import Report, Timer, Work, in_turn

Section = tuple[str, str, Callable[[], dict[str, Any]]]  # kind, name and what measures it

KINDS = ("parity", "merge", "network", "served", "labels", "groups", "engine", "engines")
_MERGING = {"parity", "merge", "network", "groups"}

PAPER_MERGE_MS = {1024: 0.99, 4096: 4.5}  # H100, B = 32; fp32 and bf16
SHAPES = ((1000, 384, torch.float32), (1024, 192, torch.bfloat16), (63, 768, torch.float16))  # N, D
COMPILED = "B"  # the network that is compiled, too: a minute or so
COMPILE_MODES = {False: "reduce-overhead", True: "max-autotune-no-cudagraphs"}  # by --full: minutes for each network
MOST_DIFFERENT_PAIRS = 1e-3
TINY_SHAPES = ((130, 64, torch.float32), (63, 32, torch.float16))


def bench_gpu(
    device: torch.device, scale: Scale, *, full: bool = False, compiled: bool = True, seconds: float = 420,
    out: Path | None = None, more: Sequence[Section] = (), only: Sequence[str] = KINDS,
    schedules: Sequence[tuple[int, ...]] = ((2, 5),),
) -> Report:  # fmt: skip
    """Check parity, then time merging alone, whole networks, small groups and labels, what matters most first.

    Args:
        full: also 16,384 tokens, every network in fp32, fp16, and compiled.
        compiled: compile one network, as a rival; see COMPILE_MODES.
        seconds: start nothing new after these.
        out: written after every section.
        more: further sections, after the first networks.
        only: kinds of sections, of KINDS; parity is checked before what depends on it all the same.
        schedules: of the networks; lengths are imposed for each, see `Scale.injected`.

    Raises:
        RuntimeError: the device is missing, or triton.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("gpu: no CUDA device is visible to torch; run this on a machine with one")
    if not has_triton():
        raise RuntimeError("gpu: triton is not installed; install the project's extra `kernels`")
    report = Report({"device": device_facts(device), "scale": repr(scale)}, out, seconds)
    tiny = scale.side != PAPER.side
    parity = partial(check_parity, device, TINY_SHAPES if tiny else SHAPES)
    if not _MERGING & set(only) or report.section("parity", "merge", parity):
        sections = _sections(device, scale, full=full, compiled=compiled, more=more, schedules=schedules)
        for section in sections:
            if section[0] in only:
                report.section(*section)
    return report


def _sections(
    device: torch.device, scale: Scale, *, full: bool, compiled: bool, more: Sequence[Section],
    schedules: Sequence[tuple[int, ...]] = ((2, 5),),
) -> list[Section]:  # fmt: skip
    def merge(num_tokens: int, width: int) -> Section:
        return "merge", f"N={num_tokens} D={width}", partial(time_merge, scale, num_tokens, width, device)

    def network(name: str, precision: str, schedule: tuple[int, ...] = schedules[0]) -> Section:
        mode = COMPILE_MODES[full] if compiled and precision == "bf16" and (full or name == rival) else None
        measure = partial(time_network, scale, name, precision, device, compile_mode=mode, schedule=schedule)
        told = "" if schedule == (2, 5) else f" at {format_schedule(schedule)}"
        return "network", f"{name} {precision}{told}", measure

    def groups(name: str, precision: str) -> Section:
        return "groups", f"{name} {precision}", partial(time_groups, scale, name, precision, device)

    def served(name: str) -> Section:
        return "served", f"{name} bf16", partial(time_served, scale, name, "bf16", device)

    first, *others = scale.networks
    rival = COMPILED if COMPILED in scale.networks else first
    widths = [width for width, *_ in scale.networks.values()]
    sections: list[Section] = [
        merge(scale.patches, widths[0]),
        network(first, "bf16"),
        ("labels", "", partial(time_labels, scale, device)),
    ]
    sections += [served(name) for name in scale.networks]
    sections += [network(name, "bf16") for name in others] + [groups(first, "bf16"), *more]
    sections += [network(name, "bf16", schedule) for schedule in schedules[1:] for name in scale.networks]
    sections += [merge(4 * scale.patches, widths[0])] + [merge(scale.patches, width) for width in widths[1:]]
    sections += [network(name, "fp32") for name in scale.networks if full or name not in ("B", "L")]
    sections += [network(first, "fp16")] + [groups(name, "bf16") for name in others[:1]]
    if full:
        sections += [merge(4 * scale.patches, width) for width in widths[1:]] + [merge(16 * scale.patches, widths[0])]
        sections += [network(name, "fp16") for name in others]
    return sections


def add_command(commands: Any) -> None:
    """Add `gpu` to the benchmark's commands."""
    gpu = commands.add_parser("gpu", help="merging and whole networks on the GPU at hand, after a check of parity")
    add_arguments(gpu)
    gpu.set_defaults(run=run_command)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full", action="store_true", help="also 16,384 tokens, every network in fp32 and fp16, compiled"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes of a network")
    parser.add_argument(
        "--only", type=_kinds, default=KINDS, metavar="KINDS", help=f"sections to run, of {','.join(KINDS)} (all)"
    )
    parser.add_argument(
        "--sizes", type=lambda text: tuple(text.split(",")), metavar="NAMES",
        help="networks to time, such as Ti,S (all; the engines' section: Ti)",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", type=parse_schedule, nargs="+", default=[(2, 5)], metavar="BLOCKS",
        help="schedules of the networks, such as 2,5 1,2,4,6; the first one in every section (2,5)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after these (420)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code (cuda)")
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine runs and that say nothing")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, section by section")


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    return kinds


def run_command(arguments: argparse.Namespace, more: Sequence[Section] = ()) -> int:
    """Run the command."""
    device = torch.device(arguments.device)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    scale = TINY if arguments.tiny else PAPER
    try:
        if arguments.sizes:
            if unknown := set(arguments.sizes) - set(scale.networks):
                raise RuntimeError(f"sizes: expected some of {', '.join(scale.networks)}, got {', '.join(unknown)}")
            scale = replace(scale, networks={name: scale.networks[name] for name in arguments.sizes})
        report = bench_gpu(
            device,
            scale,
            full=arguments.full,
            compiled=not arguments.no_compile,
            seconds=arguments.seconds,
            out=arguments.out,
            more=more,
            only=arguments.only,
            schedules=arguments.schedule,
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for row in report.content["sections"]:
        print(summary(row))
    failed = [row for row in report.content["sections"] if "error" in row]
    print(f"{len(report.content['sections'])} sections, {len(failed)} failed, left out: {report.content['left_out']}")
    return 1 if failed else 0


def summary(row: dict[str, Any]) -> str:
    """One section for people."""
    title = f"{row['kind']} {row['name']} ({row['seconds']} s)"
    if "error" in row:
        return f"{title}: {row['error']}"
    if "engines" in row:
        return "\n".join([title, *(row["lines"])])
    if row.get("kind") == "served":
        return "\n".join([title, *(_served_line(way, found) for way, found in row["ways"].items())])
    if "ways" in row:
        return "\n".join([title, *(_line(way, found) for way, found in row["ways"].items())])
    if "groups" in row:
        return "\n".join(
            [title, *(f"    {group['windows']} windows: {group['median_ms']}" for group in row["groups"])]
        )
    return (
        f"{title}: {row.get('median_ms', {key: value for key, value in row.items() if key not in ('kind', 'name')})}"
    )


def _served_line(way: str, found: dict[str, Any]) -> str:
    return (
        f"    {way:<16} {found['wall_ms']:9.3f} ms wall  {found['busy_ms'] or float('nan'):9.3f} ms busy  "
        f"{found['images_per_second']:8.1f} images/s"
    )


def _line(way: str, found: dict[str, Any]) -> str:
    """One way of a network."""
    told = f"  {found['mode']}" if "mode" in found else ""
    if "error" in found:
        return f"    {way:<16}{told}: {found['error'].splitlines()[0]}"
    if "compile_seconds" in found:
        told += f", compiled in {found['compile_seconds']} s"
    return (
        f"    {way:<16} {found['network_ms']:9.3f} ms busy  {found['images_per_second']:8.1f} images/s "
        f"({found['images_per_second_with_labels']:8.1f} with labels)  {found['speedup']:5.2f}x plain  "
        f"{found.get('of_gemm', float('nan')):5.2f} of a GEMM  "
        f"{found.get('of_paper', float('nan')):5.2f} of the paper's{told}"
    )


def device_facts(device: torch.device) -> dict[str, Any]:
    """The GPU and the software that figures depend on."""
    import triton

    if device.type != "cuda":
        return {"name": str(device), "torch": torch.__version__, "triton": triton.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def check_parity(device: torch.device, shapes: Sequence[tuple[int, int, torch.dtype]] = SHAPES) -> dict[str, Any]:
    """Share of tokens whose partner is the specification's, of those with no second best within 1e-6.

    Raises:
        RuntimeError: of one shape, MOST_DIFFERENT_PAIRS of them or more are not.
    """
    shares: dict[str, Any] = {}
    for num_tokens, width, dtype in shapes:
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
        if total - same >= MOST_DIFFERENT_PAIRS * total:
            raise RuntimeError(
                f"parity: {total - same} of {total} tokens ({1 - same / total:.2%}) merge otherwise at {name}; "
                f"expected less than {MOST_DIFFERENT_PAIRS:.1%}; no figures reported"
            )
        if not merged.values.isfinite().all():
            raise RuntimeError(f"parity: merged tokens are not finite at {name}; no figures reported")
    return shares


@torch.inference_mode()
def time_merge(scale: Scale, num_tokens: int, width: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one merge of a batch, and of plain torch's product and argmax alone."""
    from mpm_ops.kernels.merging import merge_packed
    from mpm_ops.kernels.nearest import nearest

    x = random_tokens(scale.batch, num_tokens, width, torch.bfloat16, device)
    tokens = PackedTokens.from_batch(x)
    arguments = (tokens.values, tokens.cu_seqlens, num_tokens, 0)
    works: dict[str, Work] = {
        "merge": lambda laps: merge_packed(*arguments, 1),
        "merge and lengths": lambda laps: merge_windows_gpu(tokens, num_special=0),  # waits for the device
        "merge, aligned": lambda laps: merge_packed(*arguments, scale.align),
        "nearest": lambda laps: nearest(*arguments),
    }
    if num_tokens <= 4096:
        works["torch, fp32"] = lambda laps: plain_nearest(x)
    laps = in_turn(works, Timer(device), repeats=scale.repeats)
    times = {name: found["total"] for name, found in laps.items()}
    flops = 3 * scale.batch * num_tokens**2 * width  # three products of 2 N^2 D, of half the matrix
    result: dict[str, Any] = {"num_tokens": num_tokens, "width": width, "batch": scale.batch, "median_ms": times}
    result["nearest_tflops"] = float(f"{flops / times['nearest'] / 1e9:.4g}")
    if num_tokens in PAPER_MERGE_MS and scale.side == PAPER.side:
        result["paper_ms"] = PAPER_MERGE_MS[num_tokens]
    return result


def plain_nearest(x: Tensor) -> Tensor:
    """What plain torch does: normalise, multiply in float32, mask, argmax; image by image to bound the memory."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    with full_precision(x.device.type):
        return torch.stack([(u @ u.T).fill_diagonal_(-torch.inf).argmax(dim=1) for u in unit])


def random_tokens(num_images: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
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
