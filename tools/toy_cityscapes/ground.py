"""Sky, road, sidewalks and grass: what fills the picture before anything stands in it."""
import cv2
import numpy as np

from .labels import ROAD, SIDEWALK, SKY, TERRAIN


def paint_sky(street):
    """Fill the canvas with sky: gradient, clouds, sometimes burnt out towards the top."""
    rng, (h, w) = street.rng, street.size
    kind = rng.random()
    top = np.array([.80, .55, .34] if kind < .55 else [.70, .68, .66])
    rise = np.linspace(0, 1, h, dtype=np.float32)[:, None, None] * h / max(street.horizon, 1)
    sky = np.float32(top * rng.uniform(.7, 1.15)) * (1 - rise) + np.float32(street.haze) * rise
    clouds = sum(cv2.resize(rng.random((n, 2 * n), np.float32), (w, h),
                            interpolation=cv2.INTER_CUBIC) / n * 4 for n in (4, 8, 16))
    clouds = np.clip((clouds - rng.uniform(.7, 1.3)) * rng.uniform(.6, 1.6), 0, 1)[..., None]
    street.image[:] = sky + clouds * (np.float32(.97) - sky)
    if kind > .8:
        street.image += np.float32(rng.uniform(.2, .5)) * np.clip(1.3 - 1.3 * rise, 0, 1)
    street.label[:] = SKY


def markings(rng, plan, x, z):
    """Return (R, W) bool: painted lines at ground points x (R, W), z (R, 1)."""
    middle = -1.9 if plan.tram else plan.road[1] - rng.uniform(3.6, 4.2)
    lines = (np.abs(x - middle) < .09) & ((z + rng.uniform(0, 6)) % 6 < rng.choice([3, 6]))
    if rng.random() < .6:
        for side, edge in plan.road.items():
            lines |= np.abs(x - edge + .35 * side) < .07
    if rng.random() < .45:
        start = rng.uniform(5, 14)
        zebra = (z > start) & (z < start + 3.2) & ((x + 50) % 1.1 < .55)
        lines |= zebra & (x > plan.road[-1] + .3) & (x < plan.road[1] - .3)
    return lines


def paint_ground(street, plan):
    """Paint road, kerbs, sidewalks and grass below the horizon, with texture and sun shadow."""
    rng, (h, w) = street.rng, street.size
    first = int(street.horizon) + 1
    z = (street.focal * street.height / (np.arange(first, h) + .5 - street.horizon))[:, None]
    x = (np.arange(w) + .5 - street.centre) * z / street.focal - street.bend * z * z
    z, x = z.astype(np.float32), x.astype(np.float32)
    asphalt = np.array([.36, .35, .35]) * rng.uniform(.6, 1.25)
    paving = np.array([.44, .46, .48]) * rng.uniform(.65, 1.3) + rng.normal(0, .02, 3)
    turf = np.array([.20, .42, .36]) * rng.uniform(.7, 1.2) + rng.normal(0, .03, 3)
    paved, kerb = (paving, SIDEWALK), (paving * 1.2, SIDEWALK)
    verge = {side: (turf, TERRAIN) if grass else paved for side, grass in plan.grass.items()}
    colours, labels = zip(verge[-1], paved, kerb, (asphalt, ROAD), kerb, paved, verge[1],
                          strict=True)
    edges = (plan.walk[-1], plan.road[-1] - .2, plan.road[-1],
             plan.road[1], plan.road[1] + .2, plan.walk[1])
    band = sum((x > edge).astype(np.uint8) for edge in edges)
    ground, labels = np.float32(colours)[band], np.array(labels, np.uint8)[band]

    side = len(street.rough)
    u, v = (np.abs((axis * (side / 40) + rng.uniform(0, side)) % (2 * side - 2) - side + 1)
            for axis in (x, z))  # mirrored: no seams; 40 metres a tile
    rough, leafy = (cv2.remap(texture, u, np.broadcast_to(v, u.shape), cv2.INTER_LINEAR)
                    for texture in (street.rough, street.leafy))
    ground *= (1 + np.exp(-z / 25) * np.where(labels == TERRAIN, .75 * leafy, .28 * rough)
               )[..., None]
    joints = (x % rng.uniform(.5, 1.) < .07) | (z % rng.uniform(.5, 1.) < .07)
    ground[joints & (labels == SIDEWALK)] *= .72
    ground[(labels == ROAD) & markings(rng, plan, x, z)] = .82 + rng.uniform(-.15, .15)
    if plan.tram:
        rails = np.abs(np.abs(x + 6.) - .72) < .07
        ground[rails & (labels == ROAD)] = .22
    if street.sunny:  # the houses towards the sun throw a ragged shadow over the street
        reach = rng.uniform(1., 6.) + 1.2 * np.sin(z / 4 + rng.uniform(0, 6)).round()
        dark = (plan.line[1] - x < reach) if street.sun[0] > 0 else (x - plan.line[-1] < reach)
        ground *= np.where(dark, 1 - .45 * street.sunny, 1 + .1 * street.sunny)[..., None]
    fade = np.exp(-z / street.clear)[..., None]
    street.image[first:] = ground * fade + np.float32(street.haze) * (1 - fade)
    street.label[first:] = labels
