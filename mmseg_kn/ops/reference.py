"""The definition of kernel normalization in plain torch: the oracle of every test.

Every unit is built, normalized by its own mean and variance and only then convolved. This
costs kh * kw times the input's memory and is meant to be read and compared with, not to
train with.

Source: R. Nasirigerdeh, R. Torkzadehmahani, D. Rueckert, G. Kaissis, "Kernel Normalized
Convolutional Networks", TMLR 2024 (arXiv 2205.10089). Added here: dilation, and evaluation
by the expected moments where the paper leaves dropout on.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, expected_moments_factor, pad


def _units(input: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, H, W), already padded, to units (N, C * kh * kw, Ho * Wo)."""
    return F.unfold(input, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)


def normalized_units(input: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                     eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Units (N, K, Ho * Wo) of ``input`` (N, C, H, W), each normalized; their mean and deviation.

    (x - mean) / sqrt(var + eps), with biased variance. In training, mean and var are those
    of a copy that went through dropout; in evaluation they are the expectation over that
    dropout: mean = E1, var = max(q * E2 * (1 - p / K) - E1 ** 2, 0). Computed in float32 or
    better, units returned in the dtype of ``input``; mean and sqrt(var + eps) are
    (N, 1, Ho * Wo).
    """
    padded = pad(input, geometry).to(torch.promote_types(input.dtype, torch.float32))
    units = _units(padded, geometry)
    if training:
        dropped = _units(F.dropout(padded, dropout_p), geometry) if dropout_p else units
        var, mean = torch.var_mean(dropped, dim=1, correction=0, keepdim=True)
    else:
        var, mean = torch.var_mean(units, dim=1, correction=0, keepdim=True)
        if dropout_p:
            second_moment = units.square().mean(1, keepdim=True)
            factor = expected_moments_factor(dropout_p, units.size(1))
            var = (factor * second_moment - mean.square()).clamp(min=0)
    deviation = torch.sqrt(var + eps)
    return ((units - mean) / deviation).to(input.dtype), mean, deviation


def kernel_norm2d(input: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                  eps: float) -> Tensor:
    """:func:`mmseg_kn.ops.kernel_norm2d` by definition."""
    kh, kw = geometry.kernel
    ho, wo = geometry.output_size(*input.shape[2:])
    units = normalized_units(input, geometry, dropout_p, training, eps)[0]
    units = units.reshape(input.size(0), input.size(1), kh, kw, ho, wo)
    return units.permute(0, 1, 4, 2, 5, 3).reshape(input.size(0), input.size(1), ho * kh, wo * kw)


def kn_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
              groups: int, dropout_p: float, training: bool,
              eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmseg_kn.ops.kn_conv2d` by definition, with moments."""
    units, mean, deviation = normalized_units(input, geometry, dropout_p, training, eps)
    side_by_side = units.reshape(input.size(0), input.size(1), *geometry.kernel, units.size(2))
    # One unit per column: the convolution over a column whose kernel is the whole unit.
    columns = side_by_side.permute(0, 1, 4, 2, 3).flatten(2, 3)
    weight = weight.to(input.dtype)  # which autocast has lowered
    bias = None if bias is None else bias.to(input.dtype)
    output = F.conv2d(columns, weight, bias, stride=geometry.kernel, groups=groups)
    n, size = input.size(0), geometry.output_size(*input.shape[2:])
    return (output.reshape(n, weight.size(0), *size), mean.detach().reshape(n, *size),
            deviation.detach().reciprocal().reshape(n, *size))
