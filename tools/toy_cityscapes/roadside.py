"""Walls, fences, poles, traffic lights and signs, bins."""
import numpy as np

from .labels import FENCE, LIGHT, POLE, SIGN, STATIC, WALL
from .plants import bush
from .shapes import ALONG, bar, disc, rects, upright
from .street import NEAR

_RED, _BLUE, _WHITE, _BLACK = [.15, .12, .72], [.62, .28, .10], [.88, .9, .9], [.1, .1, .1]
# Signs: corners, degrees that stand them on an edge, colours of border, face and mark.
SIGNS = ((3, 90, _RED, _WHITE, _BLACK), (16, 0, _RED, _WHITE, _BLACK),
         (16, 0, _WHITE, _BLUE, _WHITE), (4, 45, _WHITE, _BLUE, _WHITE),
         (8, 22.5, _WHITE, _RED, _WHITE), (4, 0, _WHITE, [.1, .7, .85], _BLACK))


def wall(street, x, end, tall, side):
    """Paint a free-standing wall along the street with panels and a coping."""
    colour = street.lit(street.paint(), (-side, 0, 0))
    starts = np.arange(NEAR, end - .1, street.rng.uniform(1.6, 3))
    plane = upright(x, 0, ALONG)
    street.fill(plane(rects(NEAR, end, 0, tall)), colour, WALL, grain=.3)
    street.fill(plane(rects(starts, starts + .14, 0, tall)), colour * .6)
    street.fill(plane(rects(NEAR, end, 0, .25)), colour * .7)
    street.fill(plane(rects(NEAR, end, tall, tall + .18)), np.clip(colour * 1.25, 0, 1), WALL)


def fence(street, x, end, tall):
    """Paint a see-through fence along the street: posts, bars and rails."""
    rng, colour, plane = street.rng, street.paint() * .8, upright(x, 0, ALONG)
    street.fill(plane(rects(NEAR, end, 0, tall)), colour, FENCE, opacity=.22)
    bars = np.arange(NEAR, end, rng.uniform(.28, .45))
    street.fill(plane(rects(bars, bars + .09, .05, tall)), colour)
    posts = np.arange(NEAR, end, 2.5)
    street.fill(plane(rects(posts, posts + .2, 0, tall + .12)), colour * .75, FENCE)
    for height in (.2, tall - .25):
        street.fill(plane(rects(NEAR, end, height, height + .12)), colour * .9)


def barriers(street, plan, wanted):
    """Paint walls and fences at the building lines, some with bushes behind."""
    rng = street.rng
    first = 1 if plan.tram or rng.random() < .5 else -1
    kinds = [kind for kind in (WALL, FENCE) if kind in wanted]
    if rng.random() < .25:
        kinds.append(rng.choice([WALL, FENCE]))
    for kind, side in zip(kinds, (first, -first), strict=False):
        edge, end = plan.line[side], rng.uniform(22, 50)
        for z in np.arange(end, NEAR + 2, -4) if rng.random() < .4 else ():
            bush(street, edge + side * .8, z, rng.uniform(2, 4), rng.uniform(1.8, 3.4))
        if kind == WALL:
            wall(street, edge - side * .05, end, rng.uniform(1.6, 2.8), side)
        else:
            fence(street, edge - side * .05, end, rng.uniform(1.3, 2.2))


def pole(street, x, z, tall, arm=0., wide=.24):
    """Paint a pole, with a lamp arm of `arm` metres (signed) when not 0."""
    colour = np.array([.42, .42, .41]) * street.rng.uniform(.4, 1.5)
    plane = upright(x, z)
    street.fill(plane(bar((0, 0), (0, tall), wide)), colour, POLE)
    street.fill(plane(rects(-wide / 2, -wide / 6, 0, tall)), np.clip(colour * 1.5, 0, 1))
    if arm:
        street.fill(plane(bar((0, tall), (arm, tall + .3), wide * .7)), colour, POLE)


def traffic_light(street, x, z, arm=0.):
    """Paint traffic lights on a pole, one more at the end of an arm of `arm` metres when not 0."""
    rng, low = street.rng, street.rng.uniform(2.1, 2.5)
    pole(street, x, z, low + (1.9 if arm else .4), arm, .2)
    on = rng.integers(3)
    for shift, base in ((0, low), (arm, low + .9))[:2 if arm else 1]:
        plane = upright(x + shift, z - .2)
        street.fill(plane(rects(-.3, .3, base, base + 1.5)), [.10, .11, .10], LIGHT)
        for lamp, colour in enumerate(([.3, .9, .3], [.2, .75, 1.], [.15, .15, 1.])):
            glow = np.array(colour) * (1 if lamp == on else .22)
            street.fill(plane(disc(0, base + .27 + .47 * lamp, .19)), glow)


def traffic_sign(street, x, z):
    """Paint one of SIGNS on a pole."""
    rng, size, high = street.rng, street.rng.uniform(.42, .58), street.rng.uniform(2.1, 2.5)
    pole(street, x, z, high, wide=.16)
    corners, degrees, border, face, mark = SIGNS[rng.integers(len(SIGNS))]
    size *= 1.1 if degrees else 1
    plane, turn = upright(x, z - .15), np.deg2rad(degrees)
    street.fill(plane(disc(0, high, size, corners=corners, turn=turn)), border, SIGN)
    street.fill(plane(disc(0, high, size * .74, corners=corners, turn=turn)), face)
    street.fill(plane(bar((-.16, high - .05), (.16, high + .08), .12)), mark)


def litter_bin(street, x, z):
    """Paint a bin, which Cityscapes leaves void."""
    street.prism((x, z, 0.), [(0, 0), (0, .85), (.4, .85), (.4, 0)], .45, street.paint(), STATIC)
