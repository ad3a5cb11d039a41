"""Kernel normalization for MMSegmentation.

Importing this package registers ``KN``, ``KNConv``, ``KNResNet``, ``KNResNetCls``, ``KNConvNeXt``
and ``KernelNormalized``; a config does so with
``custom_imports=dict(imports=['mmseg_kn'], allow_failed_imports=False)``.
"""
from . import stack

stack.setup()  # before anything below imports mmseg

from . import datasets, engine, ops  # noqa: E402, F401
from ._version import __version__  # noqa: E402, F401
from .checkpoints import safe_load  # noqa: E402
from .engine import binary_tta, launch  # noqa: E402
from .models import (  # noqa: E402
    KernelNorm2d,
    KNConv2d,
    KNConvNeXt,
    KNConvNeXtClassifier,
    KNResNet,
    KNResNetClassifier,
    KNResNetCls,
    conversion_table,
    kernelize,
)

safe_load.setup()
launch.setup()
binary_tta.setup()

__all__ = [
    'KNConv2d', 'KNConvNeXt', 'KNConvNeXtClassifier', 'KNResNet', 'KNResNetClassifier',
    'KNResNetCls', 'KernelNorm2d', 'conversion_table', 'kernelize', 'ops'
]
