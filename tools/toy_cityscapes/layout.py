"""What stands where: the street's cross-section, and lists of (painter, x, z, ...) along it."""
from typing import NamedTuple

import numpy as np

from .labels import BIKE, BUS, LIGHT, MOTO, RIDER, TERRAIN, TRAIN, TRUCK
from .people import person
from .plants import bush, tree
from .roadside import litter_bin, pole, traffic_light, traffic_sign
from .two_wheelers import bicycle, motorcycle
from .vehicles import bus, car, train, truck

SIDES = (-1, 1)  # left, right


class Plan(NamedTuple):
    """The cross-section: x in metres by side, whether a side has grass, whether trams run."""
    road: dict
    walk: dict
    line: dict  # where the houses begin
    grass: dict
    tram: bool


def make_plan(rng, wanted):
    """Choose the cross-section for the wanted label ids."""
    tram = TRAIN in wanted
    road = {-1: -rng.uniform(7.6, 8.4) if tram else -rng.uniform(4.6, 7.), 1: rng.uniform(2.3, 4.)}
    walk = {side: road[side] + side * rng.uniform(1.6, 2.8) for side in SIDES}
    left = rng.random() < .6  # where grass goes that must show; a tram hides the left side
    must = {-1: left and not tram, 1: tram or not left}
    grass = {side: (TERRAIN in wanted and must[side]) or rng.random() < .35 for side in SIDES}
    line = {side: walk[side] + side * (rng.uniform(3, 6) if grass[side] else rng.uniform(.1, .5))
            for side in SIDES}
    return Plan(road, walk, line, grass, tram)


def traffic(rng, plan, wanted):
    """List the vehicles with four and more wheels as (painter, x, z, yaw)."""
    things, blocked, busy = [], 60., set()
    middle = plan.road[1] - 3.9
    lanes = {'own': (max(middle + 1.9, 0.), 0.), 'oncoming': (min(middle - 1.8, -2.), np.pi)}
    if plan.tram:
        things.append((train, -6., rng.uniform(7, 10), rng.choice([0, np.pi])))
    for kind, painter in ((TRUCK, truck), (BUS, bus)):
        if kind not in wanted:
            continue
        if not plan.tram and rng.random() < .35:  # it crosses the street: nothing to see behind
            blocked = rng.uniform(14, 17)
            if rng.random() < .5:
                busy.add('own')
            things.append((painter, rng.uniform(-2.5, 2.5), blocked, crossing(rng)))
        else:
            lane = 'own' if plan.tram or rng.random() < .5 else 'oncoming'
            busy.add(lane)
            x, yaw = lanes[lane]
            things.append((painter, x, rng.uniform(9.5, 13.5), yaw))
    for lane, (x, yaw) in lanes.items():
        for z in np.arange(rng.uniform(8.5, min(14, blocked - 5)), 60, rng.uniform(8, 18)):
            if lane not in busy and z + 5 < blocked:
                things.append((car, x + rng.uniform(-.3, .3), z, yaw))
    if rng.random() < .3 and not busy and blocked == 60:
        z = rng.uniform(8.5, 10)
        things = [thing for thing in things if thing[0] is not car or thing[2] > z + 3]
        things.append((car, rng.uniform(-2.5, 1.5), z, crossing(rng)))
    parking = [(plan.road[1] - .7, 0.)]
    if not plan.tram and plan.road[-1] <= -6:
        parking.insert(0, (plan.road[-1] + 1., np.pi))
    for x, yaw in parking:
        for z in np.arange(rng.uniform(9.5, 15), 55, rng.uniform(5.6, 7)):
            if rng.random() < .7 and not blocked - 5 < z < blocked + 3:
                things.append((car, x, z, yaw))
    return things


def crossing(rng):
    """Draw the yaw of a vehicle that crosses the street."""
    return rng.choice([-1, 1]) * np.pi / 2


def two_wheelers(rng, plan, wanted):
    """List bicycles and motorcycles as (painter, x, z, ridden)."""
    spots = rng.permutation([(rng.uniform(1., plan.road[1] - .4), rng.uniform(5.5, 7.5)),
                             (rng.uniform(-3., -1.2), rng.uniform(5.8, 8.)),
                             (rng.uniform(plan.road[1] + .5, plan.walk[1] - .3),
                              rng.uniform(7, 8.5))])
    todo = [(painter, RIDER in wanted and (kind == BIKE or BIKE not in wanted))
            for kind, painter in ((BIKE, bicycle), (MOTO, motorcycle)) if kind in wanted]
    if rng.random() < .5:
        todo.append((bicycle if rng.random() < .6 else motorcycle, rng.random() < .6))
    return [(painter, x, z, ridden)
            for (painter, ridden), (x, z) in zip(todo, spots, strict=False)]


def street_side(rng, plan, wanted):
    """List the people, poles, lights, signs, plants and bins as (painter, x, z, ...)."""
    things = []

    def put(painter, side, off, z, *more):  # off: metres outwards from the kerb
        if not (side < 0 and plan.tram and z < 36):  # else it would stand behind the tram
            things.append((painter, plan.road[side] + side * off, z, *more))

    if rng.random() < .5:
        put(person, 1, rng.uniform(.5, 1.4), rng.uniform(6.3, 8.5))
    else:
        z = rng.uniform(7, 10)
        things.append((person, rng.uniform(-2.5, 1.5), z))
    for _ in range(rng.integers(3, 8)):
        put(person, rng.choice(SIDES), rng.uniform(.4, 1.5), rng.uniform(9, 26))
    put(traffic_sign, 1, rng.uniform(.2, .5), rng.uniform(7.5, 9.5))
    if rng.random() < .6:
        put(traffic_sign, rng.choice(SIDES), .4, rng.uniform(10, 18))
    if LIGHT in wanted or rng.random() < .3:
        put(traffic_light, 1, .35, rng.uniform(9, 12), rng.choice([0, -2.2, -3.]))
        put(traffic_light, -1, .35, rng.uniform(12, 16), rng.choice([0, 2.2]))
    for side in SIDES:
        for z in np.arange(rng.uniform(5.5, 9) + (side < 0) * 4, 60, rng.uniform(9, 14)):
            put(pole, side, .3, z, rng.uniform(4, 7.5), rng.choice([0, -1.6 * side]))
        walk = abs(plan.walk[side] - plan.road[side])
        for z in np.arange(rng.uniform(7, 16), 70, rng.uniform(7, 16)):
            if rng.random() < .65:
                put(tree, side, walk + rng.uniform(-.2, .3), z, rng.uniform(4, 8))
    if rng.random() < .5:
        put(bush, 1, walk, rng.uniform(7, 11), 2., rng.uniform(.8, 1.6))
    if rng.random() < .5:
        put(litter_bin, 1, rng.uniform(.4, 1.4), rng.uniform(8, 14))
    return things
