"""The README's picture, asked from a running server: a photo, its merged tokens, its mask.

python -m model_store.demo.figure --image street.jpg --url http://127.0.0.1:8080/predictions/segmenter --out x.jpg
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from handlers.client import connect

GAP = 8  # pixels between the panels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.demo.figure", description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    picture = arguments.image.read_bytes()
    shown = [Image.open(io.BytesIO(picture))]
    with connect(arguments.url) as client:
        for view in ("tokens", "overlay"):
            answer = client.segment(picture, headers={"X-MPM-View": view}, timeout_seconds=120)
            if answer.status != 200:
                parser.error(answer.error)
            shown.append(Image.open(io.BytesIO(answer.body)))
    panels = [np.asarray(image.convert("RGB")) for image in shown]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    Image.fromarray(np.hstack([panels[0], gap, panels[1], gap, panels[2]])).save(arguments.out, quality=88)


if __name__ == "__main__":
    main()
