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

import csv
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageOps

from handlers.client import NoAnswerError, connect

from .checks import parse_pairs
from .masks import OtherImageError, decode_mask

_DISAGREEMENT = (255, 0, 0)
_PANEL_HEIGHT = 480
_MOST_MESSAGE = 200  # characters of what a server said
_LIMITS = {"agreement": min, "worst_agreement": min, "p50_ratio": max, "p99_ratio": max, "errors": max}
_MOST_LISTED = 5  # pictures
_ANSWERS_FOR_P99 = 300
_ERRORS = {"only new": "errors", "only old": "errors_of_old", "both": "errors_of_both"}
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")


def parse_limits(text: str) -> dict[str, float]:
    """`agreement=0.99,errors=0` -> {"agreement": 0.99, "errors": 0.0}.

    Raises:
        ValueError: a name or a number is not one.
    """
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


@dataclass(frozen=True, slots=True)
class Reply:
    """A deployment's answer to one picture.

    Attributes:
        seconds: from sending it to having all of the answer.
        labels: class ids [H, W]; None if there is no mask.
        colors: RGB of every class [K, 3], as the mask's palette has them; None without a palette.
        error: why there is no mask; empty if there is one.
    """

    seconds: float
    labels: np.ndarray | None = None
    colors: np.ndarray | None = None
    error: str = ""


class Deployment:
    """A model behind a URL, asked for one mask at a time.

    Args:
        role: its name in messages.
        headers: sent with every request; a gateway's key, or options such as X-MPM-Schedule.

    Raises:
        ValueError: the URL is not one of a model.
    """

    def __init__(self, role: str, url: str, headers: Mapping[str, str], timeout_seconds: float) -> None:
        try:
            self._client = connect(url)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None
        self._headers, self._timeout_seconds = dict(headers), timeout_seconds

    def ask(self, picture: bytes) -> Reply:
        """The picture's mask, or why there is none; never raises for what a server does."""
        start = time.monotonic()
        try:
            answer = self._client.ask(picture, headers=self._headers, timeout_seconds=self._timeout_seconds)
        except TimeoutError:
            return Reply(time.monotonic() - start, error=f"no answer within {self._timeout_seconds:g} s")
        except NoAnswerError as error:
            return Reply(time.monotonic() - start, error=f"no answer: {error}")
        seconds = time.monotonic() - start
        if answer.status != 200:
            said = " ".join(answer.body.decode(errors="replace").split())[:_MOST_MESSAGE]
            return Reply(seconds, error=f"status {answer.status}: {said}")
        try:
            return Reply(seconds, *decode_mask(answer.body))
        except OtherImageError as other:
            got = str(other)
        except OSError:
            got = repr(answer.body[:20])
        return Reply(seconds, error=f"expected a PNG of class ids, got {got}")

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True, slots=True)
class Compared:
    """One picture on both deployments.

    Attributes:
        agreement: share of its pixels with the same class; None unless both gave masks of one size.
        old_error, new_error: why one gave no mask, or not one of the other's size.
        old_ms, new_ms: of every repeat that was answered.
    """

    name: str
    agreement: float | None
    pixels: int
    old_error: str
    new_error: str
    old_ms: tuple[float, ...]
    new_ms: tuple[float, ...]


@dataclass(slots=True)
class Comparison:
    """Everything seen so far; `pairs` counts pixels by class of the old and of the new mask."""

    pictures: list[Compared] = field(default_factory=list)
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    def summary(self) -> dict[str, float]:
        """The figures that limits can be set on, and counts.

        Raises:
            ValueError: no picture has a mask from both.
        """
        compared = [picture for picture in self.pictures if picture.agreement is not None]
        if not compared:
            raise ValueError(f"no picture could be compared; {self._first_failure()}")
        pixels = sum(self.pairs.values())
        old, new = ([ms for picture in compared for ms in getattr(picture, f"{role}_ms")] for role in ("old", "new"))
        ms = {
            f"{role}_p{q}_ms": float(np.percentile(each, q))
            for role, each in (("old", old), ("new", new))
            for q in (50, 99)
        }
        return {
            "agreement": sum(count for (before, after), count in self.pairs.items() if before == after) / pixels,
            "worst_agreement": min(picture.agreement or 0.0 for picture in compared),
            "p50_ratio": ms["new_p50_ms"] / ms["old_p50_ms"],
            "p99_ratio": ms["new_p99_ms"] / ms["old_p99_ms"],
            "errors": sum(bool(picture.new_error and not picture.old_error) for picture in self.pictures),
            "errors_of_old": sum(bool(picture.old_error and not picture.new_error) for picture in self.pictures),
            "errors_of_both": sum(bool(picture.old_error and picture.new_error) for picture in self.pictures),
            "compared": len(compared),
            "answers": len(new),
            **ms,
        }

    def classes(self) -> list[dict[str, Any]]:
        """Per class, most pixels first: its pixels before and after, their overlap, and where most that left went."""
        before, after, left = Counter[int](), Counter[int](), dict[int, Counter[int]]()
        for (old, new), count in self.pairs.items():
            before[old] += count
            after[new] += count
            if old != new:
                left.setdefault(old, Counter())[new] += count
        found = []
        for index in sorted(before.keys() | after.keys(), key=lambda index: -before[index]):
            shared = self.pairs[index, index]
            went = left[index].most_common(1)[0] if index in left else None
            found.append(
                {
                    "class": index,
                    "old_pixels": before[index],
                    "new_pixels": after[index],
                    "overlap": shared / (before[index] + after[index] - shared),
                    "went_to": went[0] if went else None,
                    "went_share": went[1] / before[index] if went else 0.0,
                }
            )
        return found

    def _first_failure(self) -> str:
        first = self.pictures[0]
        return f"{first.name}: old {first.old_error or 'answered'}; new {first.new_error or 'answered'}"


def compare_picture(
    name: str, old: Sequence[Reply], new: Sequence[Reply], pairs: Counter[tuple[int, int]]
) -> Compared:
    """Compare the last answers of both, and add their pixels to `pairs`; any failed repeat fails the picture."""
    old_error, new_error = (next((answer.error for answer in answers if answer.error), "") for answers in (old, new))
    before, after = old[-1].labels, new[-1].labels
    agreement, pixels = None, 0
    if not old_error and not new_error and before is not None and after is not None:
        if before.shape != after.shape:
            sizes = (f"{mask.shape[1]}x{mask.shape[0]}" for mask in (before, after))
            new_error = "a mask of another size: old {}, new {}".format(*sizes)
        else:
            agreement, pixels = float((before == after).mean()), before.size
            both = before.astype(np.int64).ravel() << 16 | after.ravel()
            for pair, count in zip(*np.unique(both, return_counts=True), strict=True):
                pairs[int(pair) >> 16, int(pair) & 0xFFFF] += int(count)
    times = [tuple(round(1000 * answer.seconds, 3) for answer in each if not answer.error) for each in (old, new)]
    return Compared(name, agreement, pixels, old_error, new_error, times[0], times[1])


class Worst:
    """Keeps the pictures that agree least."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[float, Path, Reply, Reply]] = []

    def offer(self, agreement: float, file: Path, old: Reply, new: Reply) -> None:
        self._kept.append((agreement, file, old, new))
        self._kept.sort(key=lambda kept: kept[0])
        del self._kept[self._most :]

    def write(self, folder: Path) -> list[Path]:
        """One PNG for each: the picture, the old mask, the new mask, and in red where they differ."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for i, (agreement, file, old, new) in enumerate(self._kept, 1):
            written.append(folder / f"{i:02d}-{agreement:.4f}-{file.stem}.png")
            _draw(file, old, new).save(written[-1])
        return written


def _draw(file: Path, old: Reply, new: Reply) -> Image.Image:
    assert old.labels is not None
    assert new.labels is not None
    height, width = old.labels.shape
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB").resize((width, height))
    except OSError:  # a raw frame
        picture = Image.new("RGB", (width, height))
    differs = np.asarray(picture.convert("L").convert("RGB")) // 2 + 64
    differs[old.labels != new.labels] = _DISAGREEMENT
    panels = [picture, *(Image.fromarray(_painted(answer)) for answer in (old, new)), Image.fromarray(differs)]
    scale = min(1.0, _PANEL_HEIGHT / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = Image.new("RGB", (len(panels) * size[0], size[1]))
    for i, panel in enumerate(panels):
        sheet.paste(panel.resize(size, Image.Resampling.NEAREST), (i * size[0], 0))
    return sheet


def _painted(answer: Reply) -> np.ndarray:
    assert answer.labels is not None
    if answer.colors is None:
        return np.repeat((answer.labels % 256).astype(np.uint8)[..., None], 3, axis=2)
    return answer.colors[np.minimum(answer.labels, len(answer.colors) - 1)]


def compare(
    old: Deployment, new: Deployment, files: Sequence[Path], repeats: int, worst: Worst | None = None
) -> Comparison:
    """Ask both for every picture, taking turns at who is first, because the second finds warmer caches."""
    found = Comparison()
    for deployment in (old, new):
        deployment.ask(files[0].read_bytes())  # opens the connection
    for i, file in enumerate(files):
        picture = file.read_bytes()
        answers: dict[Deployment, list[Reply]] = {old: [], new: []}
        for repeat in range(repeats):
            for deployment in (old, new) if (i + repeat) % 2 == 0 else (new, old):
                answers[deployment].append(deployment.ask(picture))
        compared = compare_picture(file.name, answers[old], answers[new], found.pairs)
        found.pictures.append(compared)
        if worst and compared.agreement is not None and compared.agreement < 1:
            worst.offer(compared.agreement, file, answers[old][-1], answers[new][-1])
    return found


def judge(summary: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every limit with what was found and whether it holds."""
    return [
        {"name": name, "limit": limit, "found": summary[name], "holds": _LIMITS[name](summary[name], limit) == limit}
        for name, limit in limits.items()
    ]


def sample_files(folder: Path, number: int, seed: int) -> list[Path]:
    """So many files of a folder at random, all of them for 0, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise ValueError(f"images: expected a folder with pictures, got {folder}")
    return sorted(random.Random(seed).sample(files, number)) if 0 < number < len(files) else files


def read_class_names(file: Path | None) -> dict[int, str]:
    """Names by class id from `index,name,...`.

    Raises:
        ValueError: the file is not of that form.
    """
    if file is None:
        return {}
    try:
        with file.open(newline="") as lines:
            return {int(row["index"]): row["name"] for row in csv.DictReader(lines)}
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"classes: expected CSV with the columns index and name, got {file}") from None


def print_report(found: Comparison, summary: Mapping[str, float], names: Mapping[int, str]) -> None:
    """Counts, masks, latencies, the classes that changed, the worst pictures and everything that failed."""
    print(f"{len(found.pictures)} pictures, {summary['compared']} compared, {summary['answers']} answers of each")
    print(f"masks    agreement {summary['agreement']:.6f}   worst picture {summary['worst_agreement']:.6f}")
    for q in (50, 99):
        old, new = summary[f"old_p{q}_ms"], summary[f"new_p{q}_ms"]
        print(f"p{q}      old {old:9.1f} ms   new {new:9.1f} ms   ratio {summary[f'p{q}_ratio']:.3f}")
    if summary["answers"] < _ANSWERS_FOR_P99:
        print(f"         (p99 of {summary['answers']} answers is about the slowest of them)")
    errors = (f"{which} {summary[name]}" for which, name in _ERRORS.items())
    print(f"errors   {'   '.join(errors)}")
    changed = [row for row in found.classes() if row["overlap"] < 1]
    if changed:
        print("\nclass                  old pixels   new pixels   overlap   most that left went to")
    for row in changed:
        went = row["went_to"]
        told = "" if went is None else f"{_class_name(went, names)}, {100 * row['went_share']:.2f} %"
        label = _class_name(row["class"], names)
        print(f"{label:<20} {row['old_pixels']:12,} {row['new_pixels']:12,}   {row['overlap']:.5f}   {told}")
    worst = sorted((p for p in found.pictures if p.agreement is not None and p.agreement < 1), key=_agreement)
    for picture in worst[:_MOST_LISTED]:
        print(f"{'worst' if picture is worst[0] else '     '}    {picture.agreement:.6f}  {picture.name}")
    failed = [picture for picture in found.pictures if picture.old_error or picture.new_error]
    for picture in failed[:_MOST_LISTED]:
        for role, error in (("old", picture.old_error), ("new", picture.new_error)):
            if error:
                print(f"failed   {picture.name}: {role}: {error}")
    if len(failed) > _MOST_LISTED:
        print(f"         and {len(failed) - _MOST_LISTED} more; --out has all")


def _agreement(picture: Compared) -> float:
    return picture.agreement or 0.0


def _class_name(index: int, names: Mapping[int, str]) -> str:
    return f"{index} {names[index]}"[:20] if index in names else str(index)


def _headers(texts: Sequence[str]) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise ValueError(f"header: expected NAME:VALUE, got {text!r}")
        headers[name] = value.strip()
    return headers


@click.command()
@click.option("--old", "old_url", required=True, metavar="URL", help="Of the model that serves now.")
@click.option("--new", "new_url", required=True, metavar="URL", help="Of the model that shall replace it.")
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of pictures.")
@click.option("--sample", default=100, show_default=True, help="Pictures of it, at random; 0 takes all.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--repeats", default=3, show_default=True, help="Times each picture is asked for.")
@click.option("--timeout", default=60.0, show_default=True, metavar="SECONDS", help="Of a request.")
@click.option("--limit", default="", help=f"NAME=NUMBER,... of {', '.join(_LIMITS)}.")
@click.option("--header", multiple=True, metavar="NAME:VALUE", help="Sent to both; repeatable.")
@click.option("--old-header", multiple=True, metavar="NAME:VALUE", help="Sent to the old one; repeatable.")
@click.option("--new-header", multiple=True, metavar="NAME:VALUE", help="Sent to the new one; repeatable.")
@click.option("--classes", type=click.Path(path_type=Path), help="classes.csv, for names in the table.")
@click.option("--out", type=click.Path(path_type=Path), help="Write everything as JSON.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder to draw the worst disagreements into.")
@click.option("--worst", default=5, show_default=True, help="How many of them.")
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
    classes: Path | None,
    out: Path | None,
    pictures: Path | None,
    worst: int,
) -> int:
    """Send the same pictures to two deployments, in turn, and compare masks and latencies."""
    limits = parse_limits(limit)
    for name, value, minimum in (("sample", sample, 0), ("repeats", repeats, 1), ("worst", worst, 1)):
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: expected seconds > 0, got {timeout:g}")
    names = read_class_names(classes)
    files = sample_files(images, sample, seed)
    old = Deployment("old", old_url, _headers(header) | _headers(old_header), timeout)
    new = Deployment("new", new_url, _headers(header) | _headers(new_header), timeout)
    kept = Worst(worst) if pictures else None
    found = compare(old, new, files, repeats, kept)
    for deployment in (old, new):
        deployment.close()
    summary = found.summary()
    judged = judge(summary, limits)
    print_report(found, summary, names)
    for each in judged:
        verdict = "holds" if each["holds"] else "DOES NOT HOLD"
        print(f"limit    {each['name']} {each['limit']:g}: {each['found']:.6g}, {verdict}")
    for picture in kept.write(pictures) if kept and pictures else []:
        print(f"wrote    {picture}")
    if out:
        report = {
            "old": old_url,
            "new": new_url,
            "summary": summary,
            "limits": judged,
            "classes": [row | {"name": names.get(row["class"])} for row in found.classes()],
            "pictures": [asdict(picture) for picture in found.pictures],
        }
        out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(each["holds"] for each in judged) else 1
