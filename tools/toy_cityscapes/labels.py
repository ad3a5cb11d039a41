"""The part of the Cityscapes label table that the scenes use, and what each scene must show."""
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """One row of the table; ``colour`` is RGB, ``train_id`` 255 is void."""
    name: str
    id: int
    train_id: int
    colour: tuple


KINDS = tuple(Kind(*row) for row in (
    ('road', 7, 0, (128, 64, 128)), ('sidewalk', 8, 1, (244, 35, 232)),
    ('building', 11, 2, (70, 70, 70)), ('wall', 12, 3, (102, 102, 156)),
    ('fence', 13, 4, (190, 153, 153)), ('pole', 17, 5, (153, 153, 153)),
    ('traffic light', 19, 6, (250, 170, 30)), ('traffic sign', 20, 7, (220, 220, 0)),
    ('vegetation', 21, 8, (107, 142, 35)), ('terrain', 22, 9, (152, 251, 152)),
    ('sky', 23, 10, (70, 130, 180)), ('person', 24, 11, (220, 20, 60)),
    ('rider', 25, 12, (255, 0, 0)), ('car', 26, 13, (0, 0, 142)),
    ('truck', 27, 14, (0, 0, 70)), ('bus', 28, 15, (0, 60, 100)),
    ('train', 31, 16, (0, 80, 100)), ('motorcycle', 32, 17, (0, 0, 230)),
    ('bicycle', 33, 18, (119, 11, 32)), ('ego vehicle', 1, 255, (0, 0, 0)),
    ('static', 4, 255, (0, 0, 0))))
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, PLANT, TERRAIN, SKY, PERSON, RIDER,
 CAR, TRUCK, BUS, TRAIN, MOTO, BIKE, EGO, STATIC) = (kind.id for kind in KINDS)
# Look-up tables by label id: train id, and colour (RGB).
TRAIN_IDS = np.full(256, 255, np.uint8)
COLOURS = np.zeros((256, 3), np.uint8)
for _kind in KINDS:
    TRAIN_IDS[_kind.id] = _kind.train_id
    COLOURS[_kind.id] = _kind.colour

COMMON = (ROAD, SIDEWALK, BUILDING, POLE, SIGN, PLANT, SKY, PERSON, CAR)
# Scene i must show COMMON and TURNS[i % 4], so any four scenes in a row show all 19 classes.
TURNS = ((TRUCK, MOTO, RIDER, WALL, TERRAIN, LIGHT), (BUS, TRAIN, RIDER, BIKE, FENCE, LIGHT),
         (TRUCK, TRAIN, BIKE, MOTO, WALL, TERRAIN), (BUS, MOTO, RIDER, BIKE, FENCE, TERRAIN))
