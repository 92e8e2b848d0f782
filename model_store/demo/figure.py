"""The README's picture, asked from a running server: a photo, its merged tokens, its mask.

python -m model_store.demo.figure --image street.jpg --url http://127.0.0.1:8080/predictions/segmenter --out x.jpg
"""

import argparse
import io
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

GAP = 8  # pixels between the panels


def fetch_view(url: str, picture: bytes, view: str) -> Image.Image:
    """POST a picture and return one of the server's views of it."""
    headers = {"Content-Type": "image/jpeg", "X-MPM-View": view}
    with urllib.request.urlopen(urllib.request.Request(url, data=picture, headers=headers), timeout=120) as response:
        return Image.open(io.BytesIO(response.read()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.demo.figure", description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    picture = arguments.image.read_bytes()
    shown = [Image.open(io.BytesIO(picture)), *(fetch_view(arguments.url, picture, v) for v in ("tokens", "overlay"))]
    panels = [np.asarray(image.convert("RGB")) for image in shown]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    Image.fromarray(np.hstack([panels[0], gap, panels[1], gap, panels[2]])).save(arguments.out, quality=88)


if __name__ == "__main__":
    main()
