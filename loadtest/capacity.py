"""How many replicas a rate of pictures needs, from what was measured of one.

    python -m loadtest.capacity --rate 500 [--headroom 0.3] RESULT.json… [--windows-per-picture 2] [--out X.json]

RESULT.json is what these wrote with --out, any number of each:

    python -m loadtest.search            the highest rate that holds an SLO: the best ground for a size
    python -m handlers.bench servers     the most that clients got who wait for their answers: no SLO, no range
    python -m handlers.bench end-to-end  windows per second of the engine alone, and what decoding and encoding cost
    python -m handlers.bench codec       what decoding and encoding cost, for the results of the first two

Every size rests on the low end of what was measured, and its assumptions are printed with it.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .sizing.measurements import Measured, read_results

_SECONDS_OF_HOUR = 3600
_COLUMNS = (
    "",
    "measured/s",
    "range",
    "p50/p99 ms",
    "plan/s",
    "replicas",
    "+ spare",
    "devices",
    "load",
    "one away",
    "per device-hour",
    "codec cores",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a target rate needs of one configuration.

    Attributes:
        measured: what it rests on.
        usable_per_replica: pictures per second that a replica is planned for.
        replicas: that carry the target rate.
        replicas_with_spare: the same with one away, in a rollout or on a drained node.
        devices: for those, spare included.
        load: of the low end that each carries with nobody away, and with one away.
        pictures_per_device_hour: at the low end.
        codec_cores: CPU cores that decoding and encoding keep busy in a replica at the low end.
    """

    measured: Measured
    usable_per_replica: float
    replicas: int
    replicas_with_spare: int
    devices: int
    load: float
    load_one_away: float
    pictures_per_device_hour: float
    codec_cores: float | None


def size_up(measured: Measured, rate: float, headroom: float) -> Size:
    """Replicas for a rate.

    Args:
        rate: pictures per second in the busiest minute.
        headroom: share of the low end that is left free, 0 to below 1.

    Raises:
        ValueError: rate or headroom are out of range, or the low end is 0.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: expected pictures per second > 0, got {rate:g}")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom: expected a share within 0..1, 1 excluded, got {headroom:g}")
    if measured.low <= 0:
        raise ValueError(f"{measured.name}: expected a low end > 0, got {measured.low:g}")
    low = measured.low / measured.replicas
    usable = low * (1 - headroom)
    replicas = math.ceil(rate / usable - 1e-9)
    return Size(
        measured=measured,
        usable_per_replica=usable,
        replicas=replicas,
        replicas_with_spare=replicas + 1,
        devices=math.ceil((replicas + 1) / measured.replicas),
        load=rate / ((replicas + 1) * low),
        load_one_away=rate / (replicas * low),
        pictures_per_device_hour=measured.low * _SECONDS_OF_HOUR,
        codec_cores=None if measured.codec_ms is None else low * measured.codec_ms / 1000,
    )


def table(sizes: Sequence[Size]) -> list[str]:
    """The sizes, a line each under a line of headings."""
    rows = [_COLUMNS] + [_row(size) for size in sizes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _row(size: Size) -> tuple[str, ...]:
    measured = size.measured
    span = "-" if measured.low == measured.high else f"{measured.low:.3g}..{measured.high:.3g}"
    latencies = "/".join("-" if ms is None else f"{ms:.0f}" for ms in (measured.p50_ms, measured.p99_ms))
    return (
        measured.name,
        f"{measured.rate:.3g}",
        span,
        latencies,
        f"{size.usable_per_replica:.3g}",
        str(size.replicas),
        str(size.replicas_with_spare),
        str(size.devices),
        f"{100 * size.load:.0f} %",
        f"{100 * size.load_one_away:.0f} %",
        f"{size.pictures_per_device_hour:,.0f}",
        "-" if size.codec_cores is None else f"{size.codec_cores:.2g}",
    )


def assumptions(sizes: Sequence[Size], rate: float, headroom: float) -> list[str]:
    """What has to hold: for all sizes, then for each."""
    common = [
        f"{rate:g} pictures per second in the busiest minute, of the same mix as measured",
        f"plan: the low end of what one replica did, less {100 * headroom:g} % for bursts and for slower days",
        "replicas add up: a proxy spreads requests evenly, and they share nothing that saturates",
        "spare: one replica may be away, in a rollout with maxUnavailable 1 or with its node; load is then `one away`",
        "devices: one per replica, unless the measurement had several replicas on one",
        "per device-hour: pictures at the low end, with the device busy all the hour",
    ]
    if any(size.codec_cores is not None for size in sizes):
        common.append("codec cores: busy at the low end, in each replica, beside what the network itself takes")
    if len(devices := dict.fromkeys(size.measured.device for size in sizes)) > 1:
        common.append(f"measured on different devices, which don't compare: {'; '.join(devices)}")
    own = [f"{size.measured.name}: {each}" for size in sizes for each in size.measured.assumptions]
    return common + own


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--rate", type=float, required=True, help="pictures per second in the busiest minute")
    parser.add_argument("--headroom", type=float, default=0.3, help="share of a replica left free (0.3)")
    parser.add_argument("--windows-per-picture", type=float, help="for results that count windows")
    parser.add_argument("--out", type=Path, help="write the sizes as JSON")
    arguments = parser.parse_args()
    try:
        windows = arguments.windows_per_picture
        if windows is not None and not (math.isfinite(windows) and windows >= 1):
            raise ValueError(f"windows-per-picture: expected a number >= 1, got {windows:g}")
        measured = read_results(arguments.results, windows)
        never = [one.name for one in measured if not one.low]
        sizes = [size_up(one, arguments.rate, arguments.headroom) for one in measured if one.low]
        if not sizes:
            raise ValueError(f"nothing to size: no rate that was tried held in every repeat, of {'; '.join(never)}")
        told = assumptions(sizes, arguments.rate, arguments.headroom)
        if arguments.out:
            report = {"rate_per_second": arguments.rate, "headroom": arguments.headroom, "assumptions": told}
            arguments.out.write_text(json.dumps(report | {"sizes": [asdict(size) for size in sizes]}, indent=2) + "\n")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(sizes)))
    for name in never:
        print(f"{name}: no size, because in one repeat or more no rate that was tried held")
    print("\nAssuming")
    print("\n".join(f"  {each}" for each in told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
