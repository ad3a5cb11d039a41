"""Cars, lorries, buses and trams: prisms with windows, lamps and wheels."""
import numpy as np

from .labels import BUS, CAR, TRAIN, TRUCK
from .shapes import disc, rects

GLASS = np.array([.22, .19, .17])


def place(x, z, yaw, long, wide):
    """Turn the near middle point (x, z) of a vehicle into the place that Street.prism takes."""
    sin, cos = np.sin(yaw), np.cos(yaw)
    return x - sin * long / 2, z + max(-cos * long, 0) + abs(sin) * wide / 2, yaw


def wheels(at, radius):
    """Return side details for wheels at the given places along a vehicle."""
    return [(disc(a, radius, radius * r), [shade] * 3) for a in at for r, shade in
            ((1, .05), (.55, .45))]


def lamps(edge, up, front):
    """Return end details: a pair of head lamps (front) or tail lamps at a height of an edge."""
    pair = rects([-.46, .28], [-.28, .46], up, up + .2)
    return edge, pair, [.85, .93, .95] if front else [.12, .08, .75]


def tyres(edge, near, far):
    """Return end details: a pair of tyres from `near` to `far` along an edge, below the body."""
    return edge, rects([-.47, .3], [-.3, .47], near, far), [.05] * 3


def car(street, x, z, yaw):
    """Paint a car: hatchback, saloon or van."""
    rng, colour = street.rng, street.paint()
    tall, boot, nose = rng.uniform(1.4, 1.75), rng.choice([.15, .9]), rng.uniform(.75, 1.2)
    long, glass = rng.uniform(3.9, 4.7), GLASS * rng.uniform(.6, 1.8)
    profile = [(0, .3), (0, .92), (boot, 1.), (boot + .5, tall), (long - nose - .9, tall),
               (long - nose, 1.), (long, .85), (long, .3)]
    cabin = [(boot + .3, 1.), (boot + .65, tall - .12), (long - nose - 1., tall - .12),
             (long - nose - .25, 1.)]
    pillar = rects(long * .5, long * .5 + .1, .98, tall - .1)
    ends = [(2, rects(-.42, .42, .1, .9), glass), (4, rects(-.42, .42, .1, .92), glass),
            lamps(0, .55, False), lamps(6, .2, True), (0, rects(-.16, .16, .15, .4), [.8] * 3),
            (0, rects(-.5, .5, 0, .12), [.08] * 3), (6, rects(-.3, .3, .55, .9), [.1] * 3),
            tyres(0, -.46, 0), tyres(6, 1, 1.5)]
    street.shadow(x, z, 1.9 if abs(np.cos(yaw)) > .5 else long, 4.2)
    street.prism(place(x, z, yaw, long, 1.8), profile, 1.8, colour, CAR,
                 [(cabin, glass), (pillar, colour * .8), *wheels((.8, long - .8), .33)], ends)


def truck(street, x, z, yaw):
    """Paint a lorry: a closed windowless box behind a lower cab, on a dark chassis."""
    rng, colour, cargo = street.rng, street.paint(), street.paint()
    long, tall = rng.uniform(6.5, 8.5), rng.uniform(3.1, 3.7)
    street.shadow(x, z, 2.6 if abs(np.cos(yaw)) > .5 else long, 5)
    split = long - 1.9
    ribs = np.arange(.3, split - .2, .6)
    chassis = ([(0, .45), (0, 1.), (long - .2, 1.), (long - .2, .45)], [.1] * 3,
               wheels((1., 2., split + .9), .5), [lamps(0, .5, False), tyres(0, -.8, 0)])
    box = ([(0, 1.), (0, tall), (split, tall), (split, 1.)], cargo,
           [(rects(ribs, ribs + .1, 1.1, tall - .1), cargo * .78)],
           [(0, rects([-.02, -.3, .28], [.02, -.27, .31], .03, .97), cargo * .5),
            (0, rects(-.5, .5, 0, .04), [.1, .1, .6])])
    cab = ([(split + .15, .5), (split + .15, 2.5), (long - .25, 2.5), (long, 1.6), (long, .45)],
           colour, [(rects(split + .7, long - .3, 1.6, 2.3), GLASS), *wheels((split + .9,), .5)],
           [(2, rects(-.44, .44, .05, .95), GLASS), lamps(3, .65, True),
            (3, rects(-.4, .4, .1, .5), colour * .4), tyres(3, 1, 1.38)])
    from_behind = np.cos(yaw) > .5  # then the cab is the farthest
    for profile, tint, sides, ends in (cab, chassis, box) if from_behind else (chassis, box, cab):
        street.prism(place(x, z, yaw, long, 2.4), profile, 2.4, tint, TRUCK, sides, ends)


def bus(street, x, z, yaw):
    """Paint a bus: one tall box with a row of windows, doors and wheels."""
    rng, colour = street.rng, street.paint()
    long, tall = rng.uniform(8.5, 12), rng.uniform(2.9, 3.3)
    stripe, glass = street.paint(), GLASS * rng.uniform(.6, 1.6)
    start = np.arange(.4, long - 1.4, 1.35)
    sides = [(rects(0, long, .35, .75), stripe), (rects(start, start + 1.2, 1.35, 2.4), glass),
             (rects([long * .35, long - 1.3], [long * .35 + 1., long - .4], .45, 2.4),
              glass * .7), *wheels((2., long - 2.4), .48)]
    ends = [(0, rects(-.42, .42, .5, .8), glass), (2, rects(-.46, .46, .14, .62), glass),
            (0, rects(-.35, .35, .88, .97), [.1, .55, .8]),
            (2, rects(-.35, .35, .03, .12), [.1, .6, .85]), lamps(0, .15, False),
            lamps(2, .8, True), (0, rects(-.3, .3, .05, .3), colour * .5), tyres(0, -.1, 0),
            tyres(2, 1, 1.1)]
    street.shadow(x, z, 2.7 if abs(np.cos(yaw)) > .5 else long, 5)
    street.prism(place(x, z, yaw, long, 2.5), [(0, .3), (0, tall), (long, tall), (long, .3)],
                 2.5, colour, BUS, sides, ends)


def train(street, x, z, yaw):
    """Paint a tram of three cars: low skirts, slanted nose, one window band, bellows."""
    colour, stripe, tall = street.paint(), street.paint(), street.rng.uniform(3.3, 3.7)
    long, joint, post = 24., np.array([8., 16.]), np.arange(2.5, 23, 2.6)
    sides = [(rects(.9, long - .9, 1.5, 2.6), GLASS), (rects(0, long, .85, 1.15), stripe),
             (rects(.3, long - .3, .12, .35), [.08] * 3),
             (rects(post, post + .22, 1.5, 2.6), colour * .9),
             (rects(joint - .3, joint + .3, .2, tall), [.12, .12, .13])]
    nose = [(0, .15), (0, 1.2), (.7, tall), (long - .7, tall), (long, 1.2), (long, .15)]
    ends = [(1, rects(-.42, .42, .15, .75), GLASS), (3, rects(-.42, .42, .25, .85), GLASS),
            (1, rects(-.25, .25, .84, .97), [.1, .6, .85]), lamps(0, .45, False),
            (3, rects(-.25, .25, .03, .16), [.1, .6, .85]), lamps(4, .35, True),
            (0, rects(-.5, .5, .8, 1), stripe), (4, rects(-.5, .5, 0, .2), stripe)]
    street.prism(place(x, z, yaw, long, 2.5), nose, 2.5, colour, TRAIN, sides, ends)
