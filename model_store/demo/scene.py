"""The canvas of a painted scene: a camera in a world of metres, and a label for every pixel it sees.

x points to the right, y up from the ground, z ahead of the camera. The road runs along z.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CLASSES))

CAMERA_HEIGHT = 1.9  # metres, as all lengths
ROAD_HALF = 4.2
PAVEMENT_WIDTH = 3.4
NEAR, FAR = 0.4, 120.0

Point = tuple[float, float, float]
Colour = Sequence[float] | np.ndarray  # RGB, 0..255


def rgb(values: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    """One colour or several, to reckon with."""
    return np.array(values, np.float32)


class Scene:
    """An unfinished picture, its labels, and the camera that looks at the world.

    Attributes:
        image: float32 [H, W, 3].
        labels: uint8 [H, W].
        clutter: how crowded the world is, 0..1.
        rng: decides everything that is left open.
        horizon: the row of the horizon, in pixels.
        half_view: x / z at the wider edge of the picture.
        sun_side: -1 if the houses on the left lie in the sun, 1 for those on the right.
        overcast: 0 for a blue sky, 1 for a grey one.
    """

    def __init__(self, height: int, width: int, clutter: float, rng: np.random.Generator) -> None:
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.full((height, width), SKY, np.uint8)
        self.clutter = clutter
        self.rng = rng
        self.focal = 0.8 * math.sqrt(height * width)
        self.horizon = height * rng.uniform(0.4, 0.53)
        self.centre = width * rng.uniform(0.38, 0.62)
        self.half_view = max(self.centre, width - self.centre) / self.focal
        self.camera_x = rng.uniform(-2.4, 1.8)
        self.sun_side = int(rng.choice([-1, 1]))
        self.overcast = rng.random()
        self.haze = rgb([205, 213, 222]) * (1 - 0.12 * self.overcast)

    def face(self, points: Sequence[Point], colour: Colour, label: int) -> None:
        """Fill a polygon of the world, paler the farther away it is."""
        outline, distance = self._project(points)
        air = 1 - math.exp(-distance / 260)
        shade = np.asarray(colour, np.float32) * (1 - air) + self.haze * air
        cv2.fillPoly(self.labels, outline, [label], shift=4)
        cv2.fillPoly(self.image, outline, shade.tolist(), shift=4)

    def shadow(self, points: Sequence[Point], depth: float) -> None:
        """Darken a polygon of the world, whatever is painted there."""
        inside = cv2.fillPoly(np.zeros_like(self.labels), self._project(points)[0], [1], shift=4) > 0
        self.image[inside] *= 1 - depth

    def box(self, left: float, right: float, low: float, high: float, z: float, colour: Colour, label: int) -> None:
        """An upright rectangle that faces the camera."""
        self.face([(left, low, z), (right, low, z), (right, high, z), (left, high, z)], colour, label)

    def bar(self, start: Point, end: Point, thickness: float, colour: Colour, label: int) -> None:
        """A straight limb, post or tube, at the depth of its start."""
        (x0, y0, z), (x1, y1, _) = start, end
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (y0 - y1) / length * thickness / 2, (x1 - x0) / length * thickness / 2
        corners = [(x0 + dx, y0 + dy, z), (x0 - dx, y0 - dy, z), (x1 - dx, y1 - dy, z), (x1 + dx, y1 + dy, z)]
        self.face(corners, colour, label)

    def disc(self, centre: Point, radius: float, colour: Colour, label: int, *, sideways: bool = False) -> None:
        """A disc that faces the camera or, like the wheels of a passing car, sideways."""
        x, y, z = centre
        rim = [(a, y + b) for a, b in ring(radius, radius)]
        self.face([(x, up, z + a) if sideways else (x + a, up, z) for a, up in rim], colour, label)

    def noise(self, cell_height: float, cell_width: float) -> np.ndarray:
        """[H, W] smooth noise with cells of so many pixels."""
        height, width = self.labels.shape
        cells = (max(2, round(height / cell_height)), max(2, round(width / cell_width)))
        coarse = self.rng.standard_normal(cells, np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)

    def pick(self, colours: np.ndarray) -> np.ndarray:
        """One of some colours, in a shade of its own."""
        return colours[self.rng.integers(len(colours))] * self.rng.uniform(0.85, 1.1)

    def _project(self, points: Sequence[Point]) -> tuple[list[np.ndarray], float]:
        """Corners in sixteenths of a pixel, as cv2 takes them, and the mean distance."""
        x, y, z = np.array(points, np.float64).T
        z = z.clip(NEAR)
        columns = self.centre + self.focal * (x - self.camera_x) / z
        rows = self.horizon + self.focal * (CAMERA_HEIGHT - y) / z
        corners = np.stack([columns, rows], axis=1).clip(-30000, 30000) - 0.5
        return [np.round(corners * 16).astype(np.int32)], float(z.mean())


def ring(radius_x: float, radius_y: float, corners: int = 18) -> list[tuple[float, float]]:
    """An ellipse around the origin, as a polygon."""
    turns = (2 * math.pi * i / corners for i in range(corners))
    return [(radius_x * math.cos(turn), radius_y * math.sin(turn)) for turn in turns]
