"""Functional kernel normalization: :func:`kn_conv2d` and :func:`kernel_norm2d`.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089.
"""
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import fused, reference
from .geometry import check_input, check_weight, make_geometry

__all__ = ['IMPLS', 'kernel_norm2d', 'kn_conv2d']

_IMPLS = {'auto': fused, 'fused': fused, 'reference': reference}
IMPLS = tuple(_IMPLS)


def _implementation(impl: str):
    if impl not in _IMPLS:
        raise ValueError(f'impl must be one of {IMPLS}, got {impl!r}')
    return _IMPLS[impl]


def _autocasts(input: Tensor) -> bool:
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def kn_conv2d(input: Tensor,
              weight: Tensor,
              bias: Tensor | None = None,
              stride: int | Sequence[int] = 1,
              padding: int | str | Sequence[int] = 0,
              dilation: int | Sequence[int] = 1,
              groups: int = 1,
              dropout_p: float = 0.0,
              training: bool = False,
              eps: float = 1e-5,
              impl: str = 'auto') -> Tensor:
    r"""Convolution over windows that are each normalized by their own mean and variance.

    .. math::
        y_{n,o,p} = b_o + \sum_{k} W_{o,k} \frac{x_{n,p,k} - \mu_{n,p}}
                    {\sqrt{\sigma^2_{n,p} + \epsilon}}

    where k runs over the unit at output position p: every element, zero padding included,
    that the convolution reads there, K = C * kh * kw of them. The unit spans all channels
    also with ``groups`` > 1. In training, mean and (biased) variance are those of a copy of
    the padded input that went through dropout; the values being normalized are the original
    ones. In evaluation they are the expectation over that dropout, mean = E1 and
    var = max(q * E2 * (1 - p / K) - E1 ** 2, 0) with q = 1 / (1 - p): deterministic. No
    sample of the batch sees another.

    Args:
        input: (N, C, H, W), floating point; N may be 0.
        weight: (out_channels, C / groups, kh, kw).
        bias: (out_channels,), or None.
        stride: int or (h, w).
        padding: int, (h, w), (left, right, top, bottom), ``'same'`` or ``'valid'``.
        dilation: int or (h, w).
        groups: Groups of the convolution.
        dropout_p: Probability that an element is left out of the statistics, in [0, 1).
        training: Draw the dropout rather than take its expectation.
        eps: Added to the variance.
        impl: ``'reference'`` (the definition), ``'fused'`` (closed form) or ``'auto'``.

    Returns:
        (N, out_channels, Ho, Wo), sized as ``torch.nn.functional.conv2d`` does, in the dtype
        of ``input``, or autocast's where autocast is on. Statistics are float32 or better.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names the invariant.
    """
    implementation = _implementation(impl)
    if weight.dim() != 4:
        raise ValueError('weight must be 4-D (out_channels, in_channels / groups, kh, kw), '
                         f'got shape {tuple(weight.shape)}')
    geometry = make_geometry(weight.shape[2:], stride, padding, dilation)
    check_input(input, geometry, dropout_p, eps)
    check_weight(input, weight, bias, groups)
    device, autocast = input.device.type, _autocasts(input)
    if autocast and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    elif input.dtype != weight.dtype:
        raise ValueError(f'input and weight must have one dtype, got {input.dtype} and '
                         f'{weight.dtype}; convert one, or train under autocast')
    # Implementations take the weight in its own precision: they may centre it first.
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return implementation.kn_conv2d(input, weight, bias, geometry, groups, dropout_p,
                                        training, eps)


def kernel_norm2d(input: Tensor,
                  kernel_size: int | Sequence[int] = 1,
                  stride: int | Sequence[int] = 1,
                  padding: int | Sequence[int] = 0,
                  dropout_p: float = 0.0,
                  training: bool = False,
                  eps: float = 1e-5,
                  impl: str = 'auto') -> Tensor:
    r"""Normalizes every window by its own mean and variance and lays the windows side by side.

    .. math:: y = (x - \mu) / \sqrt{\sigma^2 + \epsilon}

    with the units, the statistics and the dropout of :func:`kn_conv2d`, and no affine
    parameters.

    Args:
        input: (N, C, H, W), floating point; N may be 0.
        kernel_size: int or (h, w).
        stride: int or (h, w).
        padding: int, (h, w) or (left, right, top, bottom).
        dropout_p: Probability that an element is left out of the statistics, in [0, 1).
        training: Draw the dropout rather than take its expectation.
        eps: Added to the variance.
        impl: ``'reference'`` (the definition), ``'fused'`` (closed form) or ``'auto'``.

    Returns:
        (N, C, kh * Ho, kw * Wo) in the dtype of ``input``: its own size for kernel 1, or
        where kernel == stride divides an unpadded input.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names the invariant.
    """
    implementation = _implementation(impl)
    geometry = make_geometry(kernel_size, stride, padding)
    check_input(input, geometry, dropout_p, eps)
    with torch.autocast(input.device.type, enabled=False) if _autocasts(input) else nullcontext():
        return implementation.kernel_norm2d(input, geometry, dropout_p, training, eps)
