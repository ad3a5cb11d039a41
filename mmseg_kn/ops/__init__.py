"""Functional kernel normalization: :func:`kn_conv2d` and :func:`kernel_norm2d`.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024, https://arxiv.org/abs/2205.10089.
"""
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from . import closed_form, reference
from .geometry import check_epilogue, check_input, check_tensor, check_weight, make_geometry

__all__ = ['IMPLS', 'chosen_impl', 'kernel_norm2d', 'kn_conv2d']

IMPLS = ('auto', 'triton', 'fused', 'reference')


def chosen_impl(input: Tensor, impl: str = 'auto') -> str:
    """Which implementation serves ``input``: ``'triton'``, ``'fused'`` or ``'reference'``.

    ``'auto'`` is ``'triton'`` for float32, float16 and bfloat16 on a CUDA GPU of compute
    capability 8.0 or later where triton can be imported, else ``'fused'``.

    Raises:
        ValueError: ``impl`` is none of :data:`IMPLS`, or ``'triton'`` cannot serve ``input``.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl must be one of {IMPLS}, got {impl!r}')
    if impl in ('fused', 'reference'):
        return impl
    if impl == 'auto' and (not input.is_cuda or closed_form.exports()):
        return 'fused'
    obstacle = _triton_obstacle(input.device, input.dtype)
    if impl == 'triton' and obstacle:
        raise ValueError(f"impl='triton' cannot run here: {obstacle}; use impl='auto', which "
                         'falls back')
    return 'fused' if obstacle else 'triton'


class _PassingObstacle(Exception):
    """Holds for this call; the cache keeps no exceptions, and the next call tries again."""


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why triton cannot serve, None if it can."""
    try:
        return _find_triton_obstacle(device, dtype)
    except _PassingObstacle as obstacle:
        _warn(device, obstacle)
        return str(obstacle)


def _warn(device: torch.device, reason: Exception) -> None:
    warnings.warn(f"triton's kernels do not run on {device}, impl='auto' takes 'fused' instead: "
                  f'{reason}', stacklevel=3)


# torch.compiler.assume_constant_result would import dynamo, and that triton, here and now.
_triton_obstacle._dynamo_marked_constant = True


@lru_cache
def _find_triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'it computes in float32, float16 and bfloat16, got {dtype}'
    try:
        from . import triton_kernels
    except ImportError as error:
        return f'triton cannot be imported ({error})'
    if triton_kernels.TOO_OLD:
        return 'it needs triton 3.3'
    if triton_kernels.INTERPRETED:
        return None
    if device.type != 'cuda' or torch.version.hip:
        return f'it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests), got {device}'
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f'it needs compute capability 8.0, got {capability[0]}.{capability[1]}'
    if torch.cuda.is_current_stream_capturing():  # which a trial launch could break
        raise _PassingObstacle('a CUDA graph is captured and the kernels were not tried before; '
                               'run one forward pass first')
    try:  # launching needs a C compiler and Python's headers, once
        triton_kernels.unit_moments(torch.zeros(1, 1, 1, 1, device=device, dtype=dtype),
                                    make_geometry(1), None, 0.0, 1.0, 1e-5, True, False)
    except Exception as error:  # whatever is missing, torch ops can do without: slower
        if 'out of memory' in str(error):  # torch's and triton's
            raise _PassingObstacle(f'its kernels do not run now ({error})') from error
        _warn(device, error)
        return f'its kernels do not run ({error})'
    return None


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
            output, *moments = reference.kn_conv2d(input, weight, bias, geometry, groups,
                                                   dropout_p, training, eps)
            output = output if residual is None else output + residual
            output = output.relu() if activation else output
        else:
            output, *moments = closed_form.kn_conv2d(
                input, weight, bias, geometry, groups, dropout_p, training, eps,
                activation == 'relu', residual, impl)
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
        impl: As in :func:`kn_conv2d`.

    Returns:
        (N, C, kh * Ho, kw * Wo) in the dtype of ``input``: its own size for kernel 1, or
        where kernel == stride divides an unpadded input.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names the invariant.
    """
    geometry = make_geometry(kernel_size, stride, padding)
    check_input(input, geometry, dropout_p, eps)
    impl = chosen_impl(input, impl)
    with torch.autocast(input.device.type, enabled=False) if _autocasts(input) else nullcontext():
        if impl == 'reference':
            return reference.kernel_norm2d(input, geometry, dropout_p, training, eps)
        return closed_form.kernel_norm2d(input, geometry, dropout_p, training, eps, impl)
