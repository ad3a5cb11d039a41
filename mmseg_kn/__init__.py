"""Kernel normalization for MMSegmentation.

Importing this package registers ``KN``, ``KNConv``, ``KNResNet`` and ``KNResNetCls``; a config
does so with ``custom_imports=dict(imports=['mmseg_kn'], allow_failed_imports=False)``.
"""
from . import compat

compat.setup()

from . import channels_last, checkpoint, class_check, datasets, hooks, ops, resume  # noqa: E402, F401
from .classification import KNResNetClassifier, KNResNetCls  # noqa: E402
from .knresnet import KNResNet  # noqa: E402
from .layers import KernelNorm2d, KNConv2d  # noqa: E402

__version__ = '0.1.0'

__all__ = [
    'KNConv2d', 'KNResNet', 'KNResNetClassifier', 'KNResNetCls', 'KernelNorm2d', 'ops'
]
