"""The pictures that two deployments agree on least, drawn for a look."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .deployments import Answer

_DISAGREEMENT = (255, 0, 0)
_PANEL_HEIGHT = 480


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
