"""Kernel normalization as layers, built by mmcv's ``norm_cfg`` and ``conv_cfg``."""
from collections.abc import Sequence

from mmengine.registry import MODELS
from torch import Tensor, nn

from .. import ops
from ..ops.checks import check_activation, check_count, check_numbers, check_tensor
from ..ops.geometry import make_geometry

# Registered in mmengine's root registry: mmseg, mmdet and mmpretrain all find it from there.


def _check(dropout_p: float, eps: float, impl: str) -> None:
    check_numbers(dropout_p, eps)
    if impl not in ops.IMPLS:
        raise ValueError(f'impl must be one of {ops.IMPLS}, got {impl!r}')


def _impl_repr(impl: str) -> str:
    return '' if impl == 'auto' else f', impl={impl!r}'


def _activation_repr(layer: nn.Module) -> str:
    names = ('input_activation', 'activation')
    return ''.join(f', {name}={getattr(layer, name)!r}' for name in names
                   if getattr(layer, name, None) is not None)


@MODELS.register_module(name=['KN', 'KernelNorm2d'])
class KernelNorm2d(nn.Module):
    r"""Normalizes every window by its own mean and variance: (x - mean) / sqrt(var + eps).

    No affine parameters and no running statistics; the windows are laid side by side, so that an
    element of several windows comes out once for each, every time normalized otherwise. Its
    dropout is drawn once and shared by these windows, as in :class:`KNConv2d`; the authors'
    KernelNorm2d draws for each window by itself. See :func:`mmseg_kn.ops.kernel_norm2d` for the
    definition.

    Args:
        num_features: Channels C of the input.
        kernel_size: Window, int or (h, w); 1 normalizes every position over its channels.
        stride: int or (h, w).
        padding: int, (h, w) or (left, right, top, bottom). In the authors' layers a pair is
            (w, h).
        dropout_p: Dropout of the copy that training takes the statistics of, in [0, 1).
        eps: Added to the variance.
        impl: Implementation, see :func:`mmseg_kn.ops.kn_conv2d`.
        activation: ``'relu'`` ends the layer with a ReLU.

    Shape:
        (N, C, H, W) to (N, C, kh * Ho, kw * Wo).

    Raises:
        ValueError: An argument, or the input's shape or dtype, does not fit.
    """

    _abbr_ = 'kn'

    def __init__(self,
                 num_features: int,
                 kernel_size: int | Sequence[int] = 1,
                 stride: int | Sequence[int] = 1,
                 padding: int | Sequence[int] = 0,
                 dropout_p: float = 0.05,
                 eps: float = 1e-5,
                 impl: str = 'auto',
                 activation: str | None = None) -> None:
        super().__init__()
        check_count('num_features', num_features)
        check_activation('activation', activation)
        geometry = make_geometry(kernel_size, stride, padding)
        _check(dropout_p, eps, impl)
        self.num_features = num_features
        self.kernel_size = geometry.kernel
        self.stride = geometry.stride
        self.padding = geometry.symmetric_padding or geometry.padding
        self.dropout_p = dropout_p
        self.eps = eps
        self.impl = impl
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        check_tensor('input', input)
        if input.dim() == 4 and input.size(1) != self.num_features:
            raise ValueError(f'expected num_features={self.num_features} channels, '
                             f'got an input of shape {tuple(input.shape)}')
        return ops.kernel_norm2d(input, self.kernel_size, self.stride, self.padding,
                                 self.dropout_p, self.training, self.eps, self.impl,
                                 activation=self.activation)

    def extra_repr(self) -> str:
        return (f'{self.num_features}, kernel_size={self.kernel_size}, stride={self.stride}, '
                f'padding={self.padding}, dropout_p={self.dropout_p}, eps={self.eps}'
                + _activation_repr(self) + _impl_repr(self.impl))


class KernelNormNd(KernelNorm2d):
    """:class:`KernelNorm2d` of kernel 1 for inputs of any rank: normalizes over the channels.

    Args:
        num_features: Channels C of the input.
        channel_dim: Which dimension they are, 1 or -1.
        dropout_p: As in KernelNorm2d.
        eps: Added to the variance.

    Shape:
        (N, C, ...), or (N, ..., C) with ``channel_dim=-1``, to the same.
    """

    def __init__(self, num_features: int, channel_dim: int = 1, dropout_p: float = 0.05,
                 eps: float = 1e-5) -> None:
        super().__init__(num_features, dropout_p=dropout_p, eps=eps)
        self.channel_dim = channel_dim

    def forward(self, input: Tensor) -> Tensor:
        x = input.movedim(self.channel_dim, 1)
        y = super().forward(x.reshape(*x.shape[:2], -1, 1))
        return y.reshape(x.shape).movedim(1, self.channel_dim)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, channel_dim={self.channel_dim}'


@MODELS.register_module(name=['KNConv', 'KNConv2d'])
class KNConv2d(nn.Conv2d):
    r"""Convolution whose windows are each normalized by their own mean and variance.

    y = (conv(x, W) - mean * sum(W)) / sqrt(var + eps) + b; see :func:`mmseg_kn.ops.kn_conv2d`
    for the definition. Takes the place of convolution and normalization both: use it as
    ``conv_cfg=dict(type='KNConv'), norm_cfg=None``. Weights start Kaiming normal (fan out,
    relu), biases zero.

    Args:
        in_channels: C of the input.
        out_channels: Channels of the output.
        kernel_size: int or (h, w).
        stride: int or (h, w).
        padding: int, (h, w), (left, right, top, bottom), ``'same'`` or ``'valid'``. In the
            authors' layers a pair is (w, h).
        dilation: int or (h, w).
        groups: Groups of the convolution; statistics always span all channels.
        bias: Whether to add a bias.
        dropout_p: Dropout of the copy that training takes the statistics of, in [0, 1).
            Evaluation is deterministic: it uses the expectation over this dropout.
        eps: Added to the variance.
        impl: Implementation, see :func:`mmseg_kn.ops.kn_conv2d`; what ``'auto'`` runs for an
            input, :func:`mmseg_kn.ops.chosen_impl` says.
        activation: ``'relu'`` ends the layer with a ReLU: faster than a ReLU after it, and
            backward needs not keep the convolution's output. Not for a ConvModule that has an
            ``act_cfg`` of its own.
        input_activation: ``'relu'`` begins the layer with a ReLU, of which backward keeps no copy.
        keep_output: Backward keeps the output in place of a map of its own, which saves memory
            where the next layer keeps the output anyway. The output must then not be changed in
            place: backward would fail.
        padding_mode: Only ``'zeros'``; the units are defined by zero padding.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, Ho, Wo), as ``torch.nn.Conv2d``.

    Raises:
        ValueError: An argument, or the input's shape or dtype, does not fit.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int,
                 kernel_size: int | Sequence[int],
                 stride: int | Sequence[int] = 1,
                 padding: int | str | Sequence[int] = 0,
                 dilation: int | Sequence[int] = 1,
                 groups: int = 1,
                 bias: bool = True,
                 dropout_p: float = 0.05,
                 eps: float = 1e-5,
                 impl: str = 'auto',
                 activation: str | None = None,
                 *,
                 input_activation: str | None = None,
                 keep_output: bool = False,
                 padding_mode: str = 'zeros',
                 device=None,
                 dtype=None) -> None:
        if padding_mode != 'zeros':
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}; pad the "
                             'input before the layer instead')
        for name, count in (('in_channels', in_channels), ('out_channels', out_channels),
                            ('groups', groups)):
            check_count(name, count)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f'in_channels={in_channels} and out_channels={out_channels} must '
                             f'be divisible by groups={groups}')
        _check(dropout_p, eps, impl)
        check_activation('activation', activation)
        check_activation('input_activation', input_activation)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f'dtype must be floating point, got {dtype}')
        make_geometry(kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation,
                         groups, bias, device=device, dtype=dtype)
        self.dropout_p = dropout_p
        self.eps = eps
        self.impl = impl
        self.activation = activation
        self.input_activation = input_activation
        self.keep_output = keep_output

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None,
                return_moments: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """See :func:`mmseg_kn.ops.kn_conv2d` for ``residual`` and ``return_moments``."""
        return ops.kn_conv2d(input, self.weight, self.bias, self.stride, self.padding,
                             self.dilation, self.groups, self.dropout_p, self.training,
                             self.eps, self.impl, activation=self.activation,
                             residual=residual, input_activation=self.input_activation,
                             keep_output=self.keep_output, return_moments=return_moments)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, dropout_p={self.dropout_p}, eps={self.eps}'
                + _activation_repr(self) + _impl_repr(self.impl))
