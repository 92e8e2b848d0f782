"""What grouping costs and earns: measured, and simulated for other devices.

Every folder of pictures is a stream of windows, and all of them together are one more. Their lengths are
measured once with the real model; the padding study and the simulation then use nothing else, so
`--replay X.json` repeats both in seconds.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from handlers.engine.grouping import GroupCost
from mpm_ops import load_segmenter
from mpm_ops.bench import environment, write_report
from mpm_ops.stages import parse_schedule

from .lengths import Lengths, measure_costs, measure_lengths, read_windows
from .padding import BATCH, POOL_BATCHES, Groups, batches_by_arrival, overhead, scheduled_groups, sorted_slices
from .plots import plot_report
from .serve import WAYS, bench_serving
from .simulate import Profile, Rules, Simulation, paper_profiles, poisson

Streams = Mapping[str, Mapping[int, Lengths]]  # by name and align; the windows of one stream in one order
GroupAndPool = tuple[int, int]  # most windows of a group, and windows to choose them from

PADDED_ALIGN = 16  # served padded in the simulation; packed execution needs no aligning
LOADS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
CLIENTS = (32, 128, 512)
MAX_INFLIGHT = 256  # windows
_PROFILES = ("measured", "h100-float32", "h100-bfloat16")
LONGEST = 1025  # tokens of a 512 x 512 window; a group holds its number of windows whatever their length


def padding_study(
    streams: Streams, profiles: Sequence[Profile], sizes: Sequence[GroupAndPool], num_windows: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Overhead of every way to group, on windows drawn from each stream, in every stage behind a merge."""
    rows = []
    for name, by_align in streams.items():
        drawn = np.random.default_rng(seed).integers(0, len(by_align[1]), num_windows)
        for stage in range(1, len(by_align[1][0])):
            lengths = {align: [windows[i][stage] for i in drawn] for align, windows in by_align.items()}
            for policy, align, groups, padded in _policies(lengths, profiles, sizes):
                found = overhead(groups, lengths[align], lengths[1], padded=padded)
                rows.append({"stream": name, "stage": stage, "policy": policy, "align": align, **asdict(found)})
    return rows


def _policies(
    lengths: Mapping[int, Sequence[int]], profiles: Sequence[Profile], sizes: Sequence[GroupAndPool]
) -> Iterable[tuple[str, int, Groups, bool]]:
    """Name, align, groups, and whether they are padded."""
    yield f"arrival order, {BATCH}", 1, batches_by_arrival(lengths[1]), True
    yield f"sorted slices, {BATCH} of {BATCH * POOL_BATCHES}", 1, sorted_slices(lengths[1]), True
    for profile in profiles:
        for size, pool in sizes:
            for align in lengths:
                groups = scheduled_groups(lengths[align], _rules(size, pool, padded=True), profile.stages[-1])
                yield f"planned for {profile.name}, {size} of {pool}", align, groups, True
    size = max(size for size, _ in sizes)
    packed = scheduled_groups(lengths[1], _rules(size, size, padded=False), profiles[0].stages[-1])
    yield f"packed, {size}", 1, packed, False


def simulation_study(
    windows: Mapping[int, Lengths], profiles: Sequence[Profile], sizes: Sequence[GroupAndPool], num_windows: int
) -> list[dict[str, Any]]:
    """Poisson arrivals at shares of the device's capacity, and clients that each wait for their answer."""
    rows = []
    drawn = np.random.default_rng(0).integers(0, len(windows[1]), num_windows)
    packed = [(False, size, size, 1) for size in dict.fromkeys(size for size, _ in sizes)]
    padded = [(True, size, pool, align) for size, pool in sizes for align in (1, PADDED_ALIGN)]
    for profile in profiles:
        capacity = profile.capacity(windows[1], max(size for size, _ in sizes))
        for is_padded, size, pool, align in packed + padded:
            stream = [windows[align][i] for i in drawn]
            rules = _rules(size, pool, padded=is_padded)
            common = {"profile": profile.name, "padded": is_padded, "align": align, "group": size, "pool": pool}
            for load in LOADS:
                simulation = Simulation(profile, rules, stream, max_inflight=MAX_INFLIGHT)
                found = simulation.run(poisson(load * capacity, num_windows)).summary()
                rows.append({**common, "load": load, "offered": round(load * capacity, 2), **found})
            for clients in CLIENTS:
                found = Simulation(profile, rules, stream).run([0.0] * clients, closed=True).summary()
                rows.append({**common, "clients": clients, **found})
    return rows


def _rules(size: int, pool: int, *, padded: bool) -> Rules:
    return Rules(padded=padded, max_batch_tokens=size * LONGEST, max_group_windows=size, pool_windows=pool)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the studies need to know of the model and the pictures."""
    model = load_segmenter(arguments.checkpoint, parse_schedule(arguments.schedule))
    if not model.schedule:
        raise ValueError("schedule: expected at least one merge, got off")
    aligns = sorted({1, PADDED_ALIGN, *arguments.aligns})
    lengths = {}
    for folder in arguments.images:
        found = measure_lengths(model, read_windows(model, folder, arguments.windows), aligns)
        lengths[folder.name] = {str(align): windows for align, windows in found.items()}  # as JSON keeps it
    tokens = next(iter(lengths.values()))["1"][0][0]
    costs = measure_costs(model, tokens)
    return {"environment": environment(), "lengths": lengths, "costs": [asdict(cost) for cost in costs]}


def _streams(measured: Mapping[str, Any]) -> dict[str, dict[int, Lengths]]:
    """The streams of a report, and all of them mixed."""
    streams = {
        name: {int(align): [tuple(window) for window in windows] for align, windows in by_align.items()}
        for name, by_align in measured["lengths"].items()
    }
    if len(streams) > 1:
        aligns = next(iter(streams.values()))
        streams["mixed"] = {align: [w for s in list(streams.values()) for w in s[align]] for align in aligns}
    return streams


def study(
    measured: Mapping[str, Any], names: Sequence[str], sizes: Sequence[GroupAndPool], num_windows: int
) -> dict[str, Any]:
    """Everything that follows from measured lengths and costs."""
    streams = _streams(measured)
    costs = tuple(GroupCost(**cost) for cost in measured["costs"])
    device = measured["environment"]["processor"]
    known = (Profile(name="measured", source=f"measured on {device}", stages=costs), *paper_profiles())
    profiles = [profile for profile in known if profile.name in names]
    return {
        "measured": dict(measured),
        "profiles": [asdict(profile) for profile in profiles],
        "num_windows": {name: len(by_align[1]) for name, by_align in streams.items()},
        "padding": padding_study(streams, profiles, sizes, num_windows),
        "simulation": simulation_study(list(streams.values())[-1], profiles, sizes, num_windows),
    }


def print_report(report: Mapping[str, Any]) -> None:
    """Tables: overhead by stream and stage, the simulation, and the engine where it was timed."""
    print("% of computed tokens: padding + held back = total (mean group)")
    for stream, num_windows in report["num_windows"].items():
        print(f"\n{stream}, {num_windows} windows")
        rows = [row for row in report["padding"] if row["stream"] == stream]
        for policy, align in dict.fromkeys((row["policy"], row["align"]) for row in rows):
            cells = [_cell(row) for row in rows if (row["policy"], row["align"]) == (policy, align)]
            print(f"  {policy:<40} align {align:<3}  " + "   ".join(cells))
    for profile in report["profiles"]:
        print(f"\nsimulated on {profile['name']} ({profile['source']}); load 1 is its capacity with full groups")
        for row in report["simulation"]:
            if row["profile"] == profile["name"]:
                print("  " + _simulated(row))
    for row in report.get("served", []):
        print("served  " + "  ".join(f"{name} {value}" for name, value in row.items()))
    for row in report.get("served", [])[1:]:
        first = report["served"][0]
        ratios = [mine / its for mine, its in zip(row["rounds"], first["rounds"], strict=True)]
        print(f"{row['way']}: {min(ratios):.3f} to {max(ratios):.3f} of the pictures per second of {first['way']}")


def _cell(row: Mapping[str, Any]) -> str:
    total = row["padding"] + row["held_back"]
    shares = f"{100 * row['padding']:.2f} + {100 * row['held_back']:.2f} = {100 * total:.2f}"
    return f"stage {row['stage']}: {shares} ({row['mean_group']:.1f})"


def _simulated(row: Mapping[str, Any]) -> str:
    kind = f"padded {row['group']} of {row['pool']}" if row["padded"] else f"packed {row['group']}"
    load = f"load {row['load']}" if "load" in row else f"{row['clients']} clients"
    groups = "/".join(f"{size:.1f}" for size in row["mean_group"])
    reasons = " ".join(f"{reason} {share:.2f}" for reason, share in row["reasons"].items())
    return (
        f"{kind:<16} align {row['align']:<2} {load:<12} {row['windows_per_second']:7.4g}/s  "
        f"refused {row['refused_share']:.2f}  busy {row['occupancy']:.2f}  groups {groups:<14} "
        f"waited {row['waited_ms_p50']:7.4g} p99 {row['waited_ms_p99']:7.4g} ms  "
        f"padding {100 * max(row['padding_share']):.1f} %  {reasons}"
    )


def _size(text: str) -> GroupAndPool:
    """8:32 -> (8, 32)."""
    group, _, pool = text.partition(":")
    try:
        found = int(group), int(pool)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"expected GROUP:POOL such as 8:32, the pool no smaller, got {text!r}")
    return found


def add_command(commands: Any) -> None:
    """Add `grouping` to the commands of `python -m handlers.bench`."""
    command = commands.add_parser("grouping", help="padding, group sizes and waiting")
    command.add_argument("--checkpoint", type=Path)
    command.add_argument("--images", type=Path, nargs="+", help="folders of pictures; each is a stream")
    command.add_argument("--replay", type=Path, help="an earlier report, in place of measuring its lengths again")
    command.add_argument("--schedule", default="2,5")
    command.add_argument("--aligns", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    command.add_argument("--windows", type=int, default=96, help="most windows of a folder; 0 takes all")
    command.add_argument("--sizes", type=_size, nargs="+", default=[(8, 32), (32, 128)], metavar="GROUP:POOL")
    command.add_argument("--drawn", type=int, default=1500, help="windows drawn from a stream")
    command.add_argument("--profiles", nargs="+", default=["measured", "h100-bfloat16"], choices=_PROFILES)
    command.add_argument("--serve", type=float, metavar="SECONDS", help="time the real engine too, so long a loop")
    command.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of grouping, for --serve")
    command.add_argument("--out", type=Path, help="write the figures as JSON")
    command.add_argument("--plot", type=Path, help="draw them; needs matplotlib")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    given = arguments.checkpoint and arguments.images
    if not given and not arguments.replay:
        raise ValueError("grouping: expected --checkpoint and --images, or --replay")
    if arguments.serve and not given:
        raise ValueError("--serve: expected --checkpoint and --images with it")
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    schedule = parse_schedule(arguments.schedule)
    measured = json.loads(arguments.replay.read_text())["measured"] if arguments.replay else measure(arguments)
    fields = study(measured, arguments.profiles, arguments.sizes, arguments.drawn)
    if arguments.serve:
        fields["served"] = bench_serving(
            arguments.checkpoint, arguments.images, schedule, arguments.serve, ways=arguments.ways
        )
    print_report(fields)
    shapes = {"schedule": list(schedule), "windows": fields["num_windows"], "groups": arguments.sizes}
    report = write_report(arguments.out, fields, shapes=shapes)
    if arguments.plot:
        plot_report(report, arguments.plot)
    return 0
