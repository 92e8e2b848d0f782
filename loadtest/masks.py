"""Is an answer right? Masks under load are compared with those of the same pictures from the idle server, and these
with the library's.

    mpm loadtest masks --checkpoint checkpoint.pth [--schedule 2,5] [--align 1] --out FOLDER [PICTURE...]

writes the library's masks: `PICTURE.png`, class ids as grey values. It loads torch, so it is a process of its own: the
client has to stay light, and the server needs the cores while there is load.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from handlers.client import Answer, NoAnswerError, read_metrics
from handlers.png import SIGNATURE, png_size

from .pictures import PAINTED, Item, ensure_pictures, read_frame, weigh_pictures
from .protocols import Servers

OK = "ok"


class MaskError(ValueError):
    """An answer is not what was asked for; the message says why in a few words that group well."""


@dataclass(frozen=True)
class Reference:
    """The mask of a picture, a PNG of class ids, as an idle server gave it or the library made it."""

    png: bytes

    @cached_property
    def labels(self) -> np.ndarray:
        """[H, W] class ids."""
        return read_mask(self.png)[0]

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels by class."""
        return np.bincount(self.labels.ravel())


def read_mask(png: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Class ids [H, W] of a palette or grey PNG, and the palette's colours [K, 3]; None without a palette.

    Raises:
        MaskError: it is not such a PNG, or an index lies outside of the palette.
    """
    if png[:8] != SIGNATURE:
        raise MaskError("not a PNG")
    try:
        with Image.open(io.BytesIO(png)) as opened:
            if opened.mode not in ("P", "L", "I", "I;16"):
                raise MaskError(f"a PNG of mode {opened.mode}, not of class ids")
            palette = opened.getpalette() if opened.mode == "P" else None
            labels = np.asarray(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise MaskError("a broken PNG") from None
    colors = None if palette is None else np.asarray(palette, np.uint8).reshape(-1, 3)
    if colors is not None and labels.max(initial=0) >= len(colors):
        raise MaskError("a class outside of the palette")
    return labels, colors


def check_answer(
    item: Item, answer: Answer, reference: Reference | None, *, min_agreement: float
) -> tuple[str, float | None]:
    """Judge an answer.

    Args:
        reference: of the picture; None where there is none yet, or for what is bad.
        min_agreement: share of pixels that have to have the reference's class.

    Returns:
        `OK` or what is wrong, and the share of pixels that agree, where they were compared.
    """
    if item.kind == "bad":
        return _check_refusal(answer), None
    if answer.status != 200:
        return f"status {answer.status}", None
    try:
        agreement = (_check_json if item.kind == "json" else _check_png)(item, answer.body, reference)
    except MaskError as error:
        return f"wrong: {error}", None
    wrong = agreement is not None and agreement < min_agreement
    return "wrong: another mask" if wrong else OK, agreement


def _check_refusal(answer: Answer) -> str:
    if answer.status == 503:
        return "status 503"  # refused, but because the server is full
    if not 400 <= answer.status < 500:
        return f"wrong: status {answer.status} for what is no picture"
    return "wrong: a traceback" if b"Traceback" in answer.body else OK


def _check_png(item: Item, body: bytes, reference: Reference | None) -> float | None:
    if reference is not None and body == reference.png:
        return 1.0  # as deterministic servers answer: nothing to decode
    if (size := png_size(body)) is None:
        raise MaskError("not a PNG")
    if size[::-1] != item.size:
        raise MaskError("another size than the picture")
    labels, _ = read_mask(body)
    if reference is None:
        return None
    if labels.shape != reference.labels.shape:
        raise MaskError("another size than the reference")
    return float((labels == reference.labels).mean())


def _check_json(item: Item, body: bytes, reference: Reference | None) -> float | None:
    """By areas alone, an upper bound of the agreement."""
    try:
        described = json.loads(body)
        size = (described["height"], described["width"])
        areas = {int(entry["id"]): int(entry["area"]) for entry in described["classes"]}
    except (ValueError, KeyError, TypeError):
        raise MaskError("not the JSON of a mask") from None
    if size != item.size:
        raise MaskError("another size than the picture")
    if sum(areas.values()) != size[0] * size[1]:
        raise MaskError("areas that do not fill the picture")
    if reference is None:
        return None
    shared = sum(min(area, known) for index, known in enumerate(reference.areas) if (area := areas.get(index)))
    return float(shared / (size[0] * size[1]))


class References:
    """The mask of every picture, to check answers under load.

    Args:
        library: the library's masks of some of the pictures, as PNG, by names.
        min_agreement: share of pixels that have to agree, of idle servers with the library and under load.

    Attributes:
        library_agreement: share of pixels in which all servers agree with the library at least, by names of pictures.
    """

    def __init__(self, library: Mapping[str, bytes], min_agreement: float) -> None:
        self.library_agreement: dict[str, float] = {}
        self._library = {name: Reference(png) for name, png in library.items()}
        self._min_agreement = min_agreement
        self._masks: dict[tuple[str, str], Reference] = {}

    def take(self, pictures: Sequence[Item], servers: Servers, timeout_seconds: float) -> None:
        """Ask every idle server for the mask of each picture.

        Raises:
            MaskError: a server gives no answer, no mask, or another mask than a server before it or the library.
            ValueError: the library's masks are of other pictures.
        """
        if strangers := sorted(self._library.keys() - {item.name for item in pictures}):
            raise ValueError(f"library: expected masks of pictures that are sent, got one of {strangers[0]!r}")
        for item in pictures:
            for number, host in enumerate(servers.hosts):
                where = f"{item.name} from {host} when idle"
                answer = _ask_idle(servers, item, number, timeout_seconds)
                outcome, _ = self.check(item, answer)
                if outcome != OK:
                    raise MaskError(f"{where}: {outcome}{'' if answer.status == 200 else f': {answer.body[:200]!r}'}")
                if item.name in self._library:
                    self._compare_with_library(item, answer, where)
                self._masks.setdefault((item.kind, item.name), Reference(answer.body))

    def check(self, item: Item, answer: Answer) -> tuple[str, float | None]:
        """Judge an answer under load; see `check_answer`."""
        reference = self._masks.get(("raw" if item.kind == "raw" else "png", item.name))
        return check_answer(item, answer, reference, min_agreement=self._min_agreement)

    def _compare_with_library(self, item: Item, answer: Answer, where: str) -> None:
        least = self._min_agreement
        outcome, agreement = check_answer(item, answer, self._library[item.name], min_agreement=least)
        if agreement is None:
            raise MaskError(f"{where}, compared with the library's mask: {outcome}")
        if agreement < least:
            shares = f"{100 * agreement:.4g} % of the pixels agree, expected at least {100 * least:.4g} %"
            raise MaskError(f"{where}: not the library's mask: {shares}")
        self.library_agreement[item.name] = min(agreement, self.library_agreement.get(item.name, 1.0))


def _ask_idle(servers: Servers, item: Item, number: int, timeout_seconds: float) -> Answer:
    for pause in (1.0, 1.0, 0.0):
        try:
            answer = servers.ask(item, number, timeout_seconds)
        except (NoAnswerError, TimeoutError) as error:
            raise MaskError(f"{servers.hosts[number]}: {error or 'no answer in time'}") from None
        if answer.status != 503:
            break
        time.sleep(pause)  # other workers ask too
    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """The model as the library runs it, with which a server has to agree: options of `mpm loadtest masks`."""

    checkpoint: Path
    schedule: str = "2,5"
    align: int = 1
    inference: Mapping[str, Any] = field(default_factory=dict)

    def masks(self, pictures: Sequence[Path]) -> dict[str, bytes]:
        """Segment pictures in a process of its own; PNGs of class ids by the names of the files.

        Raises:
            ValueError: the library can't load the checkpoint, or not read a picture.
        """
        with tempfile.TemporaryDirectory(prefix="loadtest-masks-") as folder:
            options = {"checkpoint": self.checkpoint, "schedule": self.schedule, "align": self.align, "out": folder}
            options |= {"inference": json.dumps(dict(self.inference))}
            run_module("loadtest", "masks", *flags(options), *map(str, pictures))
            return read_masks(Path(folder))


def read_masks(folder: Path) -> dict[str, bytes]:
    """Masks that `mpm loadtest masks` wrote, by the names of their pictures; a ValueError if there is none."""
    masks = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    if not masks:
        raise ValueError(f"library-masks: expected what `mpm loadtest masks` writes in {folder}, got nothing")
    return masks


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as a command line has them."""
    return [text for name, value in options.items() for text in (f"--{name}", os.fspath(str(value)))]


def environment() -> dict[str, str]:
    """This process's environment, with this project where Python looks first."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_module(module: str, *arguments: str) -> None:
    """Run a module of this project in a process of its own.

    Raises:
        ValueError: it failed; the message is the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{module} {arguments[0]}: {ended.stderr.strip()[-500:] or f'status {ended.returncode}'}")


@click.command()
@click.argument("pictures", nargs=-1, type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="With variant.yml beside it.")
@click.option("--schedule", help="Blocks before which tokens merge (2,5), off, or a merger.")
@click.option("--align", type=int, help="Token counts after a merge are multiples of this (1).")
@click.option("--metrics", metavar="URL", help="Merge as this server's metrics say, where no option says it.")
@click.option("--inference", default="{}", metavar="JSON", help="Overrides of the checkpoint's own.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder.")
def command(pictures: Sequence[Path], checkpoint: Path, inference: str, out: Path, **merging: Any) -> None:
    """Write masks as the library makes them, to compare a server's with; of the painted scenes if no PICTURES are
    named."""
    from mpm_ops import load_segmenter  # torch: only here
    from mpm_ops.stages import parse_schedule

    if not pictures:
        ensure_pictures()
        pictures = list(weigh_pictures(PAINTED, {}))
    schedule, align = (merging[name] or served(name, merging["metrics"]) for name in ("schedule", "align"))
    plain = ":" not in schedule  # else it is another merger's text, with which servers name it
    chosen: Any = {"schedule": parse_schedule(schedule), "align": int(align)} if plain else {"merger": schedule}
    model = load_segmenter(checkpoint, **chosen, inference=json.loads(inference))
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(model.segment(read_frame(picture))).save(out / f"{picture.name}.png")
    click.echo(f"{len(pictures)} masks in {out}")


def served(name: str, metrics: str | None) -> str:
    """Schedule or align of a server, from `mpm_model_info` in its metrics; the library's own without a server."""
    if not metrics:
        return {"schedule": "2,5", "align": "1"}[name]
    found = read_metrics(metrics).labels("mpm_model_info", name)
    if len(found) != 1:
        raise ValueError(f"{name}: expected --{name}, or metrics (mpm_model_info) that name it, got {found or 'none'}")
    return found[0]
