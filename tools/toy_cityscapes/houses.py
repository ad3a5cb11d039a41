"""The rows of houses along the street and what closes its far end."""
import numpy as np

from .labels import BUILDING
from .plants import bush, tree
from .shapes import ALONG, rects, upright
from .street import NEAR


def facade(street, plane, span, tall, colour, storey):
    """Paint one wall of a house: span (start, end) metres along the plane, tall metres."""
    rng = street.rng
    street.fill(plane(rects(*span, 0, tall)), colour, BUILDING, grain=.22)
    wide = rng.uniform(1.8, 2.8)
    u, v = np.arange(span[0] + .5, span[1] - wide * .7, wide), np.arange(storey, tall - 2, storey)
    if not len(u) or not len(v) or span[0] > 70:
        return
    u, v = (grid.ravel() for grid in np.meshgrid(u, v))
    pane, high = wide * rng.uniform(.4, .62), storey * rng.uniform(.42, .62)
    frame = np.clip(colour * rng.choice([.7, 1.3]), 0, 1)
    street.fill(plane(rects(u - .1, u + pane + .1, v + .6, v + .8 + high)), frame)
    glass = np.array([.30, .26, .22]) * rng.uniform(.5, 1.6)
    street.fill(plane(rects(u, u + pane, v + .7, v + .7 + high)), glass)
    some = rng.random(len(u)) < .3
    if some.any():  # blinds, curtains and reflected sky
        street.fill(plane(rects(u, u + pane, v + .7 + high * .4, v + .7 + high)[some]),
                    rng.choice([glass * 2, frame, street.haze * .8]))
    if rng.random() < .6:  # ground floor with shop windows below a coloured board
        door = np.arange(span[0] + .4, span[1] - 2.6, 3.2)
        street.fill(plane(rects(*span, storey * .85, storey)), street.paint())
        if len(door):
            street.fill(plane(rects(door, door + 2.5, .4, storey * .8)), glass * .8)


def house(street, side, front, start, end, tall):
    """Paint a house whose street wall is at x = front; side is -1 (left) or 1 (right)."""
    rng, colour, storey = street.rng, street.paint() * .9, street.rng.uniform(2.8, 3.6)
    gable = upright(front + side * 4, start)
    gable_colour = street.lit(colour, (0, 0, -1))
    if rng.random() < .5:  # pitched roof, seen over the street wall
        tiles = rng.choice([[.22, .26, .42], [.30, .28, .28], [.18, .20, .28]])
        peak = tall + rng.uniform(1.5, 3.5)
        roof = [(front, tall, start), (front, tall, end), (front + side * 4, peak, end),
                (front + side * 4, peak, start)]
        street.fill(roof, street.lit(tiles, (0, 1, 0)), BUILDING, grain=.3)
        if start > NEAR:
            street.fill(gable([(-4, tall), (0, peak), (4, tall)]), gable_colour, BUILDING, .22)
    if start > NEAR:
        facade(street, gable, (-4, 4), tall, gable_colour, storey)
    span, wall = (max(start, NEAR), end), upright(front, 0, ALONG)
    facade(street, wall, span, tall, street.lit(colour, (-side, 0, 0)), storey)
    street.fill(wall(rects(*span, tall - .35, tall)), colour * .7)


def backdrop(street):
    """Close the far end of the street with distant houses and trees."""
    rng = street.rng
    x = -160.
    while x < 160:
        wide, tall = rng.uniform(8, 25), rng.uniform(5, 20)
        if rng.random() < .55:
            street.fill(upright(x, 125)(rects(0, wide, -2, tall)), street.paint(), BUILDING, .2)
        else:
            bush(street, x + wide / 2, 120, wide * .7, tall * .7)
        x += wide


def houses(street, plan, side):
    """Paint one side's row of houses, the far ones first, with a tree in some gaps."""
    rng, rows, z = street.rng, [], -street.rng.uniform(0, 6)
    line = plan.line[side]
    while z < 105:
        long = rng.uniform(7, 17)
        rows.append((z, z + long, rng.uniform(5, 19), line + side * rng.uniform(0, 1.5)))
        z += long + (rng.uniform(2, 9) if rng.random() < .3 else 0)
    for start, end, tall, front in rows[::-1]:
        if rng.random() < .2:
            tree(street, front + side * 2, start + 1, rng.uniform(5, 9))
        if end > NEAR + 1:
            house(street, side, front, start, end, tall)
