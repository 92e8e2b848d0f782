"""Merging alone on the CPU: the specification, half of the similarity in tiles, and the compiled way.

Tokens are random around a common direction, as a ViT's are, so that cosines crowd near 1. The network's own share
of time is in `bench model`.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpm_ops.merge import merge_tokens
from mpm_ops.merge_cpu import merge_tokens_cpu

from . import percentile_ms, time_in_turn, write_report

Merge = Callable[[Tensor], tuple[Tensor, Tensor]]
MOST_DIFFERENT = 0.01  # of tokens; near-ties that rounding decides
_TILE = 256


def merge_tiled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper-triangle tiles in torch alone: what is to be had without compiled loops. Distinct finite float32 rows."""
    unit = torch.nn.functional.normalize(x, dim=1)
    best, nearest = x.new_full((len(x),), -torch.inf), torch.arange(len(x))
    for top in range(0, len(x), _TILE):
        for left in range(top, len(x), _TILE):
            rows, columns = slice(top, top + _TILE), slice(left, left + _TILE)
            tile = unit[rows] @ unit[columns].T
            if top == left:
                tile.fill_diagonal_(-torch.inf)
            for mine, dim, offset in ((rows, 1, left), (columns, 0, top)):
                value, at = tile.max(dim=dim)
                closer = value > best[mine]
                best[mine] = torch.where(closer, value, best[mine])
                nearest[mine] = torch.where(closer, at + offset, nearest[mine])
    index = torch.arange(len(x))
    first = index[(nearest[nearest] == index) & (index < nearest)]
    partner, representative = index.clone(), index.clone()
    partner[first] = nearest[first]
    representative[nearest[first]] = first
    kept = representative == index
    return 0.5 * x[kept] + 0.5 * x[partner[kept]], (kept.cumsum(0) - 1)[representative]


WAYS: dict[str, Merge] = {"specification": merge_tokens, "tiled": merge_tiled, "cpu": merge_tokens_cpu}


def random_tokens(num_tokens: int, width: int) -> Tensor:
    """[N, D] float32 tokens around a common direction."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(width, generator=generator) + 0.3 * torch.randn(num_tokens, width, generator=generator)


def check_parity(x: Tensor) -> float:
    """Largest share of tokens whose place differs from the specification's.

    Raises:
        RuntimeError: it is more than near-ties explain.
    """
    expected, expected_map = merge_tokens(x)
    worst = 0.0
    for name, merge in WAYS.items():
        merged, merge_map = merge(x)
        same = merged[merge_map].isclose(expected[expected_map], atol=1e-5).all(dim=1)
        worst = max(worst, 1 - float(same.float().mean()))
        if worst > MOST_DIFFERENT:
            raise RuntimeError(
                f"parity: {name} places {worst:.1%} of {len(x)} tokens otherwise; no figures are reported"
            )
    return worst


def time_ways(x: Tensor, seconds: float) -> dict[str, float]:
    """Median milliseconds of each way, run in turn for about so many seconds."""
    samples = time_in_turn({name: partial(merge, x) for name, merge in WAYS.items()}, repeats=3, seconds=seconds)
    return {name: percentile_ms(times) for name, times in samples.items()}


def peak_memory(way: str, num_tokens: int, width: int) -> float:
    """MiB by which one merge raises the peak of a fresh process that has merged 64 tokens before."""
    program = f"from mpm_ops.bench.merge import print_peak\nprint_peak({way!r}, {num_tokens}, {width})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(way: str, num_tokens: int, width: int) -> None:
    """What the fresh process of `peak_memory` runs."""
    x = random_tokens(num_tokens, width)
    WAYS[way](random_tokens(64, width))
    before = _peak_mib()
    WAYS[way](x)
    print(_peak_mib() - before)


def _peak_mib() -> float:
    # getrusage would report the parent's peak where the process was forked from a larger one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def bench_merge(lengths: list[int], widths: list[int], seconds: float, memory: bool) -> list[dict[str, Any]]:
    """Time, ratio to the specification and peak memory of every way."""
    results = []
    for width in widths:
        for num_tokens in lengths:
            x = random_tokens(num_tokens, width)
            different = check_parity(x)
            median_ms = time_ways(x, seconds)
            result: dict[str, Any] = {
                "tokens": num_tokens,
                "width": width,
                "placed_otherwise": round(different, 5),
                "median_ms": median_ms,
                "speedup": {name: round(median_ms["specification"] / ms, 2) for name, ms in median_ms.items()},
            }
            if memory:
                result["peak_mib"] = {name: round(peak_memory(name, num_tokens, width), 1) for name in WAYS}
            results.append(result)
    return results


def add_command(commands: Any) -> None:
    """Add `merge` to the benchmark's commands."""
    merge = commands.add_parser("merge", help="merging alone, by length and width, against the specification")
    merge.add_argument("--lengths", nargs="+", type=int, default=[256, 765, 1024, 2048, 4096, 8192, 16384])
    merge.add_argument("--widths", nargs="+", type=int, default=[192, 384, 768])
    merge.add_argument("--seconds", type=float, default=1.0, help="for each length and width")
    merge.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    merge.add_argument("--out", type=Path, help="write the figures as JSON")
    merge.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    results = bench_merge(arguments.lengths, arguments.widths, arguments.seconds, arguments.memory)
    for result in results:
        ways = "   ".join(f"{name} {ms} ({result['speedup'][name]}x)" for name, ms in result["median_ms"].items())
        print(f"{result['tokens']:>6} x {result['width']:<4} ms: {ways}   MiB: {result.get('peak_mib', '-')}")
    shapes = {"lengths": arguments.lengths, "widths": arguments.widths}
    write_report(arguments.out, {"seconds": arguments.seconds, "results": results}, shapes=shapes)
    return 0
