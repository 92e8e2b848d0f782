"""What merging changes and what it saves: scores, agreement with the unmerged network, tokens, arithmetic, speed."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch

from mpm_ops.bench import model_shapes, write_report
from mpm_ops.classes import load_classes
from mpm_ops.merging import Merger, NoMerging, Tower, make_merger
from mpm_ops.models import find_checkpoint, load_segmenter
from mpm_ops.runtime import make_runtime
from mpm_ops.segmenter import Segmenter
from mpm_ops.stages import parse_schedule

from .arithmetic import Arithmetic
from .data import DATASETS, Dataset, find_pairs, read_classes, read_image
from .measure import segment
from .report import plot, print_table
from .scores import boundary_counts, class_counts, drawn_again, intersections_over_unions, interval, mean_iou, scores

__all__ = ["DATASETS", "Arithmetic", "Dataset", "compare", "find_pairs", "mean_iou", "picture_row", "sweep_mergers"]

BATCH = 32  # random windows, as in the paper
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A merger on all pictures.

    Attributes:
        name: the merger's, with the light where that is less than 1.
        sums: by name and picture, what adds up, see `scores`.
        lengths: [stage, window], image tokens.
    """

    name: str
    sums: Mapping[str, np.ndarray]
    lengths: np.ndarray


def compare(
    *,
    dataset: str,
    root: Path,
    split: str,
    checkpoint: Path,
    schedules: Sequence[str] = (),
    align: int = 1,
    mergers: Sequence[str] = (),
    sweep: bool = False,
    lights: Sequence[float] = (1.0,),
    runtime: str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    inference: Mapping[str, int] | None = None,
    skip: int = 0,
    most: int | None = None,
    times: Path | None = None,
    out: Path | None = None,
    plot_file: Path | None = None,
) -> list[Row]:
    """Evaluate a checkpoint without merging and with several mergers, and print a table.

    Args:
        dataset: of DATASETS.
        root: its folder.
        schedules: of MPM, such as "2,5" or "off"; "2,5" where nothing is named.
        mergers: such as "tome:r=46".
        sweep: those of `sweep_mergers` too.
        lights: see `read_image`; every merger meets each of them.
        inference: fields of `InferenceConfig` that override the checkpoint's.
        skip, most: leave out so many pictures at the start; take so many of the others, evenly chosen.
        times: report of `mpm bench model`, whose milliseconds a window are shown beside.
        out: folder for `scores.json`, and for what is known of each picture: a run that is interrupted, or asked for
            more mergers, goes on where that ends.
        plot_file: where the curves are drawn.

    Returns:
        What is written to `scores.json` of each merger.

    Raises:
        OSError, ValueError: something is missing or does not fit.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no GPU, expected cpu")
    if not all(0 < light <= 1 for light in lights):
        raise ValueError(f"light: expected numbers in (0, 1], got {', '.join(map(str, lights))}")
    pairs = _pairs(dataset, root, split, skip, most)
    checkpoint = find_checkpoint(checkpoint)
    model = load_segmenter(checkpoint, device=device, inference=inference)
    schedules = schedules or ([] if mergers or sweep else ["2,5"])
    asked: list[Merger] = [model.mpm(parse_schedule(text), align) for text in schedules]
    asked += [make_merger(text, model.tower) for text in mergers]
    asked += sweep_mergers(model.tower) if sweep else []
    unmerged: Merger = NoMerging(tower=model.tower)
    chosen = [unmerged, *{str(merger): merger for merger in asked if merger.cuts}.values()]
    model.runtime = make_runtime(model, runtime, precision)
    computed_on = f"{model.runtime.name} {model.runtime.precision}"  # all rows
    settings = {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "pictures": f"{dataset} {split} {root.resolve()}",
        "computed on": f"{computed_on} {device}",
        "inference": asdict(model.inference),
    }
    evaluations, arithmetic = [], Arithmetic(model)
    with TemporaryDirectory() as scratch:
        known = _Known(out or Path(scratch), settings)
        for merger in chosen:
            for light in lights:
                rows = [*_rows(model, merger, light, pairs, DATASETS[dataset], known)]
                name = str(merger) if light == 1 else f"{merger} light={light:g}"
                evaluations.append(_summed(name, merger, rows, arithmetic))
    names = load_classes(checkpoint.parent, model.config.n_cls).names
    results = [*_results(evaluations, names, len(lights))]
    if times:
        _add_times(results, times, model.config.d_model, computed_on)
    print(f"{settings['pictures']}, {len(pairs)} pictures, {settings['computed on']}; in brackets 95 % intervals")
    print_table(results)
    if out:
        write_report(out / "scores.json", {"settings": settings, "results": results}, shapes=model_shapes(model))
    if plot_file:
        plot(results, plot_file)
    return results


def _pairs(dataset: str, root: Path, split: str, skip: int, most: int | None) -> list[tuple[Path, Path]]:
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(sorted(DATASETS))}, got {dataset!r}")
    pairs = find_pairs(root, split, DATASETS[dataset])[skip:]
    if not pairs:
        raise ValueError(f"skip: expected fewer than the pictures of {split}, got {skip}, which leaves none")
    if most is None or most >= len(pairs):
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, most, dtype=int)]


def sweep_mergers(tower: Tower) -> list[Merger]:
    """Those that fit an encoder of: MPM's schedules from early to late, MPM with keep, and rivals' parameters."""
    step = -(-tower.num_blocks // 12)
    early_to_late = [f"{block}" for block in range(0, tower.num_blocks, step)]
    pairs = [f"{block},{block + 3 * step}" for block in range(0, tower.num_blocks - 3 * step, step)]
    texts = [
        *(f"mpm:{cuts}" for cuts in dict.fromkeys((*early_to_late, *pairs, "2,5", "2,3,5"))),
        *(
            f"mpm:{cuts},keep={keep},weighted,proportional"
            for cuts in ("1,3", "1,2,3,4", "1,2,4,6", "1,2,3,4,5,6")
            for keep in (0.333333, 0.5, 0.75)
        ),
        *(f"tome:r={r}" for r in range(10, 61, 10)),
        *(f"algm:threshold={threshold}" for threshold in (0.88, 0.9, 0.94, 0.98, 0.99, 0.999)),
        "region:2,5",
    ]
    fitting = []
    for text in texts:
        with suppress(ValueError):
            fitting.append(make_merger(text, tower))
    return fitting


class _Known:
    """What is known of each picture, one JSON line each, in a folder; and the labels of the unmerged network there.

    Raises:
        ValueError: the folder's rows were measured otherwise.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self._file = folder / "pictures.jsonl"
        self._labels = folder / "unmerged"
        self._labels.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[str, float, str], Row] = {}
        lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # interrupted while it was written
            lines.pop()
        if lines and (before := json.loads(lines[0])) != settings:
            differ = [name for name in settings if before.get(name) != settings[name]]
            raise ValueError(f"out: {self._file} was measured with other {', '.join(differ)}; give another folder")
        for row in map(json.loads, lines[1:]):
            self._rows[row["merger"], row["light"], row["picture"]] = row
        self._file.write_text("".join(lines) or json.dumps(settings) + "\n")

    def find(self, merger: Merger, light: float, picture: str) -> Row | None:
        return self._rows.get((str(merger), light, picture))

    def add(self, row: Row) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def unmerged(self, light: float, picture: str) -> Path:
        return self._labels / f"{light:g} {picture.replace('/', ' ')}.png"


def _rows(
    model: Segmenter,
    merger: Merger,
    light: float,
    pairs: Sequence[tuple[Path, Path]],
    dataset: Dataset,
    known: _Known,
) -> Iterator[Row]:
    """What is known of every picture, and what is found out now."""
    import click  # the GPU's benchmark needs this package, and no progress bar

    with click.progressbar(pairs, label=f"{merger!s:.45}") as bar:
        for image, labels in bar:
            name = f"{image.parent.name}/{image.name}"
            row = known.find(merger, light, name)
            if row is None:
                if model.merger is not merger:
                    model.merger = merger
                    model.runtime = make_runtime(model, model.runtime.name, model.runtime.precision)
                file = known.unmerged(light, name)
                unmerged = None if isinstance(merger, NoMerging) else cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                row, found = picture_row(model, merger, (image, labels), dataset, light=light, unmerged=unmerged)
                if unmerged is None:
                    cv2.imwrite(str(file), found)
                row |= {"merger": str(merger), "light": light, "picture": name}
                known.add(row)
            yield row


def picture_row(
    model: Segmenter,
    merger: Merger,
    pair: tuple[Path, Path],
    dataset: Dataset,
    *,
    light: float = 1.0,
    unmerged: np.ndarray | None = None,
) -> tuple[Row, np.ndarray]:
    """Segment a picture and compare it with its labels, and with those of the unmerged network.

    Returns:
        What JSON keeps of it, and the labels that were found.

    Raises:
        ValueError: labels do not have the size of their picture.
    """
    image = read_image(pair[0], light)
    seen = segment(model, merger, image)
    truth = read_classes(pair[1], image.shape[:2], dataset, model.config.n_cls)
    row = {
        "seconds": round(seen.seconds, 5),
        "agreement": 1.0 if unmerged is None else float((seen.labels == unmerged).mean()),
        "lengths": seen.lengths,
        "distances": np.trim_zeros(seen.distances, "b").tolist(),
        "classes": class_counts(truth, seen.labels, model.config.n_cls).tolist(),
        "boundary": boundary_counts(truth, seen.labels, model.config.n_cls).tolist(),
    }
    return row, seen.labels


def _summed(name: str, merger: Merger, rows: Sequence[Row], arithmetic: Arithmetic) -> Evaluation:
    windows = [np.array(row["lengths"]).T for row in rows]  # [window, stage] of each picture
    num_patches = int(windows[0][0, 0])
    blocks = np.array([len(stage.parts) / 2 for stage in merger.stages])
    sums = {name: np.array([row[name] for row in rows]) for name in ("seconds", "agreement", "classes", "boundary")}
    sums |= {
        "pictures": np.ones(len(rows)),
        "distances": np.array([np.pad(row["distances"], (0, num_patches - len(row["distances"]))) for row in rows]),
        "windows": np.array([len(of_picture) for of_picture in windows]),
        "tokens": np.array([of_picture.sum(0) for of_picture in windows]),
        "tokens_per_block": np.array([(of_picture @ blocks).sum() / blocks.sum() for of_picture in windows]),
        "token_histogram": np.array([np.bincount(each[:, -1], minlength=num_patches + 1) for each in windows]),
    }
    for field, decoding in (("flops", None), ("flops_decoding_all", num_patches)):
        counts = ([arithmetic.window(merger.stages, w, decoding=decoding) for w in each.tolist()] for each in windows)
        sums[field] = np.array([float(sum(of_windows)) for of_windows in counts])
    return Evaluation(name, sums, np.concatenate(windows).T)


def _results(evaluations: Sequence[Evaluation], names: Sequence[str], num_lights: int) -> Iterator[Row]:
    """Scores with their intervals, and what changes against the unmerged network, which is first, in each light."""
    unmerged: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    for i, evaluation in enumerate(evaluations):
        total = {name: of_pictures.sum(0) for name, of_pictures in evaluation.sums.items()}
        values, draws = scores(total), scores(drawn_again(evaluation.sums))
        unmerged += [(values, draws)] if i < num_lights else []
        base_values, base_draws = unmerged[i % num_lights]
        for found, base in ((values, base_values), (draws, base_draws)):
            found["mean_iou_change"] = found["mean_iou"] - base["mean_iou"]
            found["gflops_share"] = found["gflops"] / base["gflops"]
        iou = intersections_over_unions(total["classes"])
        yield {
            "merger": evaluation.name,
            **{name: _plain(value) for name, value in values.items()},
            "intervals": {name: [*map(_plain, interval(drawn))] for name, drawn in draws.items()},
            "tokens_after_merges": [*map(_plain, evaluation.lengths.mean(1))],
            "batches": batch_statistics(evaluation.lengths),
            "iou": dict(zip(names, map(_plain, iou), strict=True)),
        }


def batch_statistics(lengths: np.ndarray) -> dict[str, Any] | None:
    """How unequal the windows of random batches are, as [mean, standard error over the batches] after each merge.

    Args:
        lengths: [stage, window], image tokens.

    Returns:
        The longest window of a batch, and the share of a batch that only pads to it; None for less than two batches.
    """
    num_batches = lengths.shape[1] // BATCH
    if num_batches < 2:
        return None
    drawn = np.random.default_rng(0).permutation(lengths.shape[1])[: num_batches * BATCH]
    batches = lengths[:, drawn].reshape(len(lengths), num_batches, BATCH)
    longest = batches.max(2)
    told = {"longest": longest, "padding": 1 - batches.mean(2) / longest}
    return {"size": BATCH, "number": num_batches} | {
        name: [[_plain(each.mean()), _plain(each.std(ddof=1) / num_batches**0.5)] for each in of_stages]
        for name, of_stages in told.items()
    }


def _add_times(results: Sequence[Row], file: Path, width: int, runtime: str) -> None:
    """Take milliseconds a window from a report of `mpm bench model`: of this width, runtime and precision."""
    report = json.loads(file.read_text())
    sizes = {size for size, (of_size, _) in report["shapes"]["sizes"].items() if of_size == width}
    known = {
        (row["merger"], f"{row['runtime']} {row['precision']}"): row["median_ms"]
        for row in report["results"]
        if row["size"] in sizes and "setting" not in row
    }
    for result in results:
        result["median_ms"] = known.get((result["merger"], runtime))


def _plain(value: float | np.ndarray) -> float | None:
    """A number as JSON has it, six digits of it; None if it is none."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
