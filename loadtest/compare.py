"""Is a new deployment as good as the old one? The same pictures go to both, in turn, and their masks are compared.

    mpm loadtest compare --old URL --new URL --images FOLDER [--sample 100] [--repeats 3]
        [--limit agreement=0.99,p99_ratio=1.2,errors=0] [--out X.json] [--pictures FOLDER]

URL is a model's: http://HOST:PORT/predictions/NAME (TorchServe), .../v2/models/NAME or .../v2/models/NAME/versions/2
(Triton), https too, or grpc://HOST:PORT/NAME. One request is in flight at a time, so latencies are those of a lone
request on deployments that may have other load. This judges a canary before more traffic goes to it: exit status 0, 1
if a limit does not hold, 2 if nothing could be compared.

Limits: agreement (share of all pixels with the same class, at least), worst_agreement (of a single picture, at least),
p50_ratio and p99_ratio (new over old, at most), errors (answers that only the old one gave, at most).
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from handlers.client import NoAnswerError, Transport, connect

from .checks import parse_pairs
from .masks import MaskError, read_mask
from .pictures import draw_sample, read_frame

_LIMITS = {"agreement": min, "worst_agreement": min, "p50_ratio": max, "p99_ratio": max, "errors": max}
_MOST_MESSAGE = 200  # characters of what a server said
_MOST_LISTED = 5  # pictures


def parse_limits(text: str) -> dict[str, float]:
    """`agreement=0.99,errors=0` -> {"agreement": 0.99, "errors": 0.0}; a ValueError if a name or number is not one."""
    limits = {}
    for name, value in parse_pairs("limit", text).items():
        if name not in _LIMITS:
            raise ValueError(f"limit: expected NAME=NUMBER with a name of {', '.join(_LIMITS)}, got {name}={value}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] >= 0:
            raise ValueError(f"limit: {name}: expected a number >= 0, got {value!r}")
    return limits


def judge(summary: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every limit with what was found and whether it holds."""
    return [
        {"name": name, "limit": limit, "found": summary[name], "holds": _LIMITS[name](summary[name], limit) == limit}
        for name, limit in limits.items()
    ]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model behind a URL, asked for one mask at a time; headers are sent with every request."""

    client: Transport
    headers: Mapping[str, str]
    timeout_seconds: float

    @classmethod
    def connect(cls, role: str, url: str, headers: Sequence[str], timeout_seconds: float) -> "Deployment":
        """Raises a ValueError if the URL is not one of a model, or a header is none; it names the role."""
        try:
            return cls(connect(url), dict(map(_header, headers)), timeout_seconds)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None

    def ask(self, picture: bytes) -> "Reply":
        """The picture's mask, or why there is none; never raises for what a server does."""
        start, error, mask = time.monotonic(), "", (None, None)
        try:
            answer = self.client.ask(picture, headers=self.headers, timeout_seconds=self.timeout_seconds)
            seconds = time.monotonic() - start
            if answer.status == 200:
                mask = read_mask(answer.body)  # type: ignore[assignment]
            else:
                said = " ".join(answer.body.decode(errors="replace").split())[:_MOST_MESSAGE]
                error = f"status {answer.status}: {said}"
        except MaskError as wrong:
            error = f"expected a mask, got {wrong}: {answer.body[:20]!r}"
        except TimeoutError:
            seconds, error = time.monotonic() - start, f"no answer within {self.timeout_seconds:g} s"
        except NoAnswerError as none:
            seconds, error = time.monotonic() - start, f"no answer: {none}"
        return Reply(round(1000 * seconds, 3), *mask, error)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to one picture, or why there is no mask: milliseconds, class ids [H, W], a palette [K, 3] or None."""

    ms: float
    labels: np.ndarray | None
    colors: np.ndarray | None
    error: str = ""


@dataclass(slots=True)
class Compared:
    """One picture on both deployments, by the last of its answers; any failed repeat fails the picture.

    Attributes:
        old, new: answers, one a repeat.
        counts: pixels by class of the old mask and of the new one [K, K]; None unless both gave masks of one size.
        errors: why the old one, and why the new one, gave no mask, or not one of the other's size.
    """

    file: Path
    old: Sequence[Reply]
    new: Sequence[Reply]
    counts: np.ndarray | None = None
    errors: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        old_error, new_error = (next((r.error for r in each if r.error), "") for each in (self.old, self.new))
        before, after = self.old[-1].labels, self.new[-1].labels
        if not old_error and not new_error and before is not None and after is not None:
            if before.shape == after.shape:
                number = 1 + max(int(before.max()), int(after.max()))
                pairs = before.astype(np.int64).ravel() * number + after.ravel()
                self.counts = np.bincount(pairs, minlength=number * number).reshape(number, number)
            else:
                sizes = (f"{mask.shape[1]}x{mask.shape[0]}" for mask in (before, after))
                new_error = "a mask of another size: old {}, new {}".format(*sizes)
        self.errors = (old_error, new_error)

    @property
    def agreement(self) -> float | None:
        """Share of its pixels with the same class."""
        return None if self.counts is None else float(np.trace(self.counts) / self.counts.sum())

    def described(self) -> dict[str, Any]:
        times = {f"{role}_ms": [r.ms for r in each if not r.error]
                 for role, each in (("old", self.old), ("new", self.new))}  # fmt: skip
        errors = {"old_error": self.errors[0], "new_error": self.errors[1]}
        return {"name": self.file.name, "agreement": self.agreement, **errors, **times}


def compare(old: Deployment, new: Deployment, files: Sequence[Path], repeats: int) -> list[Compared]:
    """Ask both for every picture, taking turns at who is first, because the second finds warmer caches."""
    for deployment in (old, new):
        deployment.ask(files[0].read_bytes())  # opens the connection
    found = []
    for i, file in enumerate(files):
        picture = file.read_bytes()
        answers: dict[str, list[Reply]] = {"old": [], "new": []}
        for repeat in range(repeats):
            turns = [("old", old), ("new", new)]
            for role, deployment in turns if (i + repeat) % 2 == 0 else reversed(turns):
                answers[role].append(deployment.ask(picture))
        compared = Compared(file, answers["old"], answers["new"])
        if compared.agreement == 1:  # nothing of it will be drawn
            compared.old, compared.new = ([Reply(r.ms, None, None) for r in each] for each in answers.values())
        found.append(compared)
    return found


def summarize(pictures: Sequence[Compared]) -> dict[str, Any]:
    """The figures that limits can be set on, counts, and the classes; a ValueError if nothing could be compared."""
    compared = [picture for picture in pictures if picture.counts is not None]
    if not compared:
        errors = (error or "answered" for error in pictures[0].errors)
        raise ValueError("no picture could be compared; {}: old {}; new {}".format(pictures[0].file.name, *errors))
    number = max(len(picture.counts) for picture in compared if picture.counts is not None)
    counts = np.zeros((number, number), np.int64)
    for picture in compared:
        assert picture.counts is not None
        counts[: len(picture.counts), : len(picture.counts)] += picture.counts
    ms = {role: [r.ms for picture in compared for r in getattr(picture, role)] for role in ("old", "new")}
    quantiles = {f"{role}_p{q}_ms": float(np.percentile(ms[role], q)) for role in ms for q in (50, 99)}
    only_old, only_new = [(True, False), (False, True)]
    failed = [tuple(map(bool, picture.errors)) for picture in pictures]
    before, after, shared = counts.sum(1), counts.sum(0), np.diag(counts)
    rows = zip(
        before.tolist(), after.tolist(), (shared / np.maximum(before + after - shared, 1)).tolist(), strict=True
    )
    keys = ("class", "old_pixels", "new_pixels", "overlap")
    return {
        "agreement": float(shared.sum() / counts.sum()),
        "worst_agreement": min(picture.agreement or 0.0 for picture in compared),
        **{f"p{q}_ratio": quantiles[f"new_p{q}_ms"] / quantiles[f"old_p{q}_ms"] for q in (50, 99)},
        "errors": failed.count(only_new),
        "errors_of_old": failed.count(only_old),
        "errors_of_both": failed.count((True, True)),
        "compared": len(compared),
        "answers": len(ms["new"]),
        **quantiles,
        "classes": [dict(zip(keys, (i, *row), strict=True)) for i, row in enumerate(rows) if row[0] or row[1]],
    }


def draw(picture: Compared) -> Image.Image:
    """Side by side: the picture, the old mask, the new mask, and in red where they differ."""
    old, new = picture.old[-1], picture.new[-1]
    assert old.labels is not None
    assert new.labels is not None
    height, width = old.labels.shape
    try:
        frame = Image.fromarray(read_frame(picture.file)).resize((width, height))
    except ValueError:  # a raw frame
        frame = Image.new("RGB", (width, height))
    differs = np.asarray(frame.convert("L").convert("RGB")) // 2 + 64
    differs[old.labels != new.labels] = (255, 0, 0)
    grey = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    painted = [(grey if r.colors is None else r.colors)[r.labels % 256] for r in (old, new)]  # type: ignore[operator]
    return Image.fromarray(np.concatenate([np.asarray(frame), *painted, differs], axis=1))


def print_report(pictures: Sequence[Compared], summary: Mapping[str, Any]) -> None:
    """Counts, masks, latencies, the classes that changed, the worst pictures and everything that failed."""
    print(f"{len(pictures)} pictures, {summary['compared']} compared, {summary['answers']} answers of each")
    print(f"masks    agreement {summary['agreement']:.6f}   worst picture {summary['worst_agreement']:.6f}")
    for q in (50, 99):
        old, new = summary[f"old_p{q}_ms"], summary[f"new_p{q}_ms"]
        print(f"p{q}      old {old:9.1f} ms   new {new:9.1f} ms   ratio {summary[f'p{q}_ratio']:.3f}")
    print("errors   only new {errors}   only old {errors_of_old}   both {errors_of_both}".format(**summary))
    for row in summary["classes"]:
        if row["overlap"] < 1:
            print(
                "class    {class:3}  old {old_pixels:12,}  new {new_pixels:12,}  overlap {overlap:.5f}".format(**row)
            )
    for picture in worst(pictures)[:_MOST_LISTED]:
        print(f"worst    {picture.agreement:.6f}  {picture.file.name}")
    failed = [
        (p.file.name, role, error) for p in pictures for role, error in zip(("old", "new"), p.errors, strict=True)
    ]
    failed = [each for each in failed if each[2]]
    for name, role, error in failed[: 2 * _MOST_LISTED]:
        print(f"failed   {name}: {role}: {error}")
    if len(failed) > 2 * _MOST_LISTED:
        print(f"         and {len(failed) - 2 * _MOST_LISTED} more; --out has all")


def worst(pictures: Sequence[Compared]) -> list[Compared]:
    """Those that differ, the least alike first."""
    differ = [picture for picture in pictures if picture.agreement is not None and picture.agreement < 1]
    return sorted(differ, key=lambda picture: picture.agreement or 0.0)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9-]+", name) or not (value.isascii() and value.isprintable()):
        raise ValueError(f"header: expected NAME:VALUE, got {text!r}")
    return name, value.strip()


@click.command()
@click.option("--old", "old_url", required=True, metavar="URL", help="Of the model that serves now.")
@click.option("--new", "new_url", required=True, metavar="URL", help="Of the model that shall replace it.")
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of pictures.")
@click.option("--sample", default=100, type=click.IntRange(0), show_default=True, help="At random; 0 takes all.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--repeats", default=3, type=click.IntRange(1), show_default=True, help="Of each picture.")
@click.option("--timeout", default=60.0, type=click.FloatRange(0, min_open=True), show_default=True, help="Seconds.")
@click.option("--limit", default="", help=f"NAME=NUMBER,... of {', '.join(_LIMITS)}.")
@click.option("--header", multiple=True, metavar="NAME:VALUE", help="Sent to both; repeatable.")
@click.option("--old-header", multiple=True, metavar="NAME:VALUE", help="Sent to the old one; repeatable.")
@click.option("--new-header", multiple=True, metavar="NAME:VALUE", help="Sent to the new one; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Write everything as JSON.")
@click.option("--pictures", "drawn", type=click.Path(path_type=Path), help="Folder to draw the five worst into.")
def command(
    old_url: str,
    new_url: str,
    images: Path,
    sample: int,
    seed: int,
    repeats: int,
    timeout: float,
    limit: str,
    header: Sequence[str],
    old_header: Sequence[str],
    new_header: Sequence[str],
    out: Path | None,
    drawn: Path | None,
) -> int:
    """Send the same pictures to two deployments, in turn, and compare masks and latencies."""
    limits = parse_limits(limit)
    files = sorted(path for path in images.rglob("*") if path.is_file()) if images.is_dir() else []
    if not files:
        raise ValueError(f"images: expected a folder with pictures, got {images}")
    old = Deployment.connect("old", old_url, [*header, *old_header], timeout)
    new = Deployment.connect("new", new_url, [*header, *new_header], timeout)
    with old.client, new.client:
        pictures = compare(old, new, draw_sample(files, sample or len(files), seed), repeats)
    summary = summarize(pictures)
    judged = judge(summary, limits)
    print_report(pictures, summary)
    for each in judged:
        verdict = "holds" if each["holds"] else "DOES NOT HOLD"
        print(f"limit    {each['name']} {each['limit']:g}: {each['found']:.6g}, {verdict}")
    for i, picture in enumerate(worst(pictures)[:_MOST_LISTED] if drawn else (), 1):
        assert drawn
        drawn.mkdir(parents=True, exist_ok=True)
        draw(picture).save(drawn / f"{i:02d}-{picture.agreement:.4f}-{picture.file.stem}.png")
    if out:
        report = {"old": old_url, "new": new_url, "summary": summary, "limits": judged}
        report["pictures"] = [picture.described() for picture in pictures]
        out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(each["holds"] for each in judged) else 1
