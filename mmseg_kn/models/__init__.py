"""Layers and networks of kernel normalization."""
from .knresnet import KNResNet
from .knresnet_cls import KNResNetClassifier, KNResNetCls
from .layers import KernelNorm2d, KNConv2d

__all__ = ['KNConv2d', 'KNResNet', 'KNResNetClassifier', 'KNResNetCls', 'KernelNorm2d']
