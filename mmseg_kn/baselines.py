"""What KernelNorm is compared with, where mmseg has no such layer."""
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.registry import MODELS
from mmseg.models.backbones import ResNet
from mmseg.models.decode_heads import ASPPHead, FCNHead
from mmseg.registry import MODELS as MMSEG_MODELS
from torch import Tensor, nn

from .models.activation import activation_name, build_activation
from .models.knconvnext import EPS, KNConvNeXt, LayerNorm2d
from .models.knresnet import KNResNet
from .models.layers import KernelNorm2d, KNConv2d
from .models.preact_resnet import PreActResNetCls  # noqa: F401 (configs name it by this module)
from .ops.geometry import make_geometry


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


@MMSEG_MODELS.register_module()
class PaperFCNHead(FCNHead):
    """mmseg's ``FCNHead`` whose dropout is of single elements, as in the paper's Table 3.

    FCNHead drops whole channels, and has no argument for anything else. Arguments, weights and
    evaluation are as in FCNHead.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        if self.dropout is not None:
            self.dropout = nn.Dropout(self.dropout_ratio)


class NormConv2d(nn.Conv2d):
    """y = conv(norm(x), W) + b, in a :class:`KNConv2d`'s place and with its weights.

    Args:
        norm: Normalizes the input, (N, C, H, W) to the same.
        conv: Whose geometry, weights and activation to take.

    Shape:
        As ``conv``.
    """

    def __init__(self, norm: nn.Module, conv: KNConv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         dilation=conv.dilation)
        self.weight, self.bias, self.activation = conv.weight, conv.bias, conv.activation
        self.input_activation = conv.input_activation
        self.norm = norm
        self.sides = make_geometry(conv.kernel_size, padding=conv.padding).padding

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual``, if given, is added to the output, before the activation."""
        input = F.relu(input) if self.input_activation else input
        output = super().forward(F.pad(self.norm(input), self.sides))
        if residual is not None:
            output = output + residual
        return F.relu(output) if self.activation else output


@MMSEG_MODELS.register_module()
class NormKNResNet(KNResNet):
    """:class:`KNResNet`'s architecture with another normalization of every layer's input.

    For telling what the normalization does from what the architecture does. Pretrained weights
    of KNResNet have no such layers.

    Args:
        norm_cfg: For mmcv's ``build_norm_layer``, of 3 channels too: ``dict(type='BN')``, or
            ``dict(type='GN', num_groups=1)``.
        kwargs: As for KNResNet; ``dropout_p`` has no effect.

    Shape:
        As KNResNet.

    Raises:
        ValueError: As KNResNet does, or the normalization does not fit the channels.
    """

    def __init__(self, norm_cfg: dict, **kwargs) -> None:
        super().__init__(**kwargs)

        def norm(channels):
            return build_norm_layer(norm_cfg, channels)[1]

        for name, layer in list(self.named_modules()):
            if isinstance(layer, KNConv2d):
                self.set_submodule(name, NormConv2d(norm(layer.in_channels), layer))
            elif isinstance(layer, KernelNorm2d):
                self.set_submodule(name, norm(layer.num_features))
        if self.activation == 'relu':
            # KernelNorm2d ends with a ReLU of its own there; other normalizations do not.
            self.act = nn.ReLU()
        self._freeze_stages()


@MODELS.register_module()
class ResNetCls(ResNet):
    """mmseg's ``ResNet`` as a backbone of image classifiers: the twin of ``KNResNetCls``.

    For mmpretrain's ``ImageClassifier``, whose own ResNets have no other activation than ReLU. It
    is torchvision's ResNet, with the authors' two changes: a stem for small images, and the
    activation of their private training.

    Args:
        depth: 18, 34, 50, 101 or 152.
        norm_cfg: ``dict(type='BN')``, ``dict(type='GN', num_groups=32)``, or LayerNorm as the
            authors have it, ``dict(type='GN', num_groups=1)``.
        low_resolution: For small images (CIFAR): the stem is a 3x3 convolution with stride 1, and
            there is no pool.
        activation: As in :class:`mmseg_kn.KNResNet`.
        zero_init_residual: Start every residual block as identity; the authors do not.
        kwargs: As for mmseg's ResNet.

    Shape:
        (N, 3, H, W) to a tuple of one (N, C, h, w), C = 512 for depths 18 and 34, else 2048.

    Raises:
        ValueError: There is no such activation.
    """

    def __init__(self, depth: int, norm_cfg: dict, low_resolution: bool = False,
                 activation: str = 'relu', zero_init_residual: bool = False, **kwargs) -> None:
        activation = activation_name(activation)
        super().__init__(depth=depth, norm_cfg=norm_cfg, out_indices=(3, ), norm_eval=False,
                         zero_init_residual=zero_init_residual, **kwargs)
        if low_resolution:
            self.conv1 = nn.Conv2d(self.conv1.in_channels, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        if activation != 'relu':
            for module in self.modules():
                if isinstance(getattr(module, 'relu', None), nn.ReLU):
                    module.relu = build_activation(activation)[0]


@MODELS.register_module()
class LNConvNeXt(KNConvNeXt):
    """ConvNeXt: :class:`KNConvNeXt` with LayerNorm in the downsamplings, as mmpretrain has it.

    For comparisons on the main stack, which has no mmpretrain. LayerNorm and a convolution 2x2
    with stride 2 take the place of ReLU and KNConv. Pretrained weights of KNConvNeXt have no such
    layers.

    Args:
        args: As for KNConvNeXt; ``dropout_p`` has no effect.
        kwargs: Likewise.

    Shape:
        As KNConvNeXt.

    Raises:
        ValueError: As KNConvNeXt does.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for i, layer in enumerate(self.downsample_layers):
            if isinstance(layer, KNConv2d):
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, 2, stride=2)
                conv.weight, conv.bias = layer.weight, layer.bias
                self.downsample_layers[i] = nn.Sequential(
                    LayerNorm2d(layer.in_channels, eps=EPS), conv)
        self._freeze_stages()
