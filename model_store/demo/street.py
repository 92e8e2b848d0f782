"""What stands and moves along a painted street; each function paints one thing where it is told to.

Things on the street share the signature (scene, x, z): its foot on the ground.
"""

import math
from collections.abc import Sequence

import numpy as np

from .scene import BICYCLIST, BUILDING, CAR, FENCE, PEDESTRIAN, POLE, SIGN, TREE, Point, Scene, rgb, ring

WALLS = rgb(
    [
        [152, 92, 72],
        [172, 120, 90],
        [206, 190, 160],
        [186, 178, 168],
        [140, 134, 130],
        [122, 80, 66],
        [218, 210, 196],
    ]
)
PAINTS = rgb(
    [
        [176, 34, 34],
        [36, 62, 128],
        [198, 202, 206],
        [44, 46, 52],
        [236, 236, 234],
        [98, 106, 112],
        [38, 92, 66],
    ]
)
CLOTHES = rgb([[46, 48, 62], [150, 44, 48], [62, 92, 140], [206, 196, 180], [92, 84, 70], [224, 190, 60]])
LEAVES = rgb([[74, 104, 48], [92, 112, 52], [58, 88, 50], [116, 110, 56]])
RAILS = rgb([[120, 96, 70], [84, 88, 92], [70, 76, 84]])
BOARDS = rgb([[30, 96, 60], [34, 70, 150], [226, 222, 210]])
RED, WHITE, BLUE, BLACK = (196, 34, 38), (240, 238, 232), (32, 84, 168), (26, 26, 28)
GLASS = rgb([40, 48, 58])
STOREY = 3.1

Profile = Sequence[tuple[float, float]]


def house(scene: Scene, x: float, start: float, end: float) -> None:
    """A house whose front stands at x along the street: shadow, gable, roof, front, windows, perhaps a shop."""
    rng = scene.rng
    side = math.copysign(1, x)
    sunny = side == scene.sun_side
    shade = 1.0 if sunny else 0.7
    storeys = int(rng.integers(2, 5))
    wall = scene.pick(WALLS) * shade
    eaves = storeys * STOREY + 0.6
    ridge, middle, back = eaves + rng.uniform(0.4, 2.6), x + 4.5 * side, x + 9 * side

    if not sunny:
        scene.shadow([(x, 0, start), (x, 0, end), (x - 5 * side, 0, end), (x - 5 * side, 0, start)], 0.25)
    gable = [(x, 0, start), (back, 0, start), (back, eaves, start), (middle, ridge, start), (x, eaves, start)]
    scene.face(gable, wall * 0.86, BUILDING)
    roof = [(x, eaves, start), (x, eaves, end), (middle, ridge, end), (middle, ridge, start)]
    scene.face(roof, rgb([96, 78, 72]) * rng.uniform(0.7, 1.2) * shade, BUILDING)
    scene.face(_front(x, start, end, 0, eaves), wall, BUILDING)

    shop = rng.random() < 0.4
    columns = max(1, int((end - start) / rng.uniform(2.2, 3.4)))
    glass, frame = rgb([56, 66, 80]) * rng.uniform(0.8, 1.5), np.minimum(wall * 1.25, 240)
    step = (end - start) / columns
    for storey in range(storeys):
        low, high, margin = storey * STOREY + 1.0, storey * STOREY + 2.6, 0.27 * step
        if shop and storey == 0:
            low, margin = 0.5, 0.1 * step
        for z in start + step * np.arange(columns):
            left, right = z + margin, z + step - margin
            scene.face(_front(x, left - 0.12, right + 0.12, low - 0.12, high + 0.12), frame, BUILDING)
            scene.face(_front(x, left, right, low, high), glass * rng.uniform(0.8, 1.3), BUILDING)
    if shop:
        scene.face(_front(x, start, end, 2.85, 3.5), scene.pick(PAINTS) * shade, BUILDING)


def garden_wall(scene: Scene, x: float, start: float, end: float) -> None:
    """A low wall with a coping, which counts as building."""
    shade = 0.95 if math.copysign(1, x) == scene.sun_side else 0.7
    height, wall = scene.rng.uniform(1.6, 2.4), scene.pick(WALLS) * shade
    scene.face(_front(x, start, end, 0, height), wall, BUILDING)
    scene.face(_front(x, start, end, height, height + 0.15), wall * 1.15, BUILDING)


def fence(scene: Scene, x: float, start: float, end: float) -> None:
    """Upright boards with dark gaps."""
    height, colour = scene.rng.uniform(1.0, 1.5), scene.pick(RAILS)
    scene.face(_front(x, start, end, 0, height), colour, FENCE)
    for z in np.arange(end, start, -0.5):
        scene.face(_front(x, z - 0.12, z, 0.1, height), colour * 0.6, FENCE)


def _front(x: float, start: float, end: float, low: float, high: float) -> list[Point]:
    """An upright rectangle along the street."""
    return [(x, low, start), (x, low, end), (x, high, end), (x, high, start)]


def crown(scene: Scene, x: float, z: float, *, low: float, high: float, half_width: float) -> None:
    """A heap of leaf clumps, dark below and bright on top."""
    rng = scene.rng
    green = scene.pick(LEAVES)
    for rise in np.sort(rng.random(26)):
        spread = half_width * math.sqrt(1 - (1.7 * rise - 0.75) ** 2)
        centre = (x + rng.uniform(-0.8, 0.8) * spread, low + (high - low) * (0.1 + 0.75 * rise), z)
        colour = green * (0.5 + 0.65 * rise) * rng.uniform(0.85, 1.15)
        scene.disc(centre, half_width * rng.uniform(0.2, 0.42), colour, TREE)


def tree(scene: Scene, x: float, z: float) -> None:
    """A trunk and a crown; both are tree."""
    rng = scene.rng
    high = rng.uniform(5, 11)
    _ground_shadow(scene, x, z, 1.6, 1.2)
    scene.bar((x, 0, z), (x + rng.uniform(-0.3, 0.3), high * 0.6, z), 0.34, (82, 66, 52), TREE)
    crown(scene, x, z, low=high * 0.28, high=high, half_width=high * rng.uniform(0.24, 0.36))


def lamp_post(scene: Scene, x: float, z: float) -> None:
    """A post whose arm, if it has one, reaches over the road."""
    rng = scene.rng
    top, colour = rng.uniform(5.5, 9), rgb([110, 114, 116]) * rng.uniform(0.5, 1.4)
    lamp = x - math.copysign(rng.choice([0.0, 1.2, 2.0]), x)
    scene.bar((x, 0, z), (x, top + 0.2, z), 0.17, colour, POLE)
    scene.bar((x, top, z), (lamp, top + 0.25, z), 0.11, colour, POLE)
    scene.box(lamp - 0.3, lamp + 0.3, top + 0.15, top + 0.32, z, (224, 222, 206), POLE)


def sign(scene: Scene, x: float, z: float) -> None:
    """A traffic light, a warning triangle, a round sign or a board, on its pole."""
    rng = scene.rng
    y = rng.uniform(2.3, 3.2)
    scene.bar((x, 0, z), (x, y, z), 0.1, (128, 130, 132), POLE)
    kind = rng.choice(["light", "triangle", "round", "board"])
    if kind == "light":
        scene.box(x - 0.24, x + 0.24, y - 0.4, y + 0.7, z, BLACK, SIGN)
        lit = rng.integers(3)
        for i, lamp in enumerate(rgb([[232, 44, 36], [240, 170, 40], [60, 214, 120]])):
            scene.disc((x, y + 0.48 - 0.33 * i, z), 0.12, lamp if i == lit else lamp * 0.25, SIGN)
    elif kind == "triangle":
        for size, colour in ((0.5, RED), (0.3, WHITE)):
            scene.face([(x - size, y - size * 0.6, z), (x + size, y - size * 0.6, z), (x, y + size, z)], colour, SIGN)
    elif kind == "round":
        rim, inside = ((RED, WHITE), (WHITE, BLUE))[rng.integers(2)]
        scene.disc((x, y, z), 0.4, rim, SIGN)
        scene.disc((x, y, z), 0.29, inside, SIGN)
    else:
        half = rng.uniform(0.4, 0.8)
        scene.box(x - half, x + half, y - 0.4, y + 0.4, z, scene.pick(BOARDS), SIGN)
        scene.box(x - half * 0.7, x + half * 0.7, y - 0.08, y + 0.08, z, WHITE, SIGN)


def car(scene: Scene, x: float, z: float) -> None:
    """A saloon or a hatchback."""
    roof = scene.rng.uniform(1.38, 1.65)
    profile = [(0.0, 0.28), (0.0, 0.92), (0.5, roof), (2.3, roof), (3.1, 0.95), (4.1, 0.8), (4.1, 0.28)]
    _vehicle(scene, x, z, profile, half_width=0.88, panes=[(0.65, 1.5), (1.6, 2.6)])


def bus(scene: Scene, x: float, z: float) -> None:
    """A bus, which counts as car."""
    profile = [(0.0, 0.4), (0.0, 1.5), (0.1, 3.0), (8.8, 3.0), (9.0, 1.5), (9.0, 0.4)]
    _vehicle(scene, x, z, profile, half_width=1.25, panes=[(a, a + 1.5) for a in np.arange(0.5, 7.5, 1.7)])


def _vehicle(scene: Scene, x: float, z: float, profile: Profile, *, half_width: float, panes: Profile) -> None:
    """Extrude a side profile, (along, up) from the end that faces the camera: floor, waist, roof and onwards."""
    paint, length = scene.pick(PAINTS), profile[-1][0]
    near_flank, far_flank = (
        (x - half_width, x + half_width) if x > scene.camera_x else (x + half_width, x - half_width)
    )
    _ground_shadow(scene, x, z + length / 2, half_width * 1.25, length * 0.6)
    scene.face([(far_flank, up, z + along) for along, up in profile], paint * 1.05, CAR)
    _flank(scene, near_flank, z, profile, panes, paint * 0.8)
    _end(scene, x, z, profile, half_width, paint)


def _flank(scene: Scene, x: float, z: float, profile: Profile, panes: Profile, paint: np.ndarray) -> None:
    """The side of a vehicle, with wheels and panes (start, end)."""
    waist, roof, length = profile[1][1], profile[2][1], profile[-1][0]
    scene.face([(x, up, z + along) for along, up in profile], paint, CAR)
    for along in (0.19 * length, 0.8 * length):
        scene.disc((x, 0.32, z + along), 0.32, BLACK, CAR, sideways=True)
        scene.disc((x, 0.32, z + along), 0.17, (128, 130, 134), CAR, sideways=True)
    for start, end in panes:
        low, high = waist + 0.04, roof - 0.1
        pane = [(x, low, z + start), (x, low, z + end), (x, high, z + end - 0.1), (x, high, z + start + 0.1)]
        scene.face(pane, GLASS * 1.2, CAR)


def _end(scene: Scene, x: float, z: float, profile: Profile, half_width: float, paint: np.ndarray) -> None:
    """The end of a vehicle that faces the camera: the front on the left of the road, the rear on the right."""
    floor, waist, (inset, roof) = profile[0][1], profile[1][1], profile[2]
    left, right = x - half_width, x + half_width
    lamps, plate = ((246, 242, 220), WHITE) if x < 0 else ((206, 30, 28), (232, 204, 76))
    for tyre in (left + 0.14, right - 0.14):
        scene.box(tyre - 0.13, tyre + 0.13, 0, floor + 0.1, z, BLACK, CAR)
    for margin, colour in ((0.0, paint * 1.1), (0.11, GLASS)):
        low, high, top = waist + 0.4 * margin, roof - 0.7 * margin, margin + 0.15
        slope = [(left + margin, low, z), (right - margin, low, z)]
        slope += [(right - top, high, z + inset), (left + top, high, z + inset)]
        scene.face(slope, colour, CAR)
    scene.box(left, right, floor, waist, z, paint, CAR)
    scene.box(left, right, floor, floor + 0.14, z, paint * 0.45, CAR)
    for lamp in (left + 0.2, right - 0.2):
        scene.box(lamp - 0.15, lamp + 0.15, waist - 0.25, waist - 0.08, z, lamps, CAR)
    scene.box(x - 0.27, x + 0.27, floor + 0.18, floor + 0.31, z, plate, CAR)


def pedestrian(scene: Scene, x: float, z: float) -> None:
    """Someone who walks."""
    _ground_shadow(scene, x, z, 0.4, 0.4)
    _person(scene, x, z, PEDESTRIAN, hip=0.86, foot=0.04, stride=scene.rng.uniform(0.08, 0.3))


def cyclist(scene: Scene, x: float, z: float) -> None:
    """A rider with a bicycle, seen from the side or from behind; both are bicyclist."""
    side_on = scene.rng.random() < 0.5
    reach, frame = (0.52 if side_on else 0.04), scene.pick(PAINTS)
    _ground_shadow(scene, x, z, reach + 0.3, 0.4)
    if side_on:
        for wheel in (x - reach, x + reach):
            scene.disc((wheel, 0.34, z), 0.34, BLACK, BICYCLIST)
            scene.disc((wheel, 0.34, z), 0.27, (132, 132, 134), BICYCLIST)
        rear, saddle, head = (x - reach, 0.34, z), (x - 0.12, 0.9, z), (x + 0.36, 0.85, z)
        for tube in ((rear, saddle), (rear, head), (saddle, head), ((x + reach, 0.34, z), (x + 0.34, 1.05, z))):
            scene.bar(*tube, 0.06, frame, BICYCLIST)
        _person(scene, x - 0.1, z, BICYCLIST, hip=0.98, foot=0.3, stride=0.22, lean=0.3)
    else:
        scene.bar((x, 0, z), (x, 0.7, z), 0.09, BLACK, BICYCLIST)
        scene.bar((x - 0.3, 1.05, z), (x + 0.3, 1.05, z), 0.06, BLACK, BICYCLIST)
        _person(scene, x, z, BICYCLIST, hip=0.98, foot=0.28, stride=0.13)


def _person(
    scene: Scene, x: float, z: float, label: int, *, hip: float, foot: float, stride: float, lean: float = 0.0
) -> None:
    """Legs, trunk, arms and head, upwards from the feet."""
    rng = scene.rng
    coat, trousers = scene.pick(CLOTHES), scene.pick(CLOTHES) * 0.6
    neck = hip + rng.uniform(0.54, 0.62)
    for step in (-stride, stride):
        scene.bar((x + 0.4 * step, hip, z), (x + step, foot, z), 0.17, trousers, label)
        scene.bar((x + lean, neck, z), (x + 1.3 * lean + step, hip + 0.05, z), 0.14, coat * 0.85, label)
    scene.bar((x, hip - 0.05, z), (x + lean, neck, z), 0.4, coat, label)
    scene.disc((x + lean, neck + 0.17, z), 0.14, rgb([206, 160, 130]) * rng.uniform(0.5, 1.1), label)
    scene.disc((x + lean, neck + 0.23, z), 0.12, (58, 44, 36), label)


def _ground_shadow(scene: Scene, x: float, z: float, half_width: float, half_length: float) -> None:
    scene.shadow([(x + a, 0.0, z + b) for a, b in ring(half_width, half_length)], 0.4)
