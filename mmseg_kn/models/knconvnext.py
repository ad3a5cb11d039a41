"""KNConvNeXt: ConvNeXt whose downsamplings are kernel normalized.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089, and their repository
norm-torch: torchvision's ConvNeXt in which `ReLU, KNConv 2x2 / 2` takes the place of LayerNorm and
convolution in the three downsamplings. ConvNeXt: Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer,
T. Darrell, S. Xie, "A ConvNet for the 2020s", CVPR 2022, https://arxiv.org/abs/2201.03545. Added
here: outputs of every stage. Arguments and most names of weights are those of mmpretrain's
``ConvNeXt``.
"""
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.utils.checkpoint as cp
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.scale import LayerScale
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoints.diagnose import convnext_misfit
from .layers import KNConv2d

EPS = 1e-6  # of every LayerNorm
MIN_SIZE = 32  # the smallest image of which stage 4 keeps a position


class Arch(NamedTuple):
    """A size of ConvNeXt, for its four stages."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]


ARCHS = {
    'tiny': Arch((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': Arch((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': Arch((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': Arch((3, 3, 27, 3), (192, 384, 768, 1536)),
}
NUM_STAGES = 4


def as_arch(arch: str | Mapping) -> Arch:
    """The size that an argument ``arch`` names, or gives as ``depths`` and ``channels``.

    Raises:
        ValueError: There is no such size, or it has not four stages.
    """
    if isinstance(arch, str) and arch in ARCHS:
        return ARCHS[arch]
    if isinstance(arch, Mapping) and arch.keys() == {'depths', 'channels'} and all(
            len(v) == NUM_STAGES and min(v) > 0 for v in arch.values()):
        return Arch(tuple(arch['depths']), tuple(arch['channels']))
    raise ValueError(f'arch must be one of {tuple(ARCHS)}, or a dict of depths and channels with '
                     f'{NUM_STAGES} positive ints each, got {arch!r}')


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every position, (N, C, H, W) to the same."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + scale * linear(gelu(linear(norm(conv(x))))), with a depthwise 7x7 convolution.

    Args:
        channels: Of input and output; between the linear layers there are four times as many.
        drop_path_rate: Probability that a sample passes as it is, in training.
        layer_scale_init_value: At which the scale of every channel starts; 0: no scale.
        with_cp: Recompute activations in backward to save memory.
    """

    def __init__(self, channels: int, *, drop_path_rate: float, layer_scale_init_value: float,
                 with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        # A module of its own, so that private training knows the gradient of each sample.
        self.gamma = LayerScale(channels, scale=layer_scale_init_value) if (
            layer_scale_init_value > 0) else nn.Identity()
        self.act = nn.GELU()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
        y = self.gamma(self.pointwise_conv2(self.act(self.pointwise_conv1(y))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


# In mmengine's root registry: mmpretrain and mmseg both find it from there.
@MODELS.register_module()
class KNConvNeXt(BaseModule):
    """ConvNeXt with kernel normalized downsamplings; arguments as mmpretrain's ``ConvNeXt``.

    The stem is a 4x4 convolution with stride 4 and LayerNorm. Every later stage opens with
    ReLU and KNConv 2x2 with stride 2. All other normalizations are LayerNorm over the channels of
    a position, so that no layer sees another sample of the batch. Weights start as torchvision's:
    normal with standard deviation 0.02, truncated at 2; biases at 0.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict of ``depths`` and
            ``channels``, four ints each.
        in_channels: Channels of the image. Weights that come from ConvNeXt take images that are
            shifted and scaled by ImageNet's mean and standard deviation.
        out_indices: Stages whose output is returned; each passes LayerNorm. Stages beyond the
            last of them are not built.
        drop_path_rate: Stochastic depth: the probability to skip a block grows linearly from 0 in
            the first to this in the last. torchvision and the authors train tiny with 0.1, small
            with 0.4, base and large with 0.5.
        layer_scale_init_value: At which the scale of every block's channels starts; 0: no scale.
        dropout_p: Dropout of the statistics of the downsamplings, in [0, 1); the authors' is 0.1.
        frozen_stages: How many stages get no gradient, with the layers that open them: 0 or -1
            freezes none, 1 the stem and stage 1. Their statistics are those of evaluation.
        with_cp: Gradient checkpointing of the blocks: less memory, more time.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or None: from scratch.
        gap_before_final_norm: Average the last output over all positions before its LayerNorm, as
            classifiers do; outputs are then (N, C, 1, 1). Needs ``out_indices=(3, )``.

    Shape:
        (N, in_channels, H, W) to a tuple of (N, C_i, h_i, w_i) for i in ``out_indices``, where
        h_0 = floor(H / 4) and every later stage halves, rounding down. H and W are at least 32.

    Raises:
        ValueError: An argument does not fit, the image is too small, or a state dict of another
            architecture is loaded.

    Example:
        >>> backbone = KNConvNeXt('tiny')
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    def __init__(self,
                 arch: str | Mapping = 'tiny',
                 in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6,
                 dropout_p: float = 0.1,
                 frozen_stages: int = 0,
                 with_cp: bool = False,
                 init_cfg: dict | None = None,
                 *,
                 gap_before_final_norm: bool = False) -> None:
        super().__init__(init_cfg)
        depths, channels = as_arch(arch)
        if not out_indices or len(set(out_indices)) != len(out_indices) or any(
                i not in range(NUM_STAGES) for i in out_indices):
            raise ValueError(f'out_indices must be distinct stages in 0..{NUM_STAGES - 1}, got '
                             f'{out_indices}')
        if not 0 <= drop_path_rate < 1 or layer_scale_init_value < 0:
            raise ValueError('drop_path_rate must be in [0, 1) and layer_scale_init_value not '
                             f'below 0, got {drop_path_rate} and {layer_scale_init_value}')
        if gap_before_final_norm and tuple(out_indices) != (NUM_STAGES - 1, ):
            raise ValueError('gap_before_final_norm leaves one position of the last stage, so '
                             f'out_indices must be ({NUM_STAGES - 1},), got {out_indices}; set '
                             'gap_before_final_norm=False for dense prediction')
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(f'frozen_stages must be in -1..{NUM_STAGES}, got {frozen_stages}')
        self.arch = arch if isinstance(arch, str) else 'custom'
        self.out_indices = tuple(out_indices)
        self.gap_before_final_norm = gap_before_final_norm
        self.frozen_stages = frozen_stages
        self.feat_dim = channels[max(out_indices)]

        self.downsample_layers = nn.ModuleList([nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 4, stride=4),
            LayerNorm2d(channels[0], eps=EPS))])
        self.stages = nn.ModuleList()
        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * i / last for i in range(sum(depths))]
        starts = itertools.accumulate(depths, initial=0)
        for i, start in zip(range(max(out_indices) + 1), starts, strict=False):
            if i > 0:
                self.downsample_layers.append(KNConv2d(
                    channels[i - 1], channels[i], 2, stride=2, dropout_p=dropout_p,
                    input_activation='relu'))
            self.stages.append(nn.Sequential(*(
                ConvNeXtBlock(channels[i], drop_path_rate=rate, with_cp=with_cp,
                              layer_scale_init_value=layer_scale_init_value)
                for rate in rates[start:start + depths[i]])))
        for i in out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(channels[i], eps=EPS))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() == 4 and min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f'KNConvNeXt takes images of at least {MIN_SIZE} pixels a side, got '
                             f'{tuple(x.shape[2:])}; enlarge them')
        outs = []
        for i, (opening, blocks) in enumerate(zip(self.downsample_layers, self.stages,
                                                  strict=True)):
            x = blocks(opening(x))
            if i in self.out_indices:
                y = x.mean((2, 3), keepdim=True) if self.gap_before_final_norm else x
                outs.append(self.get_submodule(f'norm{i}')(y))
        return tuple(outs)

    def train(self, mode: bool = True) -> 'KNConvNeXt':
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        for i in range(min(self.frozen_stages, len(self.stages))):
            for part in (self.downsample_layers[i], self.stages[i]):
                part.eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if problem := convnext_misfit(given, self.state_dict(), prefix):
            raise ValueError(f'this checkpoint does not hold weights of KNConvNeXt-{self.arch}: '
                             f'{problem}')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
