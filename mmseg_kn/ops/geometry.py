"""Where the units of a convolution lie."""
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """A convolution window. ``padding`` is (left, right, top, bottom), the rest (h, w)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Number of units (Ho, Wo), counted as ``torch.nn.Conv2d`` does."""
        left, right, top, bottom = self.padding
        return tuple(
            (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(
                (height + top + bottom, width + left + right),
                self.kernel, self.stride, self.dilation, strict=True))

    def padded_shape(self, input: Tensor) -> tuple[int, int, int, int]:
        """Shape of ``input`` (N, C, H, W) with its padding."""
        left, right, top, bottom = self.padding
        n, c, h, w = input.shape
        return n, c, h + top + bottom, w + left + right

    @property
    def symmetric_padding(self) -> tuple[int, int] | None:
        """(h, w) as ``torch.nn.functional.conv2d`` takes it, None if the sides differ."""
        left, right, top, bottom = self.padding
        return (top, left) if left == right and top == bottom else None


def as_ints(value: int | Sequence[int]) -> tuple[int, ...] | None:
    """A tuple of whatever counts as ints, numpy's and, while tracing, tensors too; else None."""
    try:
        return tuple(map(operator.index, value if isinstance(value, Sequence) else (value, )))
    except TypeError:
        return None


def _pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    pair = as_ints(value)
    if pair is None or len(pair) not in (1, 2) or min(pair) < minimum:
        raise ValueError(
            f'{name} must be an int or a pair (h, w) of ints >= {minimum}, got {value!r}')
    return pair * 2 if len(pair) == 1 else pair


def make_geometry(kernel_size: int | Sequence[int],
                  stride: int | Sequence[int] = 1,
                  padding: int | str | Sequence[int] = 0,
                  dilation: int | Sequence[int] = 1) -> Geometry:
    """Normalizes torch-style arguments into a :class:`Geometry`.

    Args:
        padding: int, (h, w), (left, right, top, bottom), or as in ``torch.nn.Conv2d``
            ``'valid'`` (none) and ``'same'`` (stride 1 only).
        dilation: int or (h, w); 1 is returned along a side of the kernel that is 1.

    Raises:
        ValueError: An argument has the wrong length, type or sign.
    """
    kernel = _pair('kernel_size', kernel_size, 1)
    stride = _pair('stride', stride, 1)
    # A single row or column has no gaps; torch's convolution can crash on a dilation of one
    # (channels_last on the CPU, torch 2.13).
    dilation = tuple(d if k > 1 else 1
                     for k, d in zip(kernel, _pair('dilation', dilation, 1), strict=True))
    if padding == 'same':
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride}; "
                             'give the padding as numbers')
        total_h, total_w = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        sides = (total_w // 2, total_w - total_w // 2, total_h // 2, total_h - total_h // 2)
    elif padding == 'valid':
        sides = (0, 0, 0, 0)
    else:
        sides = as_ints(padding) or ()
        if len(sides) == 1:
            sides *= 4
        elif len(sides) == 2:
            h, w = sides
            sides = (w, w, h, h)
        if len(sides) != 4 or min(sides) < 0:
            raise ValueError(
                "padding must be an int >= 0, (h, w), (left, right, top, bottom), 'same' or "
                f"'valid', got {padding!r}")
    return Geometry(kernel, stride, sides, dilation)


def expected_moments_factor(dropout_p: float, unit_size: int) -> float:
    """Factor a of E[var] = a * E2 - mean ** 2 under dropout of the statistics.

    With inverted dropout (keep 1 - p, scale q = 1 / (1 - p)) the second moment grows by q
    and the variance of the mean itself takes p / K of it away, K = ``unit_size``.
    """
    return (1 - dropout_p / unit_size) / (1 - dropout_p)


def pad(input: Tensor, geometry: Geometry) -> Tensor:
    """Zero-pads (N, C, H, W) on its four sides; the input itself where there is nothing to pad."""
    if any(geometry.padding):
        return torch.nn.functional.pad(input, geometry.padding)
    return input
