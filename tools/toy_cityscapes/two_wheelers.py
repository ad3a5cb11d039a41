"""Bicycles and motorcycles, parked or ridden."""
import numpy as np

from .labels import BIKE, MOTO
from .people import rider, skin
from .shapes import bar, disc, upright


def heading(rng, x, z):
    """Return the plane of a two-wheeler at x, z, from its side or aslant, either way round."""
    yaw = rng.choice([-1, 1]) * rng.uniform(0, .9)
    return upright(x, z, yaw, scale=(rng.choice([-1, 1]), 1))


def bicycle(street, x, z, ridden):
    """Paint a bicycle, with its rider when `ridden`."""
    colour, plane = street.paint(), heading(street.rng, x, z)
    street.shadow(x, z - .2, 1.5, .5)
    for hub in (-.52, .52):
        street.fill(plane(disc(hub, .35, .37, corners=20)), [.12] * 3, BIKE, opacity=.45)
        ring = np.stack([disc(hub, .35, radius, corners=20) for radius in (.37, .29)])
        street.fill(plane(ring), [.04] * 3)  # two nested polygons fill the space between them
    tubes = (((-.52, .35), (-.15, .85)), ((-.52, .35), (0, .33)), ((0, .33), (-.17, .92)),
             ((0, .33), (.4, .85)), ((-.13, .82), (.4, .85)), ((.52, .35), (.38, 1.05)))
    street.parts(plane, [*((bar(a, b, .085), colour) for a, b in tubes),
                         (bar((.25, 1.06), (.48, 1.04), .08), [.1] * 3),
                         (bar((-.32, .95), (-.04, .95), .1), [.07] * 3)], BIKE)
    if ridden:
        rider(street, plane, skin(street.rng), 1.)


def motorcycle(street, x, z, ridden):
    """Paint a motorcycle, with its rider when `ridden`."""
    colour, plane = street.paint(), heading(street.rng, x, z)
    street.shadow(x, z - .2, 2., .6)
    street.parts(plane, [
        (disc(-.68, .33, .34), [.05] * 3), (disc(.7, .33, .34), [.05] * 3),
        (disc(-.68, .33, .17), [.5] * 3), (disc(.7, .33, .17), [.5] * 3),
        (bar((-.75, .35), (.1, .3), .14), [.62] * 3),
        (bar((.68, .35), (.42, 1.), .12), [.35] * 3),
        ([(-.35, .3), (-.4, .65), (.4, .75), (.4, .35), (.1, .22)], [.2] * 3),
        ([(-.95, .72), (-.9, .92), (-.1, .8), (.35, 1.02), (.62, .95), (.55, .62), (-.3, .55)],
         colour),
        (bar((-.75, .9), (-.05, .86), .13), [.06] * 3),
        ([(.42, .85), (.3, 1.25), (.4, 1.25), (.68, .9)], colour * .8),
        (disc(.66, .86, .11), [.85, .92, .95])], MOTO)
    if ridden:
        rider(street, plane, street.paint(), .95)
