"""Flat shapes as corner points (..., 2), and the planes that place them in the world (..., 3)."""
import numpy as np

ALONG = np.pi / 2


def pack(*parts):
    """Stack broadcastable arrays along a new last axis, as float; np.stack is slower."""
    packed = np.empty((*np.broadcast_shapes(*map(np.shape, parts)), len(parts)))
    for axis, part in enumerate(parts):
        packed[..., axis] = part
    return packed


def rects(u0, u1, v0, v1):
    """Corners (4, 2) or, where an edge is given as (N,), (N, 4, 2) of upright rectangles."""
    return pack(pack(u0, u1, u1, u0), pack(v0, v0, v1, v1))


def bar(start, end, wide):
    """Corners (4, 2) of a straight bar of the given width between two (2,) points."""
    start, end = np.array((start, end), float)
    u, v = end - start
    half = np.array((-v, u)) * (wide / 2 / np.hypot(u, v))
    return np.array((start + half, end + half, end - half, start - half))


def disc(u, v, radius, tall=1., corners=14, turn=0.):
    """Corners (corners, 2) of a polygon round (u, v), `tall` times as high as wide, turned."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + turn
    return pack(np.cos(angle), np.sin(angle)) * (radius, radius * tall) + (u, v)


def upright(x, z, yaw=0., scale=1.):
    """Return a map from points on an upright plane at x, z to world: scaled, turned by yaw.

    The plane faces the camera at yaw 0 and runs along the street at ALONG.
    """
    def world(points):
        points = np.asarray(points) * scale
        u, v = points[..., 0], points[..., 1]
        return pack(x + u * np.cos(yaw), v, z + u * np.sin(yaw))
    return world
