"""What KernelNorm is compared with, where mmseg has no such layer."""
import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads import ASPPHead
from mmseg.registry import MODELS as MMSEG_MODELS
from torch import Tensor, nn


@MODELS.register_module()
class NoNorm(nn.Module):
    """y = weight * x + bias for each channel: what BatchNorm does, but for normalizing.

    As ``norm_cfg=dict(type='NoNorm')`` it takes BatchNorm's place, ``zero_init_residual``
    included, so that two networks differ in the normalization alone.

    Args:
        num_features: Channels C of the input.
        eps: Without effect; mmcv passes it to every normalization.

    Shape:
        (N, C, H, W) to the same.
    """

    _abbr_ = 'nonorm'

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return str(self.num_features)


@MMSEG_MODELS.register_module()
class PlainPoolASPPHead(ASPPHead):
    """mmseg's ``ASPPHead`` whose image pooling branch has no normalization.

    That branch is one pixel large: with one image per GPU, BatchNorm has a single value per
    channel there and refuses to train. Everything else, arguments included, is as in ASPPHead.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvModule(self.in_channels, self.channels, 1, conv_cfg=self.conv_cfg,
                       norm_cfg=None, act_cfg=self.act_cfg))
