"""People on foot and the riders of two-wheelers."""
import numpy as np

from .labels import PERSON, RIDER
from .shapes import bar, disc, rects, upright


def skin(rng):
    """Draw a skin colour (BGR)."""
    return np.array([.52, .62, .80]) * rng.uniform(.35, 1.05)


def person(street, x, z):
    """Paint a standing or walking person."""
    rng, tall = street.rng, street.rng.uniform(1.6, 1.9) / 1.75
    coat, legs, face = street.paint(), street.paint() * .7, skin(rng)
    step, swing = rng.uniform(.02, .28), rng.uniform(.0, .22)
    street.shadow(x, z - .2, .7, .5)
    bag = [(rects(.2, .48, .7, 1.05), street.paint() * .6)] if rng.random() < .4 else []
    street.parts(upright(x, z, scale=tall), [
        (bar((-.08, .88), (-.08 - step, .06), .19), legs),
        (bar((.08, .88), (.08 + step, .06), .19), legs * .8),
        (bar((-.08 - step, .04), (.08 - step, .04), .1), legs * .3),
        (bar((.08 + step, .04), (.24 + step, .04), .1), legs * .3),
        (bar((-.24, 1.38), (-.3 - swing, .85), .13), coat * .75),
        ([(-.2, .8), (-.27, 1.42), (-.1, 1.52), (.1, 1.52), (.27, 1.42), (.2, .8)], coat),
        (bar((.24, 1.38), (.3 + swing, .85), .13), coat * .85), *bag,
        (disc(0, 1.64, .13, 1.2), face), (disc(0, 1.71, .135, .75), face * .3)], PERSON)


def rider(street, plane, face, seat):
    """Paint a rider, `seat` metres up, on the plane of a two-wheeler that points to +u."""
    coat, legs, hat = street.paint(), street.paint() * .7, street.paint()
    street.parts(plane, [
        (bar((-.18, seat), (.18, seat - .28), .19), legs),
        (bar((.18, seat - .25), (.02, .3), .16), legs * .85),
        (bar((-.2, seat - .05), (.14, seat + .55), .34), coat),
        (bar((.14, seat + .48), (.48, seat + .15), .13), coat * .8),
        (disc(.24, seat + .74, .14, 1.15), face),
        (disc(.22, seat + .82, .16, .7), hat)], RIDER)
