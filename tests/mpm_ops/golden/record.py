"""Record what the original Segmenter computes for the networks of cases.py.

    python tests/mpm_ops/golden/record.py --upstream CHECKOUT

CHECKOUT is rstrudel/segmenter at COMMIT. Run this in an environment of its own: upstream needs
timm 0.4.12 and einops. mmcv and mmsegmentation, which load and resize pictures there, are replaced by
a few lines below.
"""

import argparse
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))

from golden.cases import CASES, Case, picture, sample, windows, write_checkpoint  # noqa: E402

COMMIT = "20d1bfad354165ee45c3f65972a4d9c131f58d53"
TIE = 1e-5  # a label whose log probability leads by less may go either way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="a checkout of rstrudel/segmenter")
    upstream = parser.parse_args().upstream
    check_checkout(upstream)
    sys.path.insert(0, str(upstream))
    import_module("segm.utils.torch").set_gpu_mode(False)
    for name, case in CASES.items():
        with torch.inference_mode():
            values = record(case, upstream)
        np.savez_compressed(GOLDEN / f"{name}.npz", **values)


def check_checkout(upstream: Path) -> None:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(upstream), *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    if git("rev-parse", "HEAD") != COMMIT or git("status", "--porcelain", "--untracked-files=no"):
        raise SystemExit(f"{upstream}: expected an unchanged checkout of {COMMIT}")


def record(case: Case, upstream: Path) -> dict[str, np.ndarray]:
    """All numbers of one case, by what they are and the shape they belong to."""
    utils = import_module("segm.model.utils")
    with tempfile.TemporaryDirectory() as folder:
        model, variant = import_module("segm.model.factory").load_model(write_checkpoint(case, Path(folder)))
    model.eval()

    values = {}
    for height, width in case.windows:
        shown = windows(height, width)
        padded = utils.padding(shown, case.patch_size)
        tokens = model.encoder(padded, return_features=True)[:, 1 + model.encoder.distilled :]
        values[f"patches_{height}x{width}"] = model.decoder(tokens, padded.shape[2:]).numpy()
        values[f"pixels_{height}x{width}"] = sample(model(shown))
    for height, width in case.pictures:
        probabilities = utils.inference(
            model,
            [prepare(picture(height, width), variant["dataset_kwargs"], upstream)],
            [{"flip": False}],
            ori_shape=(height, width),
            window_size=variant["inference_kwargs"]["window_size"],
            window_stride=variant["inference_kwargs"]["window_stride"],
            batch_size=4,
        )
        first, second = probabilities.log().topk(2, dim=0).values
        values[f"labels_{height}x{width}"] = probabilities.argmax(0).numpy().astype(np.uint8)
        values[f"decided_{height}x{width}"] = np.packbits((first - second > TIE).numpy())
    return values


def prepare(image: np.ndarray, dataset: Mapping[str, Any], upstream: Path) -> Tensor:
    """uint8 [H, W, 3] -> normalised [1, 3, H', W'], by the rules of mmcv 1.3.8 (rescale_size, imnormalize)."""
    data = upstream / "segm" / "data"
    max_ratio = runpy.run_path(str(data / "config" / f"{dataset['dataset']}.py"))["max_ratio"]
    stats: Mapping[str, Sequence[float]] = runpy.run_path(str(data / "utils.py"))["STATS"][dataset["normalization"]]
    mean, std = (np.round(255 * np.array(stats[name]), 2).astype(np.float32) for name in ("mean", "std"))

    height, width = image.shape[:2]
    short, long = dataset["image_size"], max_ratio * dataset["image_size"]
    scale = min(long / max(height, width), short / min(height, width))
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
    centred = cv2.subtract(resized, mean[None].astype(np.float64))
    normalised = cv2.multiply(centred, 1 / std[None].astype(np.float64))
    return torch.from_numpy(normalised).permute(2, 0, 1)[None]


if __name__ == "__main__":
    main()
