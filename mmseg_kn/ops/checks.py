"""What the functions refuse, each with the invariant, what was given and a remedy."""
import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from .geometry import Geometry, as_ints


def check_count(name: str, value: int) -> None:
    """Refuses what is not an int >= 1."""
    if isinstance(value, Sequence) or as_ints(value) is None or value < 1:
        raise ValueError(f'{name} must be an int >= 1, got {value!r}')


def check_numbers(dropout_p: float, eps: float) -> None:
    """Refuses ``dropout_p`` outside [0, 1) and ``eps`` that is not finite and > 0."""
    if not isinstance(dropout_p, Real) or not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be in [0, 1), got {dropout_p!r}')
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(f'eps must be > 0, got {eps!r}: a unit of zero variance divides by it')


def check_tensor(name: str, value: Tensor) -> None:
    """Refuses arrays, lists, None."""
    if not isinstance(value, Tensor):
        raise ValueError(f'{name} must be a torch.Tensor, got {type(value).__name__}; convert it, '
                         'e.g. by torch.as_tensor')


def check_input(input: Tensor, geometry: Geometry, dropout_p: float, eps: float) -> None:
    """Refuses what has no units to normalize.

    Raises:
        ValueError: ``input`` is not a floating point (N, C, H, W) tensor with pixels in it, the
            window is larger than the padded input, ``dropout_p`` is outside [0, 1) or ``eps``
            not above 0.
    """
    check_tensor('input', input)
    if input.dim() != 4:
        raise ValueError(f'input must be 4-D (N, C, H, W), got shape {tuple(input.shape)}; '
                         'add a batch dimension with input[None] if one is missing')
    if not input.is_floating_point():
        raise ValueError(f'input must be floating point, got {input.dtype}; '
                         'convert it, e.g. input.float() / 255 for an image')
    check_numbers(dropout_p, eps)
    channels, height, width = input.shape[1:]
    if channels < 1 or height < 1 or width < 1:  # one by one: exporters guard each
        raise ValueError(f'input must have channels and pixels, got shape {tuple(input.shape)}; '
                         'only the batch may be empty')
    if min(geometry.output_size(height, width)) < 1:
        left, right, top, bottom = geometry.padding
        raise ValueError(
            f'kernel_size={geometry.kernel} with dilation={geometry.dilation} is larger than '
            f'the padded input {height + top + bottom} x {width + left + right} (H x W); '
            'use larger images, a smaller kernel or more padding')


def check_weight(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Refuses a weight that does not fit.

    Raises:
        ValueError: Channels, groups, the bias or devices disagree with ``weight``.
    """
    check_count('groups', groups)
    out_channels, in_per_group = weight.shape[:2]
    channels = input.size(1)
    if out_channels < 1 or channels % groups or out_channels % groups:
        raise ValueError(f'in_channels={channels} and out_channels={out_channels} must be '
                         f'divisible by groups={groups}')
    if channels != in_per_group * groups:
        raise ValueError(f'input has {channels} channels, but the weight of shape '
                         f'{tuple(weight.shape)} with groups={groups} takes '
                         f'{in_per_group * groups}')
    _check_device(input, 'weight', weight)
    if bias is None:
        return
    check_tensor('bias', bias)
    if bias.shape != (out_channels, ):
        raise ValueError(f'bias must have shape ({out_channels},), got {tuple(bias.shape)}')
    _check_device(input, 'bias', bias)


def _check_device(input: Tensor, name: str, value: Tensor) -> None:
    if value.device != input.device:  # kernels would follow a pointer into another memory
        raise ValueError(f'input and {name} must be on one device, got {input.device} and '
                         f'{value.device}; move one')


def check_activation(name: str, value: str | None) -> None:
    """Refuses what is neither ``'relu'`` nor None."""
    if value not in (None, 'relu'):
        raise ValueError(f"{name} must be None or 'relu', got {value!r}")


def check_epilogue(input: Tensor, weight: Tensor, geometry: Geometry, activation: str | None,
                   residual: Tensor | None) -> None:
    """Refuses an activation or a residual that does not fit.

    Raises:
        ValueError: ``activation`` is not None or ``'relu'``, ``residual`` is given beside it, or
            has not the output's shape or is on another device than ``input``.
    """
    check_activation('activation', activation)
    if residual is None:
        return
    check_tensor('residual', residual)
    if activation:
        raise ValueError(f'residual and activation={activation!r} exclude each other; apply the '
                         'activation to the sum')
    shape = (input.size(0), weight.size(0), *geometry.output_size(*input.shape[2:]))
    if residual.shape != shape:
        raise ValueError(f'residual must have the shape of the output, {shape}, got '
                         f'{tuple(residual.shape)}')
    _check_device(input, 'residual', residual)
