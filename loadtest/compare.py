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
import json
import math
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .comparing.comparison import Compared, Comparison, compare
from .comparing.deployments import CompareError, Deployment
from .comparing.worst import Worst

_LIMITS = {"agreement": min, "worst_agreement": min, "p50_ratio": max, "p99_ratio": max, "errors": max}
_MOST_LISTED = 5  # pictures
_ANSWERS_FOR_P99 = 300
_ERRORS = {"only new": "errors", "only old": "errors_of_old", "both": "errors_of_both"}
_NOT_COMPARED = 2  # exit status
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")


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
