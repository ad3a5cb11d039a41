"""Means over every window of maps with one channel, and their adjoint.

Small maps go through torch's average pooling, which is one call. On the CPU that adds up every
window anew, element by element, so larger maps are summed row by row, then column by column. So
are maps whose windows have gaps, on any device: torch has no dilated average pooling.
"""
import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_chunks import is_eager_on_cpu
from .geometry import Geometry

_aten = torch.ops.aten
_LARGE = 2**12  # elements above which sums are faster than pooling on the CPU


def _is_identity(geometry: Geometry) -> bool:
    return (geometry.kernel, geometry.stride, geometry.padding) == ((1, 1), (1, 1), (0, 0, 0, 0))


def _pooling(maps: Tensor, geometry: Geometry) -> tuple | None:
    """Kernel, stride and padding as torch's pooling takes them; None if sums serve better."""
    padding = geometry.symmetric_padding
    if is_eager_on_cpu(maps) and maps.numel() > _LARGE:
        return None
    if geometry.dilation != (1, 1) or padding is None or any(
            2 * p > k for p, k in zip(padding, geometry.kernel, strict=True)):
        return None
    return geometry.kernel, geometry.stride, padding


def box_mean(maps: Tensor, geometry: Geometry) -> Tensor:
    """Means of (M, N, H, W) over every window, padding included, to (M, N, Ho, Wo)."""
    if _is_identity(geometry):
        return maps
    if pooling := _pooling(maps, geometry):
        means = F.avg_pool2d(_one_channel(maps), *pooling)
        return means.view(*maps.shape[:2], *means.shape[2:])
    sizes = geometry.output_size(*maps.shape[-2:])
    if any(geometry.padding):
        maps = F.pad(maps, geometry.padding)
    for dim, size, k, s, d in zip((2, 3), sizes, geometry.kernel, geometry.stride,
                                  geometry.dilation, strict=True):
        maps = functools.reduce(operator.add, (_every(maps, dim, i * d, size, s)
                                               for i in range(k)))
    return maps / (geometry.kernel[0] * geometry.kernel[1])


def box_mean_transpose(maps: Tensor, geometry: Geometry, height: int, width: int) -> Tensor:
    """Adjoint of :func:`box_mean`: (M, N, Ho, Wo) to (M, N, ``height``, ``width``)."""
    if _is_identity(geometry):
        return maps
    if pooling := _pooling(maps, geometry):
        shape = (*maps.shape[:2], height, width)
        pooled = _one_channel(maps.new_empty(shape))  # only its shape is read
        return _aten.avg_pool2d_backward(_one_channel(maps), pooled, *pooling, False, True,
                                         None).view(shape)
    left, right, top, bottom = geometry.padding
    padded = (height + top + bottom, width + left + right)
    maps = maps / (geometry.kernel[0] * geometry.kernel[1])
    for dim, k, s, d in zip((3, 2), reversed(geometry.kernel), reversed(geometry.stride),
                            reversed(geometry.dilation), strict=True):
        shape = list(maps.shape)
        shape[dim] = padded[dim - 2]
        spread = maps.new_zeros(shape)
        for i in range(k):
            _every(spread, dim, i * d, maps.size(dim), s).add_(maps)
        maps = spread
    return maps[..., top:top + height, left:left + width]


def _one_channel(maps: Tensor) -> Tensor:
    """(M * N, 1, H, W): torch's pooling takes a batch of 0, but no 0 channels."""
    return maps.flatten(0, 1).unsqueeze(1)


def _every(maps: Tensor, dim: int, start: int, size: int, step: int) -> Tensor:
    """View of ``size`` rows or columns from ``start``, ``step`` apart."""
    index = [slice(None)] * maps.dim()
    index[dim] = slice(start, start + (size - 1) * step + 1, step)
    return maps[tuple(index)]
