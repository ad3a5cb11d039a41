"""KNConvNeXt for image classification: the authors' network.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089, and their repository
norm-torch.
"""
from collections.abc import Mapping

from torch import Tensor, nn

from .knconvnext import NUM_STAGES, KNConvNeXt


class KNConvNeXtClassifier(nn.Module):
    """The authors' ``knconvnext_tiny`` and its larger relatives: images to logits.

    A plain module: :class:`KNConvNeXt`, global average pooling, LayerNorm, and a linear layer.
    Its keys, ``backbone.*`` and ``head.fc.*``, are those of mmpretrain's ``ImageClassifier`` with
    ``dict(type='KNConvNeXt', out_indices=(3, ), gap_before_final_norm=True)`` and a
    ``LinearClsHead``, so that checkpoints go both ways.

    Args:
        arch: As in :class:`KNConvNeXt`.
        num_classes: Number of logits.
        in_channels: Channels of the image.
        drop_path_rate: Stochastic depth, see :class:`KNConvNeXt`.
        layer_scale_init_value: At which the scale of every block's channels starts.
        dropout_p: Dropout of the statistics of the downsamplings, in [0, 1). Evaluation is
            deterministic: it uses the expectation over it, where the authors' code goes on
            dropping.
        with_cp: Gradient checkpointing of the blocks.

    Shape:
        (N, in_channels, H, W) to (N, num_classes); H and W are at least 32.

    Raises:
        ValueError: As :class:`KNConvNeXt`.

    Example:
        >>> net = KNConvNeXtClassifier('tiny', num_classes=10).eval()
        >>> net(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self,
                 arch: str | Mapping = 'tiny',
                 num_classes: int = 1000,
                 in_channels: int = 3,
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6,
                 dropout_p: float = 0.1,
                 with_cp: bool = False) -> None:
        super().__init__()
        self.backbone = KNConvNeXt(arch, in_channels, (NUM_STAGES - 1, ), drop_path_rate,
                                   layer_scale_init_value, dropout_p, with_cp=with_cp,
                                   gap_before_final_norm=True)
        fc = nn.Linear(self.backbone.feat_dim, num_classes)
        nn.init.trunc_normal_(fc.weight, std=0.02)
        nn.init.zeros_(fc.bias)
        self.head = nn.ModuleDict(dict(fc=fc))

    def forward(self, x: Tensor) -> Tensor:
        return self.head['fc'](self.backbone(x)[-1].flatten(1))
