"""KNResNet: the ResNet of kernel normalized convolutions, for dense prediction.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089; their classification
models (repository norm-torch) are in knresnet_cls.py. Added here: depth 101, exact dilation,
and outputs of every stage.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .layers import KernelNorm2d, KNConv2d


class Arch(NamedTuple):
    """A depth: what the stem and the four stages are made of."""

    stem: int  # channels after the stem
    channels: tuple[int, ...]  # of each stage's output
    inner: tuple[int, ...]  # inside each stage's blocks
    blocks: tuple[int, ...]
    bottleneck: bool


ARCHS = {
    18: Arch(64, (64, 256, 512, 724), (256, 256, 512, 724), (2, 2, 1, 1), False),
    34: Arch(64, (64, 256, 512, 512), (256, 320, 640, 843), (4, 5, 3, 2), False),
    50: Arch(256, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 4, 2), True),
    101: Arch(256, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 21, 2), True),
}
NUM_STAGES = 4


class Block(nn.Module):
    """Pre-activation residual block: x + conv(relu(... conv(relu(x)))).

    A 2x2 convolution that pads d on every side makes the map d larger; the last one, which
    pads nothing, makes it d smaller again. d is the dilation.

    Args:
        channels: Channels of input and output.
        inner: Channels in between.
        kernels: Kernel size of each convolution, (2, 2), (2, 3, 2) or (1, 3, 1).
        dilation: Of every convolution.
        dropout_p: Of every convolution's statistics.
        with_cp: Recompute activations in backward to save memory.
        zero_init: Start the last convolution at zero, so that the block starts as identity.
    """

    def __init__(self, channels: int, inner: int, kernels: tuple[int, ...], dilation: int,
                 dropout_p: float, with_cp: bool, zero_init: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        widths = (channels, *[inner] * (len(kernels) - 1), channels)
        paddings = [0 if k == 1 else dilation for k in kernels[:-1]] + [0]
        for i, (kernel, padding) in enumerate(zip(kernels, paddings, strict=True)):
            self.add_module(
                f'conv{i + 1}',
                KNConv2d(widths[i], widths[i + 1], kernel, padding=padding, dilation=dilation,
                         dropout_p=dropout_p,
                         activation='relu' if i + 1 < len(kernels) else None))
        if zero_init:
            nn.init.zeros_(self.get_submodule(f'conv{len(kernels)}').weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        *inner, last = self.children()
        y = F.relu(x)
        for conv in inner:
            y = conv(y)
        return last(y, residual=x)


class Transition(nn.Module):
    """Opens a stage: relu, KNConv, max pool 2x2.

    With stride 1 the pool keeps the resolution: its window takes the dilation that the
    previous stage had, as the convolution does, and is padded right and bottom with -inf.
    Then the values at every other position are those of the strided pool.

    Args:
        in_channels: Channels of the previous stage.
        out_channels: Channels of this stage.
        kernel_size: 2, or 1 for the last stage of the bottleneck depths.
        padding: Of the convolution, (left, right, top, bottom).
        stride: Of the pool, 1 or 2.
        dilation: Of the previous stage.
        ceil_mode: Odd sizes round up, else down.
        dropout_p: Of the convolution's statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int,
                 padding: tuple[int, ...], stride: int, dilation: int, ceil_mode: bool,
                 dropout_p: float) -> None:
        super().__init__()
        self.conv = KNConv2d(in_channels, out_channels, kernel_size, padding=padding,
                             dilation=dilation, dropout_p=dropout_p)
        self.stride = stride
        self.dilation = dilation
        self.ceil_mode = ceil_mode and stride != 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x))
        if self.stride == 1:
            x = F.pad(x, (0, self.dilation, 0, self.dilation), value=-torch.inf)
        return F.max_pool2d(x, 2, self.stride, dilation=self.dilation,
                            ceil_mode=self.ceil_mode)


class Trunk(BaseModule):
    """Stem and stages: what dense prediction and classification share.

    Args:
        depth, in_channels, strides, dilations, frozen_stages, with_cp, dropout_p,
            zero_init_residual, multi_grid, init_cfg: See :class:`KNResNet`.
        num_stages: How many stages to build.
        low_resolution: Stem for small images: 3x3 with stride 1, no pool.
        dense: Halves sizes rounding up, so that every position has its features. Else as in the
            authors' classification models: rounds down and, for images that are not small, the
            2x2 convolution that opens stage 4 pads one more on every side.
    """

    def __init__(self, depth: int, in_channels: int, num_stages: int, strides: Sequence[int],
                 dilations: Sequence[int], frozen_stages: int, with_cp: bool, dropout_p: float,
                 zero_init_residual: bool, multi_grid: Sequence[int] | None,
                 init_cfg: dict | None, low_resolution: bool = False,
                 dense: bool = True) -> None:
        super().__init__(init_cfg)
        arch = _check(depth, strides, dilations, frozen_stages, multi_grid)
        self.depth = depth
        self.num_stages = num_stages
        self.frozen_stages = frozen_stages

        if low_resolution:
            self.stem = KNConv2d(in_channels, arch.stem, 3, padding=1, dropout_p=dropout_p)
        else:
            self.stem = KNConv2d(in_channels, arch.stem, 7, stride=2, padding=3,
                                 dropout_p=dropout_p)
        self.stem_pool = not low_resolution
        kernels = (2, 3, 2) if arch.bottleneck else (2, 2)
        previous = arch.stem
        for i in range(num_stages):
            channels, inner, num_blocks = arch.channels[i], arch.inner[i], arch.blocks[i]
            last = i == NUM_STAGES - 1
            pointwise = arch.bottleneck and last
            grid = multi_grid if multi_grid and last else [dilations[i]] * num_blocks
            layers = []
            if i > 0:
                d = 0 if pointwise else dilations[i - 1]
                padding = (0, d, 0, d) if i == 2 else (d, 0, d, 0)
                if last and not (pointwise or low_resolution or dense):
                    padding = tuple(p + 1 for p in padding)
                layers.append(
                    Transition(previous, channels, 1 if pointwise else 2, padding,
                               stride=strides[i], dilation=dilations[i - 1],
                               ceil_mode=dense, dropout_p=dropout_p))
            layers += [
                Block(channels, inner, (1, 3, 1) if pointwise else kernels, dilation, dropout_p,
                      with_cp, zero_init_residual) for dilation in grid
            ]
            self.add_module(f'layer{i + 1}', nn.Sequential(*layers))
            previous = channels
        self._freeze_stages()

    def forward_stem(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.stem_pool else x

    def train(self, mode: bool = True) -> 'Trunk':
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        frozen = ['stem', *(f'layer{i + 1}' for i in range(self.num_stages))]
        for name in frozen[:self.frozen_stages + 1]:
            self.get_submodule(name).eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # mmengine loads with strict=False: without this, the weights of another architecture
        # are skipped with a log line and training silently starts from scratch.
        given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        own = self.state_dict()
        # A stem for images of other channels may start anew; one of another kernel is no stem.
        stem = given.get('stem.weight')
        if stem is not None and stem.shape[2:] == self.stem.kernel_size:
            given['stem.weight'] = own['stem.weight']
        absent = [k for k, v in own.items() if k not in given or given[k].shape != v.shape]
        if given and absent:
            statistics = [k for k in given if k.endswith('running_mean')]
            first = prefix + next(iter(given))
            remedy = ('use a checkpoint of a KNResNet trained with mmseg_kn, or none, to train '
                      'from scratch')
            if statistics:
                reason = (f'it has running statistics ({prefix}{statistics[0]}), so it is a '
                          'BatchNorm network')
            elif 'block0.0.weight' in given or 'model' in given:
                reason = f'mmseg_kn does not name them so ({first})'
                remedy = ('if it is one of norm-torch, tools/model_converters/norm_torch2mmseg.py '
                          'converts it')
            elif 'backbone.stem.weight' in given:
                reason = f'it holds a whole model ({first})'
                remedy = "take its backbone: init_cfg=dict(..., prefix='backbone.')"
            elif not given.keys() & own.keys():
                reason = f'none of its {len(given)} keys matches, e.g. {first}'
            elif absent == ['stem.weight'] and stem is not None:
                reason = (f'its stem has a kernel of {tuple(stem.shape[2:])}, that of '
                          f'{self.stem.kernel_size} is needed')
                remedy = 'low resolution and this network do not share a stem'
            else:
                reason = (f'{len(absent)} of {len(own)} weights are missing or of another shape, '
                          f'e.g. {prefix}{absent[0]}')
            raise ValueError(f'this checkpoint does not hold weights of KNResNet-{self.depth}: '
                             f'{reason}; {remedy}')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module()
class KNResNet(Trunk):
    """ResNet of kernel normalized convolutions; arguments as mmseg's ``ResNet``.

    No layer sees another sample of the batch, in training or evaluation: it trains with one
    image per GPU, and there is nothing to synchronize or to freeze. The dilated network
    computes what the strided one computes, at more positions. Weights start Kaiming normal: the
    stem at fan in, all others at fan out as the authors have them.

    Args:
        depth: 18, 34, 50 or 101.
        in_channels: Channels of the image; values in [0, 1] are recommended.
        strides: Of each stage. 1 or 2; the first must be 1, as the stem already divides by 4.
            (1, 2, 2, 2) gives output stride 32, (1, 2, 2, 1) 16, (1, 2, 1, 1) 8.
        dilations: Of each stage's blocks, e.g. (1, 1, 2, 4) for output stride 8.
        out_indices: Stages whose output is returned; each passes KernelNorm 1x1 and relu.
            Stages beyond the last of them are not built.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and stages 1 to i: no
            gradients, and their statistics by expectation rather than under dropout.
        with_cp: Gradient checkpointing of the blocks: less memory, more time.
        dropout_p: Dropout of the statistics in every layer, in [0, 1).
        zero_init_residual: Start every residual block as identity. Trains much better from
            scratch, together with clipped gradients.
        multi_grid: Dilations of the last stage's blocks, one each, in place of
            ``dilations[3]``.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or None: from scratch.

    Shape:
        (N, in_channels, H, W) to a tuple of (N, C_i, ceil(H / s_i), ceil(W / s_i)), for i in
        ``out_indices``; C is (64, 256, 512, 724), (64, 256, 512, 512) for depth 34,
        (256, 512, 810, 2048) for 50 and 101, and s the product of the strides so far.

    Raises:
        ValueError: An argument does not fit, or a state dict of another architecture (a
            BatchNorm ResNet, say) is loaded.

    Example:
        >>> backbone = KNResNet(18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        >>> [tuple(y.shape) for y in backbone(torch.rand(1, 3, 64, 128))]
        [(1, 64, 16, 32), (1, 256, 8, 16), (1, 512, 8, 16), (1, 724, 8, 16)]
    """

    def __init__(self,
                 depth: int,
                 in_channels: int = 3,
                 strides: Sequence[int] = (1, 2, 2, 2),
                 dilations: Sequence[int] = (1, 1, 1, 1),
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 frozen_stages: int = -1,
                 with_cp: bool = False,
                 dropout_p: float = 0.05,
                 zero_init_residual: bool = True,
                 multi_grid: Sequence[int] | None = None,
                 init_cfg: dict | None = None) -> None:
        if not out_indices or len(set(out_indices)) != len(out_indices) or any(
                i not in range(NUM_STAGES) for i in out_indices):
            raise ValueError(f'out_indices must be distinct stages in 0..{NUM_STAGES - 1}, got '
                             f'{out_indices}')
        # No stage beyond the last output: its weights would get no gradient.
        super().__init__(depth, in_channels, max(out_indices) + 1, strides, dilations,
                         frozen_stages, with_cp, dropout_p, zero_init_residual, multi_grid,
                         init_cfg)
        # Every window that follows divides by the stem's deviation. At fan out, which the authors
        # take everywhere, that is 0.3, and the first stage's gradients come out several times as
        # large as all others (docs/stability.md).
        nn.init.kaiming_normal_(self.stem.weight, mode='fan_in', nonlinearity='relu')
        self.out_indices = tuple(out_indices)
        channels = ARCHS[depth].channels
        self.feat_dim = channels[max(out_indices)]
        for i in out_indices:
            self.add_module(f'norm{i + 1}', KernelNorm2d(channels[i], dropout_p=dropout_p))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.forward_stem(x)
        outs = []
        for i in range(self.num_stages):
            x = self.get_submodule(f'layer{i + 1}')(x)
            if i in self.out_indices:
                outs.append(F.relu(self.get_submodule(f'norm{i + 1}')(x)))
        return tuple(outs)


def _check(depth, strides, dilations, frozen_stages, multi_grid) -> Arch:
    if depth not in ARCHS:
        raise ValueError(f'depth must be one of {tuple(ARCHS)}, got {depth}')
    for name, values in (('strides', strides), ('dilations', dilations)):
        if len(values) != NUM_STAGES or any(v < 1 for v in values):
            raise ValueError(f'{name} must be {NUM_STAGES} positive ints, one for each stage, '
                             f'got {values}')
    if strides[0] != 1 or any(s > 2 for s in strides):
        raise ValueError('strides must be 1 or 2, and 1 in the first stage (the stem already '
                         f'divides by 4), got {strides}')
    if frozen_stages not in range(-1, NUM_STAGES + 1):
        raise ValueError(f'frozen_stages must be in -1..{NUM_STAGES}, got {frozen_stages}')
    num_blocks = ARCHS[depth].blocks[-1]
    if multi_grid is not None and len(multi_grid) != num_blocks:
        raise ValueError(f'multi_grid must have one dilation for each of the {num_blocks} blocks '
                         f"of depth {depth}'s last stage, got {multi_grid}")
    return ARCHS[depth]
