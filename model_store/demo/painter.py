"""Road scenes painted from a seed: pictures with exact labels, free of any photograph.

image, labels = paint_scene(360, 480, clutter=0.7, seed=1)
"""

import math
from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np

from . import street
from .scene import BUILDING, CLASSES, FAR, NEAR, PAVEMENT, PAVEMENT_WIDTH, ROAD, ROAD_HALF, Colour, Scene, rgb

__all__ = ["CLASSES", "paint_scene"]

MIN_SIDE = 16
GRAIN = np.array(
    [0.01, 0.05, 0.04, 0.04, 0.05, 0.28, 0.02, 0.08, 0.02, 0.08, 0.06], np.float32
)  # texture of each class

# What stands on the street: painter, how many when crowded, nearest and farthest z, possible x.
_KERB, _FRONTS = ROAD_HALF + 0.5, ROAD_HALF + PAVEMENT_WIDTH
_Thing = Callable[[Scene, float, float], None]
_STREET: tuple[tuple[_Thing, float, float, float, tuple[float, ...]], ...] = (
    (street.car, 14, 6, 60, (-ROAD_HALF + 1, -1.5, 1.8, ROAD_HALF - 1)),
    (street.bus, 1.5, 14, 50, (-2.2, 2.2)),
    (street.tree, 9, 8, 70, (-_FRONTS - 2, -_KERB - 1, _KERB + 1, _FRONTS + 2)),
    (street.lamp_post, 7, 6, 60, (-_KERB, _KERB)),
    (street.sign, 7, 5, 30, (-_KERB - 0.4, _KERB + 0.4)),
    (street.pedestrian, 16, 5, 32, (-_FRONTS + 1, -_KERB - 1, -_KERB, -2.5, 0.5, _KERB, _KERB + 1, _FRONTS - 1)),
    (street.cyclist, 5, 5, 26, (-ROAD_HALF + 0.8, -1.0, 1.2, ROAD_HALF - 0.8)),
)


def paint_scene(height: int, width: int, *, clutter: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint a road scene and its labels; the same arguments always give the same scene.

    Args:
        height: pixels, at least 16.
        width: pixels, at least 16.
        clutter: 0 for an empty road under the sky, up to 1 for a crowded street.
        seed: a non-negative integer that decides everything else.

    Returns:
        image uint8 RGB [H, W, 3] and labels uint8 [H, W], indices into CLASSES.

    Raises:
        ValueError: a side is below 16, clutter is not within 0..1, or seed is negative.
    """
    for name, side in (("height", height), ("width", width)):
        if side < MIN_SIDE:
            raise ValueError(f"{name}: expected at least {MIN_SIDE} pixels, got {side}")
    if not 0 <= clutter <= 1:
        raise ValueError(f"clutter: expected a number within 0..1, got {clutter}")
    if seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed}")

    scene = Scene(height, width, clutter, np.random.default_rng(seed))
    _paint_sky(scene)
    _paint_backdrop(scene)
    _paint_ground(scene)
    for side in (-1, 1):
        _paint_fronts(scene, side)
        _paint_fence(scene, side)
    _paint_street(scene)
    return _photograph(scene), scene.labels


def _paint_sky(scene: Scene) -> None:
    """A gradient with clouds, paler towards the horizon."""
    height, width = scene.labels.shape
    descent = np.clip(np.arange(height, dtype=np.float32) / scene.horizon, 0, 1)[:, None, None]
    blue, grey = rgb([96, 146, 208]), rgb([168, 178, 190])
    zenith = blue + scene.overcast * (grey - blue)
    scene.image += zenith + descent * (rgb([226, 232, 238]) - zenith)

    size = math.sqrt(height * width)
    clouds = scene.noise(size / 8, size / 3) + 0.5 * scene.noise(size / 20, size / 9) + 0.2 * scene.noise(4, 8)
    cover = np.clip(clouds * 0.45 - 0.1, 0, 0.85)[..., None] * (1 - 0.7 * descent) * (0.2 + 0.8 * scene.clutter)
    scene.image += cover * (rgb([244, 244, 246]) - scene.image)


def _paint_backdrop(scene: Scene) -> None:
    """What closes the view far away: a wall, and the more clutter the more houses and trees."""
    rng, reach = scene.rng, scene.half_view * FAR
    scene.box(-reach, reach, 0, rng.uniform(2.5, 4), FAR, (150, 138, 126), BUILDING)
    left = -reach
    while left < reach:
        width = rng.uniform(8, 22)
        if rng.random() < 0.15 + 0.6 * scene.clutter:
            colour = rng.uniform(0.6, 1) * scene.pick(street.WALLS)
            scene.box(left, left + width, 0, rng.uniform(6, 16), FAR, colour, BUILDING)
        elif rng.random() < 0.1 + 0.5 * scene.clutter:
            street.crown(scene, left + width / 2, FAR, low=1.0, high=rng.uniform(6, 11), half_width=width / 2)
        left += width


def _paint_ground(scene: Scene) -> None:
    """Pavement up to the backdrop, and on it the road with its kerbs and markings."""
    rng, reach = scene.rng, 3 * scene.half_view * FAR
    grey = rng.uniform(0.8, 1.1)
    white, yellow = (214, 214, 208), (206, 178, 86)
    lined, crossing = rng.random() < 0.6, rng.random() < 0.2 + 0.5 * scene.clutter

    def strip(left: float, right: float, start: float, end: float, colour: Colour, label: int) -> None:
        scene.face([(left, 0, start), (right, 0, start), (right, 0, end), (left, 0, end)], colour, label)

    bounds = np.geomspace(FAR, NEAR, 24)  # short strips, so that the haze thins out smoothly
    for end, start in pairwise(bounds):
        strip(-reach, reach, start, end, rgb([158, 150, 142]) * grey, PAVEMENT)
        strip(-ROAD_HALF - 0.22, ROAD_HALF + 0.22, start, end, rgb([178, 174, 168]) * grey, PAVEMENT)
        strip(-ROAD_HALF, ROAD_HALF, start, end, rgb([104, 104, 108]) * grey, ROAD)
    if lined:
        for line in (-ROAD_HALF + 0.35, ROAD_HALF - 0.5):
            strip(line, line + 0.15, NEAR, FAR / 2, yellow, ROAD)
    for z in np.arange(rng.uniform(1, 6), FAR / 2, 6.0):
        strip(-0.08, 0.08, z, z + 2.6, white, ROAD)
    if crossing:
        z = rng.uniform(7, 18)
        for left in np.arange(-ROAD_HALF + 0.3, ROAD_HALF - 0.6, 1.1):
            strip(left, left + 0.6, z, z + 2.6, white, ROAD)


def _paint_fronts(scene: Scene, side: int) -> None:
    """Houses along one pavement, from far to near, and often garden walls in the gaps."""
    rng = scene.rng
    x = side * (_FRONTS + rng.choice([0.0, 0.0, 3.0]))
    walled = rng.random() < 0.6
    end = rng.uniform(60, 100)
    while end > 6:
        start = max(end - rng.uniform(6, 16), NEAR)
        if rng.random() < 1.2 * scene.clutter:
            street.house(scene, x, start, end)
        elif walled:
            street.garden_wall(scene, x, start, end)
        end = start


def _paint_fence(scene: Scene, side: int) -> None:
    """Perhaps a fence along one pavement, at the kerb or at the house fronts."""
    rng = scene.rng
    if rng.random() < 0.5 * scene.clutter + 0.1:
        start = rng.uniform(4, 20)
        x = side * rng.choice([ROAD_HALF + 0.3, _FRONTS - 0.2])
        street.fence(scene, x, start, start + rng.uniform(8, 30))


def _paint_street(scene: Scene) -> None:
    """Everything that stands or moves on the street, from far to near."""
    rng = scene.rng
    things: list[tuple[float, float, _Thing]] = []
    for paint, most, near, far, places in _STREET:
        for _ in range(rng.poisson(most * scene.clutter**1.5)):
            z = near * (far / near) ** rng.random()
            things.append((z, rng.choice(places) + rng.uniform(-0.4, 0.4), paint))
    for z, x, paint in sorted(things, key=lambda thing: -thing[0]):
        paint(scene, x, z)


def _photograph(scene: Scene) -> np.ndarray:
    """Surface texture, daylight, a soft lens and a noisy sensor; uint8 out."""
    rng = scene.rng
    height, width = scene.labels.shape
    texture = 0.5 * scene.noise(1, 1) + 0.6 * scene.noise(3, 4) + 0.4 * scene.noise(12, 16)
    texture *= GRAIN[scene.labels] * (0.25 + 0.75 * scene.clutter)
    warmth = rng.uniform(-0.06, 0.06)
    daylight = rng.uniform(0.72, 1.12) * rgb([1 + warmth, 1, 1 - warmth])
    down, across = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - 0.09 * (down**2 + across**2)
    image = scene.image * ((1 + texture) * vignette.astype(np.float32))[..., None] * daylight
    image = cv2.GaussianBlur(image, (3, 3), 0.7)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(0.8, 3.0)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
