"""Data sets that check their files."""
from .cityscapes import KNCityscapesDataset

__all__ = ['KNCityscapesDataset']
