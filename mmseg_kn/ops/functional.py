"""The documented functions: they check, choose an implementation and take care of autocast."""
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import reference, ways
from .checks import check_activation, check_epilogue, check_input, check_tensor, check_weight
from .closed_form import Options
from .dispatch import chosen_impl
from .geometry import make_geometry


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
              impl: str = 'auto',
              *,
              activation: str | None = None,
              residual: Tensor | None = None,
              input_activation: str | None = None,
              keep_output: bool = False,
              return_moments: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
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
        impl: ``'reference'`` (the definition), ``'fused'`` (closed form in torch ops),
            ``'triton'`` (closed form in kernels) or ``'auto'``, see :func:`chosen_impl`.
        activation: ``'relu'`` or None, applied to the output: one pass less, and backward keeps
            nothing of the output but what the next layer keeps anyway.
        residual: Added to the output, of its shape; not together with ``activation``.
        input_activation: ``'relu'`` or None, applied to the input: backward keeps the input
            itself, and no rectified copy of it.
        keep_output: Backward keeps the output and the residual in place of a map of its own. That
            saves memory where the next layer keeps the output anyway. An operation that then
            changes the output in place makes backward fail with torch's error about it.
        return_moments: Return mean and rstd = (var + eps) ** -0.5 of the units as well, without
            gradient; per-sample gradients need those that the output was computed with.

    Returns:
        (N, out_channels, Ho, Wo), sized as ``torch.nn.functional.conv2d`` does, in the dtype
        of ``input``, or autocast's where autocast is on (a ``residual`` of another
        promotes). Statistics are float32 or better; the convolution of the input itself must fit
        the dtype. With ``return_moments``: output, mean and rstd, (N, Ho, Wo) each; rstd may be 0
        where a unit is constant.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names the invariant.
    """
    check_tensor('weight', weight)
    if weight.dim() != 4:
        raise ValueError('weight must be 4-D (out_channels, in_channels / groups, kh, kw), '
                         f'got shape {tuple(weight.shape)}')
    geometry = make_geometry(weight.shape[2:], stride, padding, dilation)
    check_input(input, geometry, dropout_p, eps)
    check_weight(input, weight, bias, groups)
    check_activation('input_activation', input_activation)
    check_epilogue(input, weight, geometry, activation, residual)
    device, autocast = input.device.type, _autocasts(input)
    if autocast and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    elif input.dtype != weight.dtype:
        raise ValueError(f'input and weight must have one dtype, got {input.dtype} and '
                         f'{weight.dtype}; convert one, or train under autocast')
    impl = chosen_impl(input, impl)
    added_after = None
    if residual is not None and residual.dtype != input.dtype:  # promotes, as torch's + does
        residual, added_after = None, residual
    # Implementations take the weight in its own precision: they may centre it first.
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if impl == 'reference':
            input = input.relu() if input_activation else input
            output, *moments = reference.kn_conv2d(input, weight, bias, geometry, groups,
                                                   dropout_p, training, eps)
            output = output if residual is None else output + residual
            output = output.relu() if activation else output
        else:
            output, *moments = ways.kn_conv2d(
                input, weight, bias, residual,
                Options(geometry, groups, dropout_p, training, input_activation == 'relu'), eps,
                activation == 'relu', keep_output, impl)
    if added_after is not None:
        output = output + added_after
    return (output, *moments) if return_moments else output


def kernel_norm2d(input: Tensor,
                  kernel_size: int | Sequence[int] = 1,
                  stride: int | Sequence[int] = 1,
                  padding: int | Sequence[int] = 0,
                  dropout_p: float = 0.0,
                  training: bool = False,
                  eps: float = 1e-5,
                  impl: str = 'auto',
                  *,
                  activation: str | None = None) -> Tensor:
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
        impl: As in :func:`kn_conv2d`.
        activation: ``'relu'`` or None, applied to the output.

    Returns:
        (N, C, kh * Ho, kw * Wo) in the dtype of ``input``: its own size for kernel 1, or
        where kernel == stride divides an unpadded input.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names the invariant.
    """
    geometry = make_geometry(kernel_size, stride, padding)
    check_activation('activation', activation)
    check_input(input, geometry, dropout_p, eps)
    impl = chosen_impl(input, impl)
    with torch.autocast(input.device.type, enabled=False) if _autocasts(input) else nullcontext():
        if impl == 'reference':
            output = reference.kernel_norm2d(input, geometry, dropout_p, training, eps)
            return output.relu() if activation else output
        return ways.kernel_norm2d(input, geometry, dropout_p, training, eps,
                                  activation == 'relu', impl)
