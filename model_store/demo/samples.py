"""Sample pictures to try a server with, see `mpm samples`."""

from pathlib import Path

from PIL import Image

from .painter import paint_scene

# name: height, width, clutter, seed
SAMPLES = {
    "street": (480, 640, 0.8, 1),
    "crowd": (480, 640, 1.0, 2),
    "empty_road": (480, 640, 0.05, 3),
    "panorama": (400, 1600, 0.7, 4),
    "portrait": (960, 540, 0.6, 5),
}


def paint_samples(out: Path) -> list[Path]:
    """Write one JPEG per sample into a folder, which is made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (height, width, clutter, seed) in SAMPLES.items():
        image, _ = paint_scene(height, width, clutter=clutter, seed=seed)
        paths.append(out / f"{name}.jpg")
        Image.fromarray(image).save(paths[-1], quality=92)
    return paths
