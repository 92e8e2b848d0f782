"""Is a new deployment as good as the old one? The same pictures go to both, in turn, and their masks are compared.

    python -m loadtest.compare --old URL --new URL --images FOLDER [--sample 100] [--repeats 3]
        [--limit agreement=0.99,p99_ratio=1.2,errors=0] [--out X.json] [--pictures FOLDER]

URL is a model's: http://HOST:PORT/predictions/NAME (TorchServe), .../v2/models/NAME or .../v2/models/NAME/versions/2
(Triton), https too. One request is under way at a time, so latencies are those of a lone request on deployments that
may have other load. This judges a canary before more traffic goes to it: exit status 0, 1 if a limit does not hold,
2 if nothing could be compared.

Limits: agreement (share of all pixels with the same class, at least), worst_agreement (of a single picture, at least),
p50_ratio and p99_ratio (new over old, at most), errors (answers that only the old one gave, at most).
"""

import argparse
import csv
import http.client
import io
import json
import math
import random
import re
import select
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_MODEL_PATH = re.compile(r".*/(?:predictions/[^/]+|v2/models/[^/]+(?:/versions/[^/]+)?)")
_LIMITS = {"agreement": min, "worst_agreement": min, "p50_ratio": max, "p99_ratio": max, "errors": max}
_DISAGREEMENT = (255, 0, 0)
_PANEL_HEIGHT = 480
_MOST_MESSAGE = 200  # characters of what a server said
_MOST_LISTED = 5  # pictures
_ANSWERS_FOR_P99 = 300
_ERRORS = {"only new": "errors", "only old": "errors_of_old", "both": "errors_of_both"}
_NOT_COMPARED = 2  # exit status
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")


class CompareError(ValueError):
    """What was asked for can't be compared; the message says why in a line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a deployment made of a picture.

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
    """A model behind a URL. It keeps one connection and never asks twice.

    Args:
        role: what to call it in messages.
        headers: sent with every request; a gateway's key, or options such as X-MPM-Schedule.

    Raises:
        CompareError: the URL is not one of a model.
    """

    def __init__(self, role: str, url: str, headers: Mapping[str, str], timeout_seconds: float) -> None:
        parts = urllib.parse.urlsplit(url.removesuffix("/infer"))
        try:
            port = parts.port
        except ValueError:
            port = -1
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or port == -1
            or not _MODEL_PATH.fullmatch(parts.path)
            or parts.query
        ):
            raise CompareError(
                f"{role}: expected http(s)://HOST:PORT/predictions/NAME or .../v2/models/NAME, got {url!r}"
            )
        self.url = url
        self._is_triton = "/v2/models/" in parts.path
        self._path = parts.path + ("/infer" if self._is_triton else "")
        self._headers = {"Content-Type": "application/octet-stream", "Accept": "image/png", **headers}
        if self._is_triton:
            self._headers |= {"Inference-Header-Content-Length": "0", "X-MPM-Outputs": "MASK_PNG"}
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._timeout_seconds = timeout_seconds
        self._connection = make(parts.hostname, port, timeout=timeout_seconds)

    def ask(self, picture: bytes) -> Answer:
        """The picture's mask, or why there is none; never raises for what a server does."""
        if self._connection.sock is not None and select.select([self._connection.sock], [], [], 0)[0]:
            self._connection.close()  # the server ended it meanwhile
        start = time.monotonic()
        try:
            self._connection.request("POST", self._path, picture, self._headers)
            response = self._connection.getresponse()
            body = response.read()
        except TimeoutError:
            self._connection.close()
            return Answer(time.monotonic() - start, error=f"no answer within {self._timeout_seconds:g} s")
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Answer(time.monotonic() - start, error=f"no answer: {error or type(error).__name__}")
        seconds = time.monotonic() - start
        if response.status != 200:
            said = " ".join(body.decode(errors="replace").split())[:_MOST_MESSAGE]
            return Answer(seconds, error=f"status {response.status}: {said}")
        if self._is_triton:
            described = response.headers.get("Inference-Header-Content-Length", "0")
            body = body[int(described) + 4 if described.isdecimal() else 0 :]  # 4 bytes are the value's length
        try:
            return Answer(seconds, *_read_mask(body))
        except CompareError as error:
            return Answer(seconds, error=str(error))

    def close(self) -> None:
        self._connection.close()


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
            CompareError: no picture has a mask from both.
        """
        compared = [picture for picture in self.pictures if picture.agreement is not None]
        if not compared:
            raise CompareError(f"no picture could be compared; {self._first_failure()}")
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
    name: str, old: Sequence[Answer], new: Sequence[Answer], pairs: Counter[tuple[int, int]]
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


def compare(
    old: Deployment, new: Deployment, files: Sequence[Path], repeats: int, worst: "Worst | None" = None
) -> Comparison:
    """Ask both for every picture, taking turns at who is first, because the second finds warmer caches."""
    found = Comparison()
    for deployment in (old, new):
        deployment.ask(files[0].read_bytes())  # opens the connection
    for i, file in enumerate(files):
        picture = file.read_bytes()
        answers: dict[Deployment, list[Answer]] = {old: [], new: []}
        for repeat in range(repeats):
            for deployment in (old, new) if (i + repeat) % 2 == 0 else (new, old):
                answers[deployment].append(deployment.ask(picture))
        compared = compare_picture(file.name, answers[old], answers[new], found.pairs)
        found.pictures.append(compared)
        if worst and compared.agreement is not None and compared.agreement < 1:
            worst.offer(compared.agreement, file, answers[old][-1], answers[new][-1])
    return found


class Worst:
    """Keeps the pictures that agree least."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[float, Path, Answer, Answer]] = []

    def offer(self, agreement: float, file: Path, old: Answer, new: Answer) -> None:
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


def _draw(file: Path, old: Answer, new: Answer) -> Image.Image:
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


def _painted(answer: Answer) -> np.ndarray:
    assert answer.labels is not None
    if answer.colors is None:
        return np.repeat((answer.labels % 256).astype(np.uint8)[..., None], 3, axis=2)
    return answer.colors[np.minimum(answer.labels, len(answer.colors) - 1)]


def _read_mask(png: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Class ids and colours of a mask."""
    try:
        with Image.open(io.BytesIO(png)) as opened:
            if opened.format != "PNG" or opened.mode not in ("P", "L", "I", "I;16"):
                raise CompareError(f"expected a PNG of class ids, got {opened.format} of mode {opened.mode}")
            palette = opened.getpalette() if opened.mode == "P" else None
            labels = np.asarray(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise CompareError(f"expected a PNG of class ids, got {png[:20]!r}") from None
    return labels, None if palette is None else np.asarray(palette, np.uint8).reshape(-1, 3)


def parse_limits(text: str) -> dict[str, float]:
    """`agreement=0.99,errors=0` -> {"agreement": 0.99, "errors": 0.0}.

    Raises:
        CompareError: a name or a number is not one.
    """
    limits = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in _LIMITS or not equals:
            raise CompareError(f"limit: expected NAME=NUMBER with a name of {', '.join(_LIMITS)}, got {part!r}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] >= 0:
            raise CompareError(f"limit: {name}: expected a number >= 0, got {value!r}")
    return limits


def judge(summary: Mapping[str, float], limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every limit with what was found and whether it holds."""
    return [
        {"name": name, "limit": limit, "found": summary[name], "holds": _LIMITS[name](summary[name], limit) == limit}
        for name, limit in limits.items()
    ]


def sample_files(folder: Path, number: int, seed: int) -> list[Path]:
    """So many files of a folder at random, all of them for 0, in the order of their names.

    Raises:
        CompareError: there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise CompareError(f"images: expected a folder with pictures, got {folder}")
    return sorted(random.Random(seed).sample(files, number)) if 0 < number < len(files) else files


def read_class_names(file: Path | None) -> dict[int, str]:
    """Names by class id from `index,name,...`.

    Raises:
        CompareError: the file is not of that form.
    """
    if file is None:
        return {}
    try:
        with file.open(newline="") as lines:
            return {int(row["index"]): row["name"] for row in csv.DictReader(lines)}
    except (KeyError, ValueError, TypeError):
        raise CompareError(f"classes: expected CSV with the columns index and name, got {file}") from None


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


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except (CompareError, OSError) as error:
        print(error, file=sys.stderr)
        return _NOT_COMPARED


def _run(arguments: argparse.Namespace) -> int:
    limits = parse_limits(arguments.limit)
    for name, minimum in (("sample", 0), ("repeats", 1), ("worst", 1)):
        if getattr(arguments, name) < minimum:
            raise CompareError(f"{name}: expected at least {minimum}, got {getattr(arguments, name)}")
    if not 0 < arguments.timeout < math.inf:
        raise CompareError(f"timeout: expected seconds > 0, got {arguments.timeout:g}")
    names = read_class_names(arguments.classes)
    files = sample_files(arguments.images, arguments.sample, arguments.seed)
    old, new = (
        Deployment(role, getattr(arguments, role), dict(arguments.header + own), arguments.timeout)
        for role, own in (("old", arguments.old_header), ("new", arguments.new_header))
    )
    worst = Worst(arguments.worst) if arguments.pictures else None
    found = compare(old, new, files, arguments.repeats, worst)
    for deployment in (old, new):
        deployment.close()
    summary = found.summary()
    judged = judge(summary, limits)
    print_report(found, summary, names)
    for limit in judged:
        verdict = "holds" if limit["holds"] else "DOES NOT HOLD"
        print(f"limit    {limit['name']} {limit['limit']:g}: {limit['found']:.6g}, {verdict}")
    for picture in worst.write(arguments.pictures) if worst else []:
        print(f"wrote    {picture}")
    if arguments.out:
        classes = [row | {"name": names.get(row["class"])} for row in found.classes()]
        report = {
            "old": arguments.old,
            "new": arguments.new,
            "summary": summary,
            "limits": judged,
            "classes": classes,
            "pictures": [asdict(picture) for picture in found.pictures],
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(limit["holds"] for limit in judged) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--old", required=True, metavar="URL", help="of the model that serves now")
    parser.add_argument("--new", required=True, metavar="URL", help="of the model that shall replace it")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--sample", type=int, default=100, help="pictures of it, at random; 0 takes all (100)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (0)")
    parser.add_argument("--repeats", type=int, default=3, help="times each picture is asked for (3)")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="of a request (60)")
    parser.add_argument("--limit", default="", help=f"NAME=NUMBER,... of {', '.join(_LIMITS)}")
    for role, whose in (("--header", "both"), ("--old-header", "the old one"), ("--new-header", "the new one")):
        parser.add_argument(
            role, type=_header, action="append", default=[], metavar="NAME:VALUE", help=f"sent to {whose}; repeatable"
        )
    parser.add_argument("--classes", type=Path, help="classes.csv, for names in the table")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw the worst disagreements into it")
    parser.add_argument("--worst", type=int, default=5, help="how many of them (5)")
    return parser


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
        raise argparse.ArgumentTypeError(f"expected NAME:VALUE, got {text!r}")
    return name, value.strip()


if __name__ == "__main__":
    sys.exit(main())
