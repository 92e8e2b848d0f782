"""Is an answer right? Masks under load are compared with those of the same pictures from the idle server, and these
with the library's.

    mpm loadtest masks --checkpoint checkpoint.pth [--schedule 2,5] [--align 1] --out FOLDER PICTURE...

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from handlers.client import Answer, NoAnswerError
from handlers.png import SIGNATURE, png_size

from .pictures import Item, read_frame
from .protocols import Servers

OK = "ok"


class MaskError(ValueError):
    """An answer is not what was asked for; the message says why in a few words that group well."""


class OtherImageError(ValueError):
    """An image, but not one of class ids; the message is its format and mode."""


@dataclass(frozen=True)
class Reference:
    """The mask of a picture, as an idle server gave it or the library made it.

    Attributes:
        png: class ids as palette or grey values.
    """

    png: bytes

    @cached_property
    def labels(self) -> np.ndarray:
        """[H, W] class ids."""
        return read_mask(self.png)

    @cached_property
    def areas(self) -> Mapping[int, int]:
        """Pixels by class."""
        ids, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def read_mask(png: bytes) -> np.ndarray:
    """Class ids [H, W] of a mask.

    Raises:
        MaskError: it is not a palette or grey PNG, or an index lies outside of the palette.
    """
    if png[:8] != SIGNATURE:
        raise MaskError("not a PNG")
    try:
        labels, colors = decode_mask(png)
    except OtherImageError as other:
        raise MaskError(f"a {other}, not of class ids") from None
    except OSError:
        raise MaskError("a broken PNG") from None
    if colors is not None and labels.max(initial=0) >= len(colors):
        raise MaskError("a class outside of the palette")
    return labels


def decode_mask(png: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Class ids [H, W] of a palette or grey PNG, and the palette's colours [K, 3]; None without a palette.

    Raises:
        OtherImageError: it is an image of another kind.
        OSError: it can't be read.
    """
    try:
        with Image.open(io.BytesIO(png)) as opened:
            if opened.format != "PNG" or opened.mode not in ("P", "L", "I", "I;16"):
                raise OtherImageError(f"{opened.format} of mode {opened.mode}")
            palette = opened.getpalette() if opened.mode == "P" else None
            labels = np.asarray(opened)
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    return labels, None if palette is None else np.asarray(palette, np.uint8).reshape(-1, 3)


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
        agreement = CHECKS[item.kind](item, answer.body, reference)
    except MaskError as error:
        return f"wrong: {error}", None
    if agreement is not None and agreement < min_agreement:
        return "wrong: another mask", agreement
    return OK, agreement


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
    labels = read_mask(body)
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
        areas = {entry["id"]: entry["area"] for entry in described["classes"]}
    except (ValueError, KeyError, TypeError):
        raise MaskError("not the JSON of a mask") from None
    if size != item.size:
        raise MaskError("another size than the picture")
    if sum(areas.values()) != size[0] * size[1]:
        raise MaskError("areas that do not fill the picture")
    if reference is None:
        return None
    shared = sum(min(area, reference.areas.get(index, 0)) for index, area in areas.items())
    return float(shared / (size[0] * size[1]))


Check = Callable[[Item, bytes, Reference | None], float | None]
CHECKS: Mapping[str, Check] = {"png": _check_png, "raw": _check_png, "json": _check_json}


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
                    said = "" if answer.status == 200 else f": {answer.body[:200]!r}"
                    raise MaskError(f"{where}: {outcome}{said}")
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
    """The model as the library runs it, with which a server has to agree.

    Attributes:
        checkpoint: checkpoint.pth with its variant.yml beside it.
        schedule: blocks before which tokens merge (2,5), or off.
        align: token counts after a merge are multiples of this.
        inference: fields of the checkpoint's inference that the server overrides.
    """

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
            flags = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
            run_module("loadtest", "masks", *flags, *map(str, pictures))
            return read_masks(Path(folder))


def read_masks(folder: Path) -> dict[str, bytes]:
    """Masks that `mpm loadtest masks` wrote, by the names of their pictures.

    Raises:
        ValueError: there is none.
    """
    masks = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    if not masks:
        raise ValueError(f"library-masks: expected what `mpm loadtest masks` writes in {folder}, got nothing")
    return masks


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
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="With variant.yml beside it.")
@click.option(
    "--schedule", default="2,5", show_default=True, help="Blocks before which tokens merge, off, or a merger."
)
@click.option("--align", default=1, show_default=True, help="Token counts after a merge are multiples of this.")
@click.option("--inference", default="{}", metavar="JSON", help="Overrides of the checkpoint's own.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder.")
def command(
    pictures: tuple[Path, ...], checkpoint: Path, schedule: str, align: int, inference: str, out: Path
) -> None:
    """Write masks as the library makes them, to compare a server's with."""
    from mpm_ops import load_segmenter  # torch: only here
    from mpm_ops.stages import parse_schedule

    plain = ":" not in schedule  # else it is another merger's text, with which servers name it
    merging: Any = {"schedule": parse_schedule(schedule), "align": align} if plain else {"merger": schedule}
    model = load_segmenter(checkpoint, **merging, inference=json.loads(inference))
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(model.segment(read_frame(picture))).save(out / f"{picture.name}.png")
    click.echo(f"{len(pictures)} masks in {out}")
