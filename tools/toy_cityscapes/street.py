"""Canvas, camera and light of a scene: world metres in, painted and labelled pixels out."""
import functools
import itertools
import math

import cv2
import numpy as np

from .labels import STATIC
from .shapes import disc, pack

NEAR = 2.  # metres; nothing nearer is inside the picture at the sides
# Paints (BGR, 0..1) shared by vehicles, facades, walls and clothes: colour must not tell them.
PAINTS = np.array([[.80, .82, .83], [.55, .55, .55], [.30, .30, .31], [.12, .12, .13],
                   [.55, .32, .18], [.35, .20, .12], [.20, .18, .60], [.15, .14, .38],
                   [.55, .68, .76], [.45, .55, .66], [.30, .42, .52], [.28, .42, .24],
                   [.25, .66, .78], [.70, .62, .50]])


@functools.cache
def tile(side, cells):
    """Return a fixed (side, side) float32 noise of mean 0, about -1..1, in octaves of `cells`."""
    rng = np.random.Generator(np.random.PCG64(side))
    octaves = (cv2.resize(rng.normal(0, .4, (n, n)).astype(np.float32), (side, side),
                          interpolation=cv2.INTER_CUBIC) for n in cells)
    return sum(octaves) / np.sqrt(len(cells)).astype(np.float32)


class Street:
    """Canvas, camera and light of one scene.

    Args:
        rng (numpy.random.Generator): Source of every choice.
        size (tuple[int]): (H, W) of the canvas in pixels, supersampling included.
    """

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.image = np.zeros((*size, 3), np.float32)
        self.label = np.full(size, STATIC, np.uint8)
        unit = min(size[0], size[1] / 2)
        self.focal = unit * rng.uniform(1.15, 1.4)
        self.horizon = size[0] * rng.uniform(.38, .48)
        self.centre = size[1] * rng.uniform(.42, .58)
        self.height = rng.uniform(1.3, 1.6)
        self.bend = rng.normal(0, .0015)
        self.sun = np.array([rng.choice([-1, 1]) * rng.uniform(.4, 1), .7, -rng.uniform(-.6, .6)])
        self.sunny = rng.uniform(.25, 1) * (rng.random() < .7)
        self.haze = np.array([.86, .83, .80]) * rng.uniform(.8, 1.05)
        self.clear = rng.uniform(60, 260)  # metres over which haze takes 63 % of a colour
        side = int(unit * 1.5)
        self.rough = tile(side, (side // 2, side // 4, side // 16))
        self.leafy = tile(side, (side // 3, side // 6, side // 12, side // 24))

    def project(self, points):
        """Map world points (..., 3) in metres to pixels (..., 2), float."""
        z = np.maximum(points[..., 2], NEAR)
        return pack(self.centre + self.focal * (points[..., 0] / z + self.bend * z),
                    self.horizon + self.focal * (self.height - points[..., 1]) / z)

    def fill(self, points, colour, label=None, grain=0., opacity=1., leafy=False):
        """Paint world polygons, hazed by their distance.

        Args:
            points (array): (K, 3) one polygon or (N, K, 3) several; where two overlap, a hole.
            colour (array): BGR, 0..1.
            label (int): Label id; None keeps the labels below (a detail or a shadow).
            grain (float): Strength of the texture, 0 none. Default 0.
            opacity (float): 1 covers, less blends. Default 1.
            leafy (bool): Texture of leaves instead of plaster. Default False.
        """
        points = np.asarray(points, float)
        points = points[None] if points.ndim == 2 else points
        fade = math.exp(-points[..., 2].mean() / self.clear)
        colour = np.asarray(colour) * fade + self.haze * (1 - fade)
        polygons = np.rint(self.project(points)).astype(np.int32)
        if label is not None:
            cv2.fillPoly(self.label, list(polygons), label)
        if not grain and opacity == 1:
            cv2.fillPoly(self.image, list(polygons), colour.tolist())
            return
        left, top = np.clip(polygons.min((0, 1)), 0, None)
        right, bottom = np.minimum(polygons.max((0, 1)) + 1, self.size[::-1])
        if right <= left or bottom <= top:
            return
        mask = np.zeros((bottom - top, right - left), np.float32)
        cv2.fillPoly(mask, list(polygons - [left, top]), float(opacity))
        texture = self.leafy if leafy else self.rough
        spot = [(np.arange(n) + self.rng.integers(len(texture))) % len(texture)
                for n in mask.shape]  # a random place, wrapping round
        paint = np.float32(colour) * (1 + np.float32(grain * fade) * texture[np.ix_(*spot)][
            ..., None])
        part = self.image[top:bottom, left:right]
        part += mask[..., None] * (paint - part)

    def parts(self, plane, parts, label):
        """Paint (shape (..., 2), colour) after (shape, colour) on a plane, all with one label."""
        for shape, colour in parts:
            self.fill(plane(shape), colour, label)

    def prism(self, place, profile, width, colour, label, sides=(), ends=()):
        """Paint a side profile extruded to `width`, its visible faces far to near.

        Args:
            place (tuple[float]): x and z of the middle of the rear edge, and yaw (0 drives ahead).
            profile (array): (K, 2) of (along, up) in metres, from the rear bottom over the roof.
            width (float): Metres.
            colour (array): BGR.
            label (int): Label id.
            sides (sequence): (polygons, colour) painted on the visible side wall.
            ends (sequence): (edge index, rects (..., 4, 2) of (across -.5...5, up 0..1), colour)
                painted on that edge's face.
        """
        x, z, yaw = place
        sin, cos = np.sin(yaw), np.cos(yaw)

        def world(points, across):
            ahead, up = points[..., 0], points[..., 1]
            return pack(x + ahead * sin + across * cos, up, z + ahead * cos - across * sin)

        profile = np.asarray(profile, float)
        faces = [(world(np.array([a, b, b, a]), np.array([-.5, -.5, .5, .5]) * width), edge, 0)
                 for edge, (a, b) in enumerate(itertools.pairwise(profile))]
        faces += [(world(profile, sign * width / 2), None, sign) for sign in (-1, 1)]
        middle = world(profile.mean(0), 0.)
        eye = np.array([0, self.height, 0])
        for corners, edge, sign in sorted(faces, key=lambda face: -face[0][:, 2].mean()):
            normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
            normal *= np.sign(normal @ (corners.mean(0) - middle)) / np.linalg.norm(normal)
            if normal @ (eye - corners.mean(0)) <= 0:
                continue
            self.fill(corners, self.lit(colour, normal), label, grain=.06)
            if edge is None:
                for shape, tint in sides:
                    self.fill(world(np.asarray(shape), sign * width / 2), tint, label)
            for index, shape, tint in ends:
                if index == edge:
                    a, b = profile[edge:edge + 2]
                    spot = a + shape[..., 1, None] * (b - a)
                    self.fill(world(spot, shape[..., 0] * width), tint, label)

    def lit(self, colour, normal):
        """Shade a colour by the angle between a unit normal (3,) and the sun."""
        return np.asarray(colour) * (1 - .2 * self.sunny + .38 * self.sunny * (normal @ self.sun))

    def paint(self):
        """Draw a shared paint colour (BGR), jittered."""
        base = PAINTS[self.rng.integers(len(PAINTS))]
        return np.clip(base * self.rng.uniform(.75, 1.25) + self.rng.normal(0, .03, 3), .03, 1)

    def shadow(self, x, z, wide, deep):
        """Darken the ground softly below a thing of wide x deep metres at its near middle x, z."""
        for grow in (1.25, 1.1, .95):
            ground = disc(x, z + deep / 2, wide * .55 * grow, deep / wide)
            self.fill(pack(ground[:, 0], 0, ground[:, 1]), [.04] * 3, opacity=.28)
