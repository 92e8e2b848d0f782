"""Masks as the library makes them, to hold a server's against.

    python -m loadtest.library --checkpoint checkpoint.pth [--schedule 2,5] [--align 1] --out FOLDER PICTURE...

writes `PICTURE.png`, class ids as grey values, for each. It loads torch, so it is a process of its own: the client
has to stay light, and the server needs the cores while there is load.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .client.pictures import read_frame


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.library", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pth with variant.yml beside it")
    parser.add_argument("--schedule", default="2,5", help="blocks before which tokens merge (2,5), or off")
    parser.add_argument("--align", type=int, default=1, help="token counts after a merge are multiples of this (1)")
    parser.add_argument("--inference", default="{}", metavar="JSON", help="what overrides the checkpoint's own")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        from mpm_ops import load_segmenter  # here, so that a machine without it can say so
        from mpm_ops.stages import parse_schedule
    except ImportError as error:
        print(f"the library can't be loaded here: {error}", file=sys.stderr)
        return 1
    try:
        schedule, inference = parse_schedule(arguments.schedule), json.loads(arguments.inference)
        model = load_segmenter(arguments.checkpoint, schedule, arguments.align, inference=inference)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for picture in arguments.pictures:
            labels = model.segment(read_frame(picture))
            Image.fromarray(labels).save(arguments.out / f"{picture.name}.png")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(arguments.pictures)} masks in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
