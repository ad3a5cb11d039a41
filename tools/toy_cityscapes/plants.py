"""Trees and bushes."""
import numpy as np

from .labels import PLANT
from .shapes import bar, disc, pack, upright


def foliage(street, blobs, z):
    """Paint leaf blobs (N, 3) of (x, y, radius) at depth z, lit from the sun's side."""
    rng = street.rng
    base = np.array([.14, .34, .26] if rng.random() < .8 else [.14, .34, .40])
    colour = np.clip(base * rng.uniform(.6, 1.3) + rng.normal(0, .02, 3), .02, 1)
    light = np.sign(street.sun[0]) * blobs[:, 0] + blobs[:, 1] * 1.5
    light = (light - light.mean()) / (light.std() + 1e-6)
    for index in np.argsort(light, kind='stable'):
        x, y, radius = blobs[index]
        lumpy = disc(x, y, radius, corners=18)
        lumpy += rng.normal(0, radius * .12, lumpy.shape)
        street.fill(upright(0, z)(lumpy), np.clip(colour * (1 + .16 * light[index]), 0, 1), PLANT,
                    grain=.85, leafy=True)


def tree(street, x, z, tall):
    """Paint a tree with a trunk, about `tall` metres high."""
    rng = street.rng
    trunk = bar((x, 0), (x + rng.normal(0, .1), tall * .6), .13 + tall * .03)
    street.fill(upright(0, z)(trunk), np.array([.16, .20, .24]) * rng.uniform(.7, 1.4), PLANT, .4)
    n, crown = 9 if z < 25 else 5, tall * rng.uniform(.22, .32)
    foliage(street, pack(x + rng.normal(0, crown * .55, n),
                         tall * .68 + rng.normal(0, crown * .5, n),
                         crown * rng.uniform(.4, .7, n)), z)


def bush(street, x, z, wide, tall):
    """Paint a bush or hedge of wide x tall metres standing on the ground."""
    rng, n = street.rng, 7 if z < 25 else 4
    foliage(street, pack(x + np.linspace(-.4, .4, n) * wide, tall * rng.uniform(.4, .6, n),
                         tall * rng.uniform(.42, .55, n)), z)
