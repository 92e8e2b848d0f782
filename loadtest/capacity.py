"""How many replicas a rate of pictures needs, from what was measured of one.

    mpm loadtest capacity --rate 500 [--headroom 0.3] RESULT.json… [--out X.json]

RESULT.json is what `mpm loadtest search` wrote, the highest rate that holds an SLO, any number of them; and what `mpm
bench codec` wrote with --out, the cost of decoding and encoding. Every size rests on the low end of what was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

_CODEC_STEPS = ("decode", "cut", "png")
_COLUMNS = ("", "measured/s", "range", "p50/p99 ms", "plan/s", "replicas", "+ spare", "devices", "load", "one away",
            "per device-hour", "codec cores")  # fmt: skip
_ASSUMED = """
Assuming
  {rate:g} pictures per second in the busiest minute, of the same mix as measured
  plan: the low end of what one replica did, less {headroom:g} % for bursts and for slower days
  replicas add up: a proxy spreads requests evenly, and they share nothing that saturates
  spare: one replica may be away, in a rollout with maxUnavailable 1 or with its node; load is then `one away`
  devices: one per replica, unless the measurement had several replicas on one
  per device-hour: pictures at the low end, with the device busy all the hour
  codec cores: busy at the low end in each replica, with pictures as dear as the dearest measured"""


class ResultError(ValueError):
    """A file is not a result, or a field of it not what it should be; the message names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one deployment did on one device.

    Attributes:
        name: of the configuration, and the promises that it held.
        device: what it ran on.
        rate, low, high: pictures per second, and its range; 0 where promises were kept at no rate that was tried.
        replicas: how many shared the device.
        p50_ms, p99_ms: latency at that rate.
        codec_ms: CPU milliseconds a picture costs in decoding and encoding.
    """

    name: str
    device: str
    rate: float
    low: float
    high: float
    replicas: int = 1
    p50_ms: float | None = None
    p99_ms: float | None = None
    codec_ms: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.rate <= self.high < math.inf and self.high > 0 and self.replicas >= 1):
            got = f"{self.low!r}, {self.rate!r}, {self.high!r} of {self.replicas!r} replicas"
            raise ValueError(f"{self.name}: expected 0 <= low <= rate_per_second <= high, replicas >= 1, got {got}")


def read_results(files: Sequence[Path]) -> list[Measured]:
    """Everything that was measured in these files, in order.

    Raises:
        ResultError: a file is neither of the two kinds, or a field is missing or out of range.
        OSError: it can't be read.
    """
    results, codec_ms = [], None
    for file in files:
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            if "slo" in fields:
                results.append(fields)
            elif "repeats" in fields:
                codec_ms = max(codec_ms or 0.0, _codec_ms(fields["results"]))
            else:
                raise ResultError(
                    f"{file}: expected what loadtest search or bench codec wrote, got {str(fields)[:60]}"
                )
            found = [one for result in results for one in _from_search(result, codec_ms)]
        except ResultError:
            raise
        except KeyError as error:
            raise ResultError(f"{file}: {error}: expected in what loadtest search or bench codec wrote") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ResultError(f"{file}: expected JSON of loadtest search or bench codec: {error}") from None
    if not found:
        raise ResultError("nothing was measured in these files but the cost of decoding and encoding")
    return found


def _from_search(fields: Mapping[str, Any], codec_ms: float | None) -> list[Measured]:
    return [
        Measured(
            name=row["name"],
            device=fields["device"],
            rate=row["rate_per_second"],
            low=row["low"],
            high=row["high"],
            replicas=row["configuration"].get("replicas", 1),
            p50_ms=row.get("p50_ms"),
            p99_ms=row.get("p99_ms"),
            codec_ms=codec_ms,
        )
        for row in fields["results"]
    ]


def _codec_ms(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of the dearest picture, so that a mix of them can't cost more."""
    steps = {(row["picture"], row["step"]): float(row["ms"]) for row in rows}
    return max(sum(steps[picture, step] for step in _CODEC_STEPS) for picture, _ in steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a target rate needs of one configuration.

    Attributes:
        measured: what it rests on.
        usable_per_replica: pictures per second that a replica is planned for.
        replicas: that carry the target rate.
        replicas_with_spare: the same with one away, in a rollout or on a drained node.
        devices: for those, spare included.
        load, load_one_away: of the low end that each carries with nobody away, and with one away.
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
    """Replicas for a rate in pictures per second, with a share of the low end left free.

    Raises:
        ValueError: rate or headroom are out of range.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: expected pictures per second > 0, got {rate:g}")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom: expected a share within 0..1, 1 excluded, got {headroom:g}")
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
        pictures_per_device_hour=3600 * measured.low,
        codec_cores=None if measured.codec_ms is None else low * measured.codec_ms / 1000,
    )


def _row(size: Size) -> tuple[str, ...]:
    measured, shown = size.measured, lambda value, form: "-" if value is None else format(value, form)
    counts = (size.replicas, size.replicas_with_spare, size.devices)
    return (
        measured.name,
        f"{measured.rate:.3g}",
        f"{measured.low:.3g}..{measured.high:.3g}",
        f"{shown(measured.p50_ms, '.0f')}/{shown(measured.p99_ms, '.0f')}",
        f"{size.usable_per_replica:.3g}",
        *map(str, counts),
        f"{100 * size.load:.0f} %",
        f"{100 * size.load_one_away:.0f} %",
        f"{size.pictures_per_device_hour:,.0f}",
        shown(size.codec_cores, ".2g"),
    )


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT.json...")
@click.option("--rate", type=float, required=True, help="Pictures per second in the busiest minute.")
@click.option("--headroom", type=float, default=0.3, show_default=True, help="Share of a replica left free.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the sizes as JSON.")
def command(results: Sequence[Path], rate: float, headroom: float, out: Path | None) -> None:
    """Compute how many replicas a rate needs, from results of a search and of `mpm bench codec`."""
    measured = read_results(results)
    never = [one.name for one in measured if not one.low]
    sizes = [size_up(one, rate, headroom) for one in measured if one.low]
    if not sizes:
        raise ValueError(f"nothing to size: no rate that was tried held in every repeat, of {'; '.join(never)}")
    if out:
        report = {"rate_per_second": rate, "headroom": headroom, "sizes": [asdict(size) for size in sizes]}
        out.write_text(json.dumps(report, indent=2) + "\n")
    rows = [_COLUMNS, *map(_row, sizes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
    for name in never:
        print(f"{name}: no size, because in one repeat or more no rate that was tried held")
    print(_ASSUMED.format(rate=rate, headroom=100 * headroom))
    if len(devices := dict.fromkeys(size.measured.device for size in sizes)) > 1:
        print(f"  measured on different devices, which don't compare: {'; '.join(devices)}")
