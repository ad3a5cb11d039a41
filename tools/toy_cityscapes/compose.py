"""Whole pictures: paint everything in order, develop as a camera would, check what shows."""
import cv2
import numpy as np

from .ground import paint_ground, paint_sky
from .houses import backdrop, houses
from .labels import COMMON, EGO, TRAIN_IDS, TURNS
from .layout import SIDES, make_plan, street_side, traffic, two_wheelers
from .roadside import barriers
from .street import Street
from .vehicles import train

MIN_SIZE = (64, 96)


def bonnet(street):
    """Paint the own car's bonnet at the lower edge: void."""
    rng, (h, w) = street.rng, street.size
    high, colour = h * rng.uniform(.04, .09), street.paint() * .6
    middle = (int(w * rng.uniform(.46, .54)), h)
    for shrink, gain in ((1, 1.), (.7, 1.25), (.4, 1.5)):
        axes = (int(w * .52 * shrink ** .3), int(high * shrink))
        cv2.ellipse(street.image, middle, axes, 0, 180, 360, (colour * gain).tolist(), -1)
        cv2.ellipse(street.label, middle, axes, 0, 180, 360, EGO, -1)


def compose(street, wanted):
    """Paint all of a scene, far to near, with the wanted label ids in the foreground."""
    rng = street.rng
    plan = make_plan(rng, wanted)
    paint_sky(street)
    paint_ground(street, plan)
    backdrop(street)
    for side in SIDES:
        houses(street, plan, side)
    barriers(street, plan, wanted)
    things = [*traffic(rng, plan, wanted), *two_wheelers(rng, plan, wanted),
              *street_side(rng, plan, wanted)]
    # By z, but the tram by its far end: it stands beside the lanes and is longer than any gap.
    things.sort(key=lambda thing: -thing[2] - 24 * (thing[0] is train))
    for painter, *where in things:
        painter(street, *where)
    if rng.random() < .6:
        bonnet(street)


def develop(rng, image):
    """Turn float BGR (H, W, 3) into uint8 as a camera would: lens, exposure, colour, noise."""
    h, w = image.shape[:2]
    y, x = np.ogrid[-1:1:h * 1j, -1:1:w * 1j]
    image = image * (rng.uniform(.75, 1.25)
                     * (1 - rng.uniform(0, .25) * (x * x + y * y))).astype(np.float32)[..., None]
    warm = rng.uniform(-.1, .1)
    image *= np.float32([1 - warm, 1 + rng.normal(0, .02), 1 + warm])
    image = (image - np.float32(.4)) * np.float32(rng.uniform(.8, 1.2)) + np.float32(.4)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(.75, 1.15))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(.2, .6) * max(h / 256, 1))
    image += rng.normal(0, rng.uniform(.004, .02), image.shape).astype(np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def check_size(size):
    """Raise ValueError unless size is (H, W), whole numbers, at least MIN_SIZE."""
    if len(size) != 2 or any(int(n) != n or n < least
                             for n, least in zip(size, MIN_SIZE, strict=True)):
        raise ValueError(f'size must be whole numbers H W of at least {MIN_SIZE[0]} '
                         f'{MIN_SIZE[1]}, got {tuple(size)}')


def draw(rng, size, turn):
    """Like `scene`, but with Cityscapes label ids instead of train ids."""
    check_size(size)
    h, w = (int(n) for n in size)
    times = 3 if h * w <= 2 ** 18 else 2
    wanted = {*COMMON, *TURNS[turn % len(TURNS)]}
    enough = max(6, h * w // 1000)
    for _ in range(60):
        street = Street(rng, (h * times, w * times))
        compose(street, wanted)
        label = street.label[times // 2::times, times // 2::times]
        if (np.bincount(label.ravel(), minlength=256)[list(wanted)] >= enough).all():
            break
    else:
        raise RuntimeError(f'no scene of size {h} x {w} shows all wanted classes')
    image = develop(rng, cv2.resize(street.image, (w, h), interpolation=cv2.INTER_AREA))
    if rng.random() < .5:
        image, label = image[:, ::-1], label[:, ::-1]
    return np.ascontiguousarray(image), np.ascontiguousarray(label)


def scene(rng, size=(128, 256), turn=None):
    """Draw one street scene.

    Args:
        rng (numpy.random.Generator): Decides everything about the scene.
        size (tuple[int]): (H, W) in pixels, at least (64, 96). Default (128, 256).
        turn (int): Which of four groups of rarer classes must show; None draws one. Default None.

    Returns:
        tuple[array]: Image (H, W, 3) uint8 in BGR order and train ids (H, W) uint8, 255 void.

    Raises:
        ValueError: A bad size.
        RuntimeError: No scene of this size shows all wanted classes.
    """
    image, label = draw(rng, size, rng.integers(len(TURNS)) if turn is None else turn)
    return image, TRAIN_IDS[label]
