"""Ways to group, side by side on the real engine: pictures per second, latency, and device time per window."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from handlers.config import ServingConfig
from handlers.engine import Engine
from handlers.options import RequestOptions
from handlers.scheduler import Group, Scheduler
from mpm_ops import Segmenter, load_segmenter
from mpm_ops.bench import percentile_ms, read_images
from mpm_ops.classes import Classes, default_colors

from .load import closed_loop

CLIENTS = 8
LOAD = 0.7  # of what the slowest way reached in the closed loop, offered to every way by the open one
ROUNDS = 4
OPTIONS = RequestOptions(request_id="bench", media_type="application/x-npy")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to group; `alone` computes every window by itself, which is what the others can be held against."""

    align: int = 1
    padded: bool = False
    alone: bool = False
    by_arrival: bool = False


WAYS = {
    "alone": Way(alone=True),
    "padded-by-arrival": Way(padded=True, by_arrival=True),
    "padded-planned": Way(padded=True),
    "padded-planned-16": Way(align=16, padded=True),
    "packed": Way(),
    "packed-16": Way(align=16),
}


class _Computed(NamedTuple):
    """A group that has been computed; `tokens` are its windows' own, `padding` comes on top."""

    stage: int
    windows: int
    tokens: int
    padding: int
    seconds: float


@dataclass(slots=True)
class _Contestant:
    """A way, its engine, and what was observed of both."""

    name: str
    way: Way
    engine: Engine
    groups: list[_Computed] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)  # latencies
    opened: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # pictures per second of each closed loop
    agreement: float = 0.0  # share of pixels with the label that the library gives


def bench_serving(
    checkpoint: Path,
    folders: Sequence[Path],
    schedule: Sequence[int],
    seconds: float,
    ways: Sequence[str] = tuple(WAYS),
    num_pictures: int = 12,
) -> list[dict[str, Any]]:
    """Serve the same pictures in every way, in turn: as fast as clients can ask, then at the same moments.

    Args:
        seconds: of each loop, for every way.
        ways: names of `WAYS`; what the slowest of them reaches sets the pace of the second loop.
        num_pictures: sent over and over, as many of each folder, evenly chosen and then shuffled: mates from one
            folder would be more alike than those that meet in a server.

    Raises:
        RuntimeError: packed groups do not give the labels of the library; figures would compare different work.
    """
    images = [image for folder in folders for image in read_images(folder, -(-num_pictures // len(folders)))]
    images = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    models = {align: load_segmenter(checkpoint, schedule, align) for align in {WAYS[name].align for name in ways}}
    pictures = [_encode(image) for image in images]
    with ExitStack() as stack:
        contestants = [stack.enter_context(_started(name, models[WAYS[name].align])) for name in ways]
        for contestant in contestants:
            contestant.agreement = _agreement(contestant, models[contestant.way.align], images, pictures)
            if not contestant.way.padded and contestant.agreement < 1:
                raise RuntimeError(
                    f"parity: {contestant.name} does not give the library's labels; no figures are reported"
                )
            contestant.groups.clear()
        for _ in range(ROUNDS):
            for contestant in contestants:
                _closed_loop(contestant, pictures, seconds / ROUNDS)
        rate = LOAD * min(statistics.mean(contestant.rates) for contestant in contestants)
        for seed in range(ROUNDS):
            for contestant in contestants:
                _open_loop(contestant, pictures, rate, max(1, int(rate * seconds / ROUNDS)), seed)
    return [_summary(contestant, rate) for contestant in contestants]


@contextmanager
def _started(name: str, model: Segmenter) -> Iterator[_Contestant]:
    way = WAYS[name]
    groups: list[_Computed] = []

    def observe(group: Group[Any], seconds: float) -> None:
        lengths = [member.length for member in group.members]
        padding = len(lengths) * max(lengths) - sum(lengths) if way.padded else 0
        groups.append(_Computed(group.lane.stage, len(lengths), sum(lengths), padding, seconds))

    config = ServingConfig(
        schedule=model.schedule,
        align=way.align,
        runtime="torch",  # the only one that can pad
        precision="fp32",  # the library's
        padded=way.padded,
        deterministic=way.alone,
        deadline_seconds=600,
        stall_seconds=600,
    )
    num_classes = model.config.n_cls
    classes = Classes(tuple(map(str, range(num_classes))), default_colors(num_classes))
    with closing(Engine(model, classes, config, observer=observe)) as engine:
        if way.by_arrival:  # without a cost the scheduler fills groups by age; nothing has been submitted yet
            engine._device.scheduler = Scheduler(
                max_batch_tokens=config.max_batch_tokens,
                max_group_windows=config.max_group_windows,
                pool_windows=config.max_group_windows,
                max_group_delay=config.max_group_delay_ms / 1000,
                bulk_patience=config.bulk_patience_seconds,
            )
        yield _Contestant(name, way, engine, groups)


def _agreement(
    contestant: _Contestant, model: Segmenter, images: Sequence[np.ndarray], pictures: Sequence[bytes]
) -> float:
    """Share of pixels that get the library's label when all pictures come at once."""
    answers = [contestant.engine.submit(picture, OPTIONS) for picture in pictures]
    same = [
        np.load(BytesIO(answer.result().body)) == model.segment(image)
        for image, answer in zip(images, answers, strict=True)
    ]
    return sum(int(part.sum()) for part in same) / sum(part.size for part in same)


def _closed_loop(contestant: _Contestant, pictures: Sequence[bytes], seconds: float) -> None:
    """Clients that each wait for their answer before they send the next picture."""

    def ask(i: int) -> None:
        contestant.engine.submit(pictures[i % len(pictures)], OPTIONS).result()

    latencies, elapsed = closed_loop(lambda: nullcontext(ask), CLIENTS, seconds)
    contestant.closed += latencies
    contestant.rates.append(len(latencies) / elapsed)


def _open_loop(contestant: _Contestant, pictures: Sequence[bytes], rate: float, num_sent: int, seed: int) -> None:
    """Pictures that come at their own rate, at the same moments for every way; late answers do not stop the clock."""
    due = time.monotonic() + np.random.default_rng(seed).exponential(1 / rate, num_sent).cumsum()
    answers = []
    for i, sent in enumerate(due.tolist()):
        time.sleep(max(0.0, sent - time.monotonic()))
        answer = contestant.engine.submit(pictures[i % len(pictures)], OPTIONS)
        answer.add_done_callback(lambda _, sent=sent: contestant.opened.append(time.monotonic() - sent))  # type: ignore[misc]
        answers.append(answer)
    for answer in answers:
        answer.result()


def _summary(contestant: _Contestant, rate: float) -> dict[str, Any]:
    stages = sorted({group.stage for group in contestant.groups})
    by_stage = [[group for group in contestant.groups if group.stage == stage] for stage in stages]
    windows = [sum(group.windows for group in groups) for groups in by_stage]
    padding = [sum(group.padding for group in groups) for groups in by_stage]
    tokens = [sum(group.tokens for group in groups) for groups in by_stage]
    seconds = [sum(group.seconds for group in groups) for groups in by_stage]
    return {
        "way": contestant.name,
        "align": contestant.way.align,
        "agreement": round(contestant.agreement, 6),
        "pictures": len(contestant.closed) + len(contestant.opened),
        "pictures_per_second": round(statistics.mean(contestant.rates), 3),
        "rounds": [round(reached, 3) for reached in contestant.rates],
        "offered_per_second": round(rate, 3),
        "device_ms_per_window": round(sum(1000 * s / n for s, n in zip(seconds, windows, strict=True)), 1),
        "mean_group": [round(n / len(groups), 2) for n, groups in zip(windows, by_stage, strict=True)],
        "padding_share": [round(p / (p + t), 4) for p, t in zip(padding, tokens, strict=True)],
        **{f"closed_ms_p{q}": percentile_ms(contestant.closed, q) for q in (50, 99)},
        **{f"open_ms_p{q}": percentile_ms(contestant.opened, q) for q in (50, 99)},
    }


def _encode(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
