"""Data sets that check their files."""
from .cityscapes import KNCityscapesDataset
from .imagenet32 import ImageNet32

__all__ = ['ImageNet32', 'KNCityscapesDataset']
