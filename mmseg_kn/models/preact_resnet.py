"""PreActResNet, with which the paper's Table 1 compares as well.

Source: K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016,
https://arxiv.org/abs/1603.05027, in the form of the authors' repository norm-torch.
"""
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

# Blocks of each stage, and whether they are bottlenecks.
ARCHS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}


class PreActBlock(nn.Module):
    """Residual block of normalization, ReLU and convolution, in this order, two or three times.

    Where the block changes size or channels, a 1x1 convolution of the first rectified map takes
    the place of the input.

    Args:
        in_channels: Channels of the input.
        channels: Inside the block.
        stride: Of the first 3x3 convolution.
        norm_cfg: For mmcv's ``build_norm_layer``.
        bottleneck: 1x1, 3x3 and 1x1 to four times the channels, in place of twice 3x3.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm_cfg: dict,
                 bottleneck: bool) -> None:
        super().__init__()
        self.out_channels = 4 * channels if bottleneck else channels
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (in_channels, *[channels] * (len(kernels) - 1), self.out_channels)
        self.norms, self.convs = nn.ModuleList(), nn.ModuleList()
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            self.norms.append(build_norm_layer(norm_cfg, widths[i])[1])
            self.convs.append(nn.Conv2d(widths[i], widths[i + 1], kernel, step, kernel // 2,
                                        bias=False))
        self.shortcut = None
        if stride != 1 or in_channels != self.out_channels:
            self.shortcut = nn.Conv2d(in_channels, self.out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        identity = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            y = conv(F.relu(norm(y)))
        return y + identity


@MODELS.register_module()
class PreActResNetCls(BaseModule):
    """PreActResNet as a backbone of mmpretrain's ``ImageClassifier``.

    Args:
        depth: 18, 34 or 50.
        norm_cfg: ``dict(type='BN')``, ``dict(type='GN', num_groups=32)``, or LayerNorm as the
            authors have it, ``dict(type='GN', num_groups=1)``.
        low_resolution: For small images (CIFAR): the stem is a 3x3 convolution with stride 1, and
            nothing else.
        in_channels: Channels of the image.
        init_cfg: For mmengine; None: Kaiming normal, fan out.

    Shape:
        (N, in_channels, H, W) to a tuple of one (N, C, h, w), C = 512, or 2048 for depth 50.

    Raises:
        ValueError: There is no such depth.
    """

    def __init__(self, depth: int, norm_cfg: dict, low_resolution: bool = False,
                 in_channels: int = 3, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg or dict(type='Kaiming', layer='Conv2d'))
        if depth not in ARCHS:
            raise ValueError(f'depth must be one of {tuple(ARCHS)}, got {depth}')
        blocks, bottleneck = ARCHS[depth]
        self.depth = depth
        self.stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False) if low_resolution else (
            nn.Sequential(
                nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False),
                build_norm_layer(norm_cfg, 64)[1], nn.ReLU(), nn.MaxPool2d(3, 2, 1)))
        layers, channels = [], 64
        for i, count in enumerate(blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(PreActBlock(channels, 64 * 2**i, stride, norm_cfg, bottleneck))
                channels = layers[-1].out_channels
        self.blocks = nn.Sequential(*layers)
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.feat_dim = channels

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (F.relu(self.norm(self.blocks(self.stem(x)))), )
