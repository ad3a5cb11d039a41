"""Layers and networks of kernel normalization, and the conversion of other networks."""
from .kernel_normalized import KernelNormalized
from .kernelize import conversion_table, kernelize
from .knconvnext import KNConvNeXt
from .knconvnext_cls import KNConvNeXtClassifier
from .knresnet import KNResNet
from .knresnet_cls import KNResNetClassifier, KNResNetCls
from .layers import KernelNorm2d, KNConv2d

__all__ = [
    'KNConv2d', 'KNConvNeXt', 'KNConvNeXtClassifier', 'KNResNet', 'KNResNetClassifier',
    'KNResNetCls', 'KernelNorm2d', 'KernelNormalized', 'conversion_table', 'kernelize'
]
