"""KNResNet: the ResNet of kernel normalized convolutions, for dense prediction.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089; their classification
models (repository norm-torch) are in knresnet_cls.py. Added here: depth 101, exact dilation,
and outputs of every stage.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..checkpoints.diagnose import misfit
from .activation import KEY, activation_name, activation_of, build_activation, name_as_tensor
from .initializers import spread_biases
from .knresnet_stages import ARCHS, NUM_STAGES, StageSpec, TransitionSpec, dense_stages
from .layers import KernelNorm2d, KNConv2d
from .max_pool import max_pool2d


class Block(nn.Module):
    """Pre-activation residual block: x + conv(act(... conv(act(x)))).

    For backward it keeps x and the outputs of its convolutions, nothing else of that size; with
    an activation other than ReLU, what that gives as well.

    A 2x2 convolution that pads d on every side makes the map d larger. The last one, which pads
    nothing, makes it d smaller again. d is the dilation.

    Args:
        channels: Channels of input and output.
        inner: Channels in between.
        kernels: Kernel size of each convolution, (2, 2), (2, 3, 2) or (1, 3, 1).
        dilation: Of every convolution.
        dropout_p: Of every convolution's statistics.
        with_cp: Recompute activations in backward to save memory.
        zero_init: Start the last convolution at zero, so that the block starts as identity.
        activation: Name of it.
    """

    def __init__(self, channels: int, inner: int, kernels: tuple[int, ...], dilation: int, *,
                 dropout_p: float, with_cp: bool, zero_init: bool,
                 activation: str = 'relu') -> None:
        super().__init__()
        self.with_cp = with_cp
        self.act, fused = build_activation(activation)
        widths = (channels, *[inner] * (len(kernels) - 1), channels)
        paddings = [0 if k == 1 else dilation for k in kernels[:-1]] + [0]
        for i, (kernel, padding) in enumerate(zip(kernels, paddings, strict=True)):
            is_first, is_last = i == 0, i == len(kernels) - 1
            self.add_module(
                f'conv{i + 1}',
                KNConv2d(widths[i], widths[i + 1], kernel, padding=padding, dilation=dilation,
                         dropout_p=dropout_p, input_activation=fused if is_first else None,
                         activation=None if is_last else fused, keep_output=True))
        if zero_init:
            nn.init.zeros_(self.get_submodule(f'conv{len(kernels)}').weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        *inner, last = (m for m in self.children() if isinstance(m, nn.Conv2d))
        y = x
        for conv in inner:
            y = conv(self.act(y))
        return last(self.act(y), residual=x)


class Transition(nn.Module):
    """Opens a stage: activation, KNConv, max pool 2x2.

    With stride 1 the pool keeps the resolution: its window takes the dilation that the
    previous stage had, as the convolution does, and is padded right and bottom with -inf.
    Then the values at every other position are those of the strided pool.

    Args:
        in_channels: Channels of the previous stage.
        out_channels: Channels of this stage.
        spec: Kernel, padding, stride and dilation.
        dropout_p: Of the convolution's statistics.
        activation: Name of it.
    """

    def __init__(self, in_channels: int, out_channels: int, spec: TransitionSpec, *,
                 dropout_p: float, activation: str = 'relu') -> None:
        super().__init__()
        self.act, fused = build_activation(activation)
        self.conv = KNConv2d(in_channels, out_channels, spec.kernel_size, padding=spec.padding,
                             dilation=spec.dilation, dropout_p=dropout_p,
                             input_activation=fused, keep_output=True)
        self.stride = spec.stride
        self.dilation = spec.dilation
        self.ceil_mode = spec.ceil_mode and spec.stride != 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.act(x))
        if self.stride == 1:
            x = F.pad(x, (0, self.dilation, 0, self.dilation), value=-torch.inf)
        return max_pool2d(x, 2, self.stride, dilation=self.dilation, ceil_mode=self.ceil_mode)


class Trunk(BaseModule):
    """Stem and stages: what dense prediction and classification share.

    Args:
        depth: Gives the stem's channels.
        stages: What each stage is made of; the number of stages that are built.
        in_channels, frozen_stages, with_cp, dropout_p, zero_init_residual, activation, init_cfg:
            See :class:`KNResNet`.
        low_resolution: Stem for small images: 3x3 with stride 1, no pool.
    """

    def __init__(self, depth: int, stages: Sequence[StageSpec], *, in_channels: int,
                 frozen_stages: int, with_cp: bool, dropout_p: float, zero_init_residual: bool,
                 activation: str, init_cfg: dict | None, low_resolution: bool = False) -> None:
        super().__init__(init_cfg)
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(f'frozen_stages must be in -1..{NUM_STAGES}, got {frozen_stages}')
        self.depth = depth
        self.frozen_stages = frozen_stages
        self.activation = activation_name(activation)
        if self.activation != 'relu':  # names of weights say nothing of it
            self.register_buffer(KEY, name_as_tensor(self.activation))
        self.stem_pool = not low_resolution
        geometry = dict(kernel_size=3, padding=1) if low_resolution else dict(
            kernel_size=7, stride=2, padding=3)
        channels = ARCHS[depth].stem
        self.stem = KNConv2d(in_channels, channels, dropout_p=dropout_p, keep_output=True,
                             **geometry)
        self.stage_names = [f'layer{i + 1}' for i in range(len(stages))]
        for name, spec in zip(self.stage_names, stages, strict=True):
            layers = [] if spec.transition is None else [
                Transition(channels, spec.channels, spec.transition, dropout_p=dropout_p,
                           activation=self.activation)]
            layers += [Block(spec.channels, spec.inner, spec.kernels, dilation,
                             dropout_p=dropout_p, with_cp=with_cp, zero_init=zero_init_residual,
                             activation=self.activation)
                       for dilation in spec.dilations]
            self.add_module(name, nn.Sequential(*layers))
            channels = spec.channels
        if self.activation != 'relu':
            spread_biases(self)
        self._freeze_stages()

    def forward_stem(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return max_pool2d(x, 3, 2, 1) if self.stem_pool else x

    def train(self, mode: bool = True) -> 'Trunk':
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        for name in ['stem', *self.stage_names][:self.frozen_stages + 1]:
            self.get_submodule(name).eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
        given_activation = activation_of(given)
        given.pop(KEY, None)
        own = {key: value for key, value in self.state_dict().items() if key != KEY}
        if problem := misfit(given, own, self.stem.kernel_size, prefix):
            raise ValueError(f'this checkpoint does not hold weights of KNResNet-{self.depth}: '
                             f'{problem}')
        if given and given_activation != self.activation:
            raise ValueError(f'this checkpoint was trained with activation={given_activation!r}, '
                             f'and this network has {self.activation!r}; set activation='
                             f'{given_activation!r} (of a file of the authors, convert it with '
                             f'--activation {self.activation} if it was trained with that)')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module()
class KNResNet(Trunk):
    """ResNet of kernel normalized convolutions; arguments as mmseg's ``ResNet``.

    No layer sees another sample of the batch, in training or evaluation: it trains with one
    image per GPU, and there is nothing to synchronize or to freeze. The dilated network
    computes what the strided one computes, at more positions. Weights start Kaiming normal: the
    stem at fan in, all others at fan out as the authors have them. Biases start at zero; with
    another activation than ReLU uniform within 1 / sqrt(fan in), as torch's, so that gradients
    stay finite where an image is black.

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
        activation: ``'relu'``, ``'mish'``, or any other of torch.nn that acts on each element
            alone, by its name in small letters. ReLU is fused into the layers; others take a map
            more of memory each. Weights of another activation are refused.
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
                 activation: str = 'relu',
                 init_cfg: dict | None = None) -> None:
        if not out_indices or len(set(out_indices)) != len(out_indices) or any(
                i not in range(NUM_STAGES) for i in out_indices):
            raise ValueError(f'out_indices must be distinct stages in 0..{NUM_STAGES - 1}, got '
                             f'{out_indices}')
        stages = dense_stages(depth, strides, dilations, multi_grid)
        # Stages beyond the last output are not built: their weights would get no gradient.
        super().__init__(depth, stages[:max(out_indices) + 1], in_channels=in_channels,
                         frozen_stages=frozen_stages, with_cp=with_cp, dropout_p=dropout_p,
                         zero_init_residual=zero_init_residual, activation=activation,
                         init_cfg=init_cfg)
        # Every window that follows divides by the stem's deviation. At fan out, which the authors
        # take everywhere, that is 0.3, and the first stage's gradients come out several times as
        # large as all others (docs/stability.md).
        nn.init.kaiming_normal_(self.stem.weight, mode='fan_in', nonlinearity='relu')
        self.out_indices = tuple(out_indices)
        self.feat_dim = stages[max(out_indices)].channels
        self.act, fused = build_activation(self.activation)
        for i in out_indices:
            self.add_module(f'norm{i + 1}', KernelNorm2d(
                stages[i].channels, dropout_p=dropout_p, activation=fused))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.forward_stem(x)
        outs = []
        for i, name in enumerate(self.stage_names):
            x = self.get_submodule(name)(x)
            if i in self.out_indices:
                outs.append(self.act(self.get_submodule(f'norm{i + 1}')(x)))
        return tuple(outs)
