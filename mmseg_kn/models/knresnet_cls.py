"""KNResNet for image classification: the authors' networks, which ImageNet weights come from.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089, and their repository
norm-torch. The trunk is that of :class:`mmseg_kn.KNResNet`; depth 101 is ours.
"""
from mmengine.registry import MODELS
from torch import Tensor, nn

from .activation import build_activation
from .initializers import spread_biases
from .knresnet import Trunk
from .knresnet_stages import ARCHS, classifier_stages
from .layers import KernelNorm2d, KNConv2d
from .max_pool import max_pool2d

TAIL_CHANNELS = 512


# In mmengine's root registry: mmpretrain and mmseg both find it from there.
@MODELS.register_module()
class KNResNetCls(Trunk):
    """KNResNet as a backbone of image classifiers, mmpretrain's ``ImageClassifier`` above all.

    After the stages, depths 18 and 34 have a tail: max pool 2/2, relu, KNConv 2x2 to 512
    channels. The output passes KernelNorm 1x1, with five times the dropout, and relu. But for
    those of low resolution, whose stem is another, its checkpoints fit
    :class:`mmseg_kn.KNResNet`, whose keys are the same without the tail's.

    Args:
        depth: 18, 34, 50 or 101.
        in_channels: Channels of the image; values in [0, 1], not shifted by a mean.
        low_resolution: For small images (CIFAR): the stem is a 3x3 convolution with stride 1.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and stages 1 to i.
        with_cp: Gradient checkpointing of the blocks: less memory, more time.
        dropout_p: Dropout of the statistics in every layer, in [0, 1); in the last, without
            weights, it is min(5 * dropout_p, 0.25).
        zero_init_residual: Start every residual block as identity; the authors do not.
        activation: As in :class:`mmseg_kn.KNResNet`; the authors' for private training is
            ``'mish'``.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or None: from scratch.

    Shape:
        (N, in_channels, H, W) to a tuple of one (N, C, h, w), as mmpretrain's necks take it.
        C is 512 for depths 18 and 34, 2048 for 50 and 101 (``feat_dim``).

    Raises:
        ValueError: An argument does not fit, the image is too small for the depth, or a state
            dict of another architecture is loaded.
    """

    def __init__(self,
                 depth: int,
                 in_channels: int = 3,
                 low_resolution: bool = False,
                 frozen_stages: int = -1,
                 with_cp: bool = False,
                 dropout_p: float = 0.05,
                 zero_init_residual: bool = False,
                 activation: str = 'relu',
                 init_cfg: dict | None = None) -> None:
        stages = classifier_stages(depth, low_resolution)
        super().__init__(depth, stages, in_channels=in_channels, frozen_stages=frozen_stages,
                         with_cp=with_cp, dropout_p=dropout_p,
                         zero_init_residual=zero_init_residual, activation=activation,
                         init_cfg=init_cfg, low_resolution=low_resolution)
        self.act, fused = build_activation(self.activation)
        self.feat_dim = stages[-1].channels
        # The smallest image that leaves the last stage, and the tail, a position.
        self.min_size = 8 if low_resolution else 29
        self.tail = None
        if not ARCHS[depth].bottleneck:
            self.tail = KNConv2d(self.feat_dim, TAIL_CHANNELS, 2, padding=int(low_resolution),
                                 dropout_p=dropout_p, input_activation=fused, keep_output=True)
            if self.activation != 'relu':
                spread_biases(self.tail)
            self.feat_dim = TAIL_CHANNELS
            self.min_size = 16 if low_resolution else 93
        self.norm = KernelNorm2d(self.feat_dim, dropout_p=min(5 * dropout_p, 0.25),
                                 activation=fused)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if x.dim() == 4 and min(x.shape[2:]) < self.min_size:
            raise ValueError(f'KNResNet-{self.depth} classifies images of at least '
                             f'{self.min_size} pixels a side, got {tuple(x.shape[2:])}; enlarge '
                             'them' + (', or set low_resolution=True' if self.stem_pool else ''))
        x = self.forward_stem(x)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        if self.tail is not None:
            x = self.tail(self.act(max_pool2d(x, 2, 2)))
        return (self.act(self.norm(x)), )


class KNResNetClassifier(nn.Module):
    """The authors' ``knresnet18``, ``knresnet34`` and ``knresnet50``: images to logits.

    A plain module: :class:`KNResNetCls`, global average pooling, and a linear layer. Its keys,
    ``backbone.*`` and ``head.fc.*``, are those of mmpretrain's ``ImageClassifier`` with a
    ``LinearClsHead``, so that checkpoints go both ways.

    Args:
        depth: 18, 34, 50 or 101.
        num_classes: Number of logits.
        low_resolution: For small images (CIFAR): the stem is a 3x3 convolution with stride 1.
        dropout_p: Dropout of the statistics, in [0, 1). Evaluation is deterministic: it uses
            the expectation over it, where the authors' code goes on dropping.
        in_channels: Channels of the image; values in [0, 1], not shifted by a mean.
        activation: As in :class:`KNResNetCls`.

    Shape:
        (N, in_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: As :class:`KNResNetCls`.

    Example:
        >>> net = KNResNetClassifier(18, num_classes=10, low_resolution=True).eval()
        >>> net(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self,
                 depth: int,
                 num_classes: int = 1000,
                 low_resolution: bool = False,
                 dropout_p: float = 0.05,
                 in_channels: int = 3,
                 activation: str = 'relu') -> None:
        super().__init__()
        self.backbone = KNResNetCls(depth, in_channels, low_resolution, dropout_p=dropout_p,
                                    activation=activation)
        fc = nn.Linear(self.backbone.feat_dim, num_classes)
        nn.init.zeros_(fc.bias)
        self.head = nn.ModuleDict(dict(fc=fc))

    def forward(self, x: Tensor) -> Tensor:
        return self.head['fc'](self.backbone(x)[-1].mean((2, 3)))
