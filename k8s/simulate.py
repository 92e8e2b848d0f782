"""Simulate a day of the autoscaler: what its settings cost in GPU-hours, and how many requests they refuse.

kubectl kustomize k8s/overlays/mine | mpm simulate --day day.csv --rate 480 [--min 2,4] [--use 0.7,0.8]

DAY has a line `HH:MM,PICTURES_PER_SECOND` for every turn of the load, straight between them. --rate is what one
replica computes: pictures per second, or the file that `loadtest capacity --out` wrote. All else is read from the
ScaledObject and may be replaced; of several values every combination is tried, and the cheapest that keeps --refused
is the choice, which --write puts into a component for the overlay.

A model: replicas are alike and evenly loaded, work is fluid, metrics are fresh, every pod finds a GPU, and pods that
end cost nothing. It has the rules of the HorizontalPodAutoscaler: tolerance, stabilization, policies.
"""

import csv
import itertools
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .manifests import Manifests

_SYNC_SECONDS = 15
_REMEMBERED = 3600 // _SYNC_SECONDS  # steps; no period or stabilization is longer
_TOLERANCE = 0.1  # that the controller leaves alone
_WAITING, _USE = "mpm_waiting_tokens", "mpm_tokens_total"  # what tells the triggers apart
_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaler:
    """An autoscaler's settings.

    Attributes:
        low, high: fewest and most replicas.
        waiting, use: thresholds of the two signals; infinite where there is no such trigger.
        crons: start and end, in seconds of the day, and the replicas to have between them.
        behavior: as the HorizontalPodAutoscaler's.
    """

    low: int
    high: int
    waiting: float = math.inf
    use: float = math.inf
    crons: tuple[tuple[int, int, int], ...] = ()
    behavior: Mapping[str, Any]

    @classmethod
    def of(cls, manifests: Manifests) -> "Scaler":
        """The one of an overlay.

        Raises:
            ValueError: there is none, or several, or a trigger of another kind.
        """
        scalers = manifests.of("ScaledObject")
        if len(scalers) != 1:
            raise ValueError(f"expected one ScaledObject, as of components/keda, got {len(scalers)}")
        spec = scalers[0]["spec"]
        thresholds, crons = {_WAITING: math.inf, _USE: math.inf}, []
        for trigger in spec["triggers"]:
            given = trigger["metadata"]
            metrics = [name for name in thresholds if name in given.get("query", "")]
            if trigger["type"] == "cron":
                crons.append((_cron(given["start"]), _cron(given["end"]), int(given["desiredReplicas"])))
            elif metrics:
                thresholds[metrics[0]] = float(given["threshold"])
            else:
                raise ValueError(f"trigger: expected cron, {_WAITING} or {_USE}, got {given}")
        return cls(
            low=spec["minReplicaCount"],
            high=spec["maxReplicaCount"],
            waiting=thresholds[_WAITING],
            use=thresholds[_USE],
            crons=tuple(crons),
            behavior=spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        )

    def wanted(self, replicas: int, waiting: float, use: float, second: int) -> int:
        """Replicas that the signals ask for, before limits of speed."""
        asked = [self.low]
        for value, threshold in ((waiting, self.waiting), (use, self.use)):
            near = abs(value / (threshold * replicas) - 1) <= _TOLERANCE
            asked.append(replicas if near else math.ceil(value / threshold))
        asked += [number for start, end, number in self.crons if start <= second % _DAY_SECONDS < end]
        return min(self.high, max(asked))


def _cron(text: str) -> int:
    """Seconds of the day."""
    fields = text.split()
    if len(fields) != 5 or fields[2:] != ["*"] * 3 or not all(field.isdecimal() for field in fields[:2]):
        raise ValueError(f"cron: expected MINUTE HOUR * * *, got {text!r}")
    return 60 * int(fields[0]) + 3600 * int(fields[1])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a day: shares and sums, alerts by how often they fired, and replicas at every second."""

    refused: float
    gpu_hours: float
    overloaded: int
    little_headroom: int
    replicas: Sequence[int]


def simulate(load: Sequence[float], scaler: Scaler, *, start_seconds: float, queue_seconds: float = 0.2) -> Outcome:
    """Let an autoscaler follow a load.

    Args:
        load: at every second, in replicas that it keeps busy.
        start_seconds: from the creation of a pod to its first answer.
        queue_seconds: of work that a replica holds before it refuses.
    """
    ready, waiting = scaler.low, 0.0
    starting: list[float] = []  # when each will be ready
    served, refused, queued, ready_sum = [0.0], [0.0], [0.0], [0.0]  # since midnight, at every second
    wishes: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
    steps: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
    replicas = []
    for now, offered in enumerate(load):
        ready, starting = ready + sum(t <= now for t in starting), [t for t in starting if t > now]
        done = min(waiting + offered, ready)
        waiting += offered - done
        lost = max(0.0, waiting - ready * queue_seconds)
        waiting -= lost
        for sums, value in ((served, done), (refused, lost), (queued, waiting), (ready_sum, ready)):
            sums.append(sums[-1] + value)
        if now % _SYNC_SECONDS == 0:
            count = ready + len(starting)
            wanted = scaler.wanted(count, _mean(queued, 60), _mean(served, 120), now)
            change = _limited(count, wanted, now, wishes, steps, scaler.behavior) - count
            if change > 0:
                starting += [now + start_seconds] * change
            elif change < 0:  # those that have not started go first
                spared = min(len(starting), -change)
                starting, ready = starting[: len(starting) - spared], ready + change + spared
            steps.append((now, change))
        replicas.append(ready + len(starting))
    of_five = [
        (_mean(refused, 300, at), _mean(served, 300, at), _mean(ready_sum, 300, at)) for at in range(1, len(served))
    ]
    return Outcome(
        refused=refused[-1] / max(sum(load), 1e-9),
        gpu_hours=sum(replicas) / 3600,
        overloaded=_firings((lost > 0.01 * (lost + done) for lost, done, _ in of_five), 120),
        little_headroom=_firings((done > 0.9 * able for _, done, able in of_five), 600),
        replicas=replicas,
    )


def _mean(sums: Sequence[float], seconds: int, at: int = -1) -> float:
    """Of the last seconds before a moment."""
    end = at % len(sums)
    begin = max(0, end - seconds)
    return (sums[end] - sums[begin]) / max(1, end - begin)


def _limited(
    count: int,
    wanted: int,
    now: int,
    wishes: deque[tuple[int, int]],
    steps: deque[tuple[int, int]],
    behavior: Mapping[str, Any],
) -> int:
    """Replicas at this moment, as fast as the policies let them change."""
    wishes.append((now, wanted))
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    most = max(wish for at, wish in wishes if at > now - down["stabilizationWindowSeconds"] or at == now)
    least = min(wish for at, wish in wishes if at > now - up["stabilizationWindowSeconds"] or at == now)
    stable = min(max(count, least), most)
    if stable > count:
        return min(stable, max(_reach(count, now, steps, policy, 1) for policy in up["policies"]))
    return max(stable, min(_reach(count, now, steps, policy, -1) for policy in down["policies"]))


def _reach(count: int, now: int, steps: deque[tuple[int, int]], policy: Mapping[str, Any], sign: int) -> int:
    """How far one policy lets the replicas go."""
    recent = sum(change for at, change in steps if at > now - policy["periodSeconds"] and change * sign > 0)
    before = count - recent
    if policy["type"] == "Pods":
        return before + sign * int(policy["value"])
    reached = before * (1 + sign * policy["value"] / 100)
    return math.ceil(reached) if sign > 0 else int(reached)


def _firings(states: Any, seconds: int) -> int:
    """How often something held for so long."""
    return sum(holds and len(list(run)) > seconds for holds, run in itertools.groupby(states))


def read_day(path: Path) -> list[float]:
    """Pictures per second at every second.

    Raises:
        ValueError: a line is none of `HH:MM,NUMBER`, or times don't rise.
    """
    times: list[int] = []
    rates: list[float] = []
    for number, row in enumerate(csv.reader(path.read_text().splitlines()), 1):
        try:
            (hours, minutes), rate = map(int, row[0].split(":")), float(row[1])
            if rate < 0 or not math.isfinite(rate) or (times and 3600 * hours + 60 * minutes <= times[-1]):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(
                f"{path}: line {number}: expected HH:MM,PICTURES_PER_SECOND, later than before, got {row}"
            ) from None
        times.append(3600 * hours + 60 * minutes)
        rates.append(rate)
    if len(times) < 2:
        raise ValueError(f"{path}: expected two lines or more, got {len(times)}")
    return [float(rate) for rate in np.interp(np.arange(times[0], times[-1]), times, rates)]


def read_rate(text: str) -> tuple[float, float | None]:
    """Pictures per second of a replica, and the cores that decoding and encoding them keeps busy, where known.

    Args:
        text: a number, or a file of `loadtest capacity --out` with one size.
    """
    if not Path(text).is_file():
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            raise ValueError(f"rate: expected pictures per second, or a file of `capacity --out`, got {text!r}")
        return rate, None
    sizes = json.loads(Path(text).read_text())["sizes"]
    if len(sizes) != 1:
        raise ValueError(f"{text}: expected one size, got {', '.join(size['measured']['name'] for size in sizes)}")
    measured = sizes[0]["measured"]
    return measured["low"] / measured["replicas"], sizes[0]["codec_cores"]


def component(scaler: Scaler, cores: float | None) -> str:
    """A kustomize component that sets what was chosen."""
    ops: list[tuple[str, int | str]] = [("minReplicaCount", scaler.low), ("maxReplicaCount", scaler.high)]
    ops += [(f"triggers/{i}/metadata/threshold", f"{t:g}") for i, t in enumerate((scaler.waiting, scaler.use))]
    patches = [
        {
            "target": {"kind": "ScaledObject"},
            "patch": yaml.safe_dump([{"op": "replace", "path": f"/spec/{path}", "value": v} for path, v in ops]),
        }
    ]
    if cores is not None:  # of decoding and encoding, the thread that drives the device, the front end; a quarter more
        path = "/spec/template/spec/containers/0/resources/requests/cpu"
        request = [{"op": "replace", "path": path, "value": str(math.ceil(1.25 * (cores + 1.5)))}]
        patches.append({"target": {"kind": "Deployment", "name": "segmenter"}, "patch": yaml.safe_dump(request)})
    head = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "patches": patches}
    return "# Made by `mpm simulate --write`.\n" + yaml.safe_dump(head, sort_keys=False)


def choose(
    given: Scaler,
    load: Sequence[float],
    values: Mapping[str, Sequence[float]],
    *,
    refused: float,
    start_seconds: float,
    queue_seconds: float,
) -> Scaler | None:
    """Simulate every combination, a line each, and return the cheapest that refuses no larger share of the requests.

    Args:
        given: the autoscaler as it is.
        load: replicas' worth of pictures at every second.
        values: to try, by names of fields.
    """
    best: tuple[float, Scaler] | None = None
    print(" min   max  waiting   use  refused  GPU-hours  overloaded  little headroom")
    for combination in itertools.product(*values.values()):
        scaler = replace(given, **dict(zip(values, combination, strict=True)))  # type: ignore[arg-type]
        found = simulate(load, scaler, start_seconds=start_seconds, queue_seconds=queue_seconds)
        print(
            f"{scaler.low:4} {scaler.high:5} {scaler.waiting:8g} {scaler.use:5g} {found.refused:8.2%} "
            f"{found.gpu_hours:10.1f} {found.overloaded:11} {found.little_headroom:16}"
        )
        if found.refused <= refused and not (best and best[0] <= found.gpu_hours):
            best = found.gpu_hours, scaler
    return best[1] if best else None
