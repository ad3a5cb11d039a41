"""Generated street scenes in the exact Cityscapes layout, for tests and quick trials.

Every scene is a small 3-D street (metres; x right, y up, z ahead of the camera) projected by a
pin-hole camera and painted back to front, so near things hide far ones and shrink with distance.
Only numpy and OpenCV are needed. ::

    python tools/toy_cityscapes data/toy --train 400 --val 100 --size 128 256 --seed 0
"""
from .compose import scene
from .files import generate

__all__ = ['generate', 'scene']
