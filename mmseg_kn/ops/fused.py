"""Kernel normalization in closed form, in torch ops: units are never built.

With s1, s2 the sums over channels of the (dropped) input and of its square, mean and second
moment of every unit are box sums of these one-channel maps, and

    y = z * rstd + b,   z = conv(x, W) - mean * sum(W),   rstd = (var + eps) ** -0.5

so a KNConv is one convolution and a few element-wise passes. The gradients are closed form as
well (:class:`_KNConv2d`). The device must know float64.

What keeps it accurate where |mean| >> std (bright skies, constant borders):

* The channel sums are those of x minus the pixel's first channel, in float32 or better, and
  everything on one-channel maps is float64. The variance of a constant unit comes out as 0,
  and its z, which rstd would multiply by 316, is taken as 0 rather than as conv's rounding.
* For groups == 1 the weight is centred: mean = conv(x, 1 / K), hence
  conv(x, W) - mean * sum(W) = conv(x, W - W.mean()), which has no cancellation left.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .geometry import Geometry, expected_moments_factor, pad


def box_sum(maps: Tensor, geometry: Geometry) -> Tensor:
    """Sums (..., H, W) over every window to (..., Ho, Wo), rows first, then columns."""
    sizes = geometry.output_size(*maps.shape[-2:])
    maps = F.pad(maps, geometry.padding)
    for dim, size, k, s, d in zip((-2, -1), sizes, geometry.kernel, geometry.stride,
                                  geometry.dilation, strict=True):
        maps = sum(_every(maps, dim, i * d, size, s) for i in range(k))
    return maps


def box_sum_transpose(maps: Tensor, geometry: Geometry, height: int, width: int) -> Tensor:
    """Adjoint of :func:`box_sum`: (..., Ho, Wo) to (..., ``height``, ``width``)."""
    left, right, top, bottom = geometry.padding
    padded = (height + top + bottom, width + left + right)
    for dim, full, k, s, d in zip((-1, -2), reversed(padded), reversed(geometry.kernel),
                                  reversed(geometry.stride), reversed(geometry.dilation),
                                  strict=True):
        shape = list(maps.shape)
        shape[dim] = full
        spread = maps.new_zeros(shape)
        for i in range(k):
            _every(spread, dim, i * d, maps.size(dim), s).add_(maps)
        maps = spread
    return maps[..., top:top + height, left:left + width]


def _every(maps: Tensor, dim: int, start: int, size: int, step: int) -> Tensor:
    """View of ``size`` rows or columns from ``start``, ``step`` apart."""
    index = [slice(None)] * maps.dim()
    index[dim] = slice(start, start + (size - 1) * step + 1, step)
    return maps[tuple(index)]


class Dropped(NamedTuple):
    """Elements that dropout takes out of the statistics.

    At small p a list of positions is 20 times shorter than a mask, and drawing the gaps
    between them needs as many fewer random numbers.
    """

    index: Tensor  # positions in memory order, ascending
    scale: float  # 1 / (1 - p), of the kept ones

    @staticmethod
    def draw(x: Tensor, p: float) -> 'Dropped':
        """Draws from torch's generator of ``x.device``, each element with probability p."""
        numel, last, parts = x.numel(), -1, []
        expected = numel * p
        count = int(expected + 6 * math.sqrt(expected)) + 16
        while last < numel - 1:
            gaps = torch.empty(count, dtype=torch.int64, device=x.device).geometric_(p)
            # CUDA rounds to float32 and may draw 0; a tiny p overflows the sum.
            gaps.clamp_(1, numel + 1)
            parts.append(gaps.cumsum(0) + last)
            last = int(parts[-1][-1])
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=x.device)
        index = index[index < numel]
        return Dropped(index.int() if numel < 2**31 else index, 1 / (1 - p))

    def pixels(self, x: Tensor) -> Tensor:
        """Positions of the dropped elements in the (N, H, W) maps, flattened."""
        channels, area = x.size(1), x.size(2) * x.size(3)
        index = self.index.long()
        if _memory_format(x) == torch.channels_last:
            return index // channels
        return index // (channels * area) * area + index % area


def _memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


def _flat(x: Tensor) -> Tensor:
    """Dense (N, C, H, W) as a 1-D view in memory order."""
    if _memory_format(x) == torch.channels_last:
        x = x.permute(0, 2, 3, 1)
    return x.view(-1)


class Moments(NamedTuple):
    """Statistics of the units, (N, Ho, Wo) in float64."""

    mean: Tensor  # of the dropped input
    rstd: Tensor
    plain_mean: Tensor  # of the input itself
    live: Tensor  # bool: the variance is above 0 and above float64's rounding


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit_moments(x: Tensor, geometry: Geometry, dropped: Dropped | None, factor: float,
                 eps: float) -> Moments:
    """Moments of every unit; var = max(``factor`` * E2 - mean ** 2, 0)."""
    channels = x.size(1)
    first = x[:, :1].to(_accumulate_dtype(x.dtype))
    shifted = x - first
    shift_sum = shifted.sum(1).double()
    shift_square = shifted.square_().sum(1).double()
    first = first.squeeze(1).double()
    plain = shift_sum + channels * first
    square = shift_square + first * (shift_sum + plain)
    maps = [plain, square]
    if dropped:
        values = _flat(x).index_select(0, dropped.index).double()
        pixels = dropped.pixels(x)
        lost = torch.zeros_like(plain).view(-1).index_add_(0, pixels, values).view_as(plain)
        lost_square = torch.zeros_like(plain).view(-1).index_add_(
            0, pixels, values.square_()).view_as(plain)
        q = dropped.scale
        maps = [q * (plain - lost), q * q * (square - lost_square), plain]
    kh, kw = geometry.kernel
    moments = box_sum(torch.stack(maps), geometry) / (channels * kh * kw)
    # Squares beyond float32 are inf: a huge finite number keeps inf - inf out.
    mean, second = moments[0], moments[1].clamp(max=1e300)
    var = factor * second - mean.square()
    live = var > 1e-14 * second
    return Moments(mean, (var * live + eps).rsqrt(), moments[-1] if dropped else mean, live)


def _add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, dropped: Dropped | None,
                      dmean: Tensor, dsecond: Tensor, dplain: Tensor | None) -> Tensor:
    """Adds to ``dx`` what reaches x through mean, second moment and plain mean of its units.

    dx += box^T(dplain) / K + m * box^T(dmean) / K + m ** 2 * 2 x * box^T(dsecond) / K with m
    the dropout mask, scaled. Works in place where it can.
    """
    kh, kw = geometry.kernel
    q = dropped.scale if dropped else 1.0
    if dplain is None:
        dplain = torch.zeros_like(dmean)
    maps = torch.stack([dplain + q * dmean, 2 * q * q * dsecond] + ([dplain] if dropped else []))
    maps = box_sum_transpose(maps, geometry, x.size(2), x.size(3)) / (x.size(1) * kh * kw)
    maps = maps.to(_accumulate_dtype(x.dtype)).unsqueeze(2)
    dx = dx.to(maps.dtype)
    if dropped:
        dx = dx.contiguous(memory_format=_memory_format(x))
        index = dropped.index.long()
        kept_out = _flat(dx).index_select(0, index)
        kept_out += maps[2].reshape(-1).index_select(0, dropped.pixels(x))
    dx.add_(maps[0]).addcmul_(x.to(maps.dtype), maps[1])
    if dropped:
        _flat(dx).index_copy_(0, index, kept_out)
    return dx.to(x.dtype)


def _normalized_conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
                     groups: int, moments: Moments,
                     dropped: Dropped | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output y, the z of it, and the weight that the convolution took, all as ``x``."""
    acc = _accumulate_dtype(x.dtype)
    centred = groups == 1
    kernel = weight - weight.mean((1, 2, 3), keepdim=True) if centred else weight
    kernel = kernel.to(x.dtype)
    z = F.conv2d(x, kernel, None, geometry.stride, geometry.symmetric_padding,
                 geometry.dilation, groups).to(acc)
    if not centred or x.dtype != acc:  # in half precision the rounded weight has a sum
        z.addcmul_(_per_channel(kernel.sum((1, 2, 3), dtype=acc)),
                   moments.plain_mean.unsqueeze(1).to(acc), value=-1)
    if dropped:
        shift = moments.mean - moments.plain_mean
        z.addcmul_(_per_channel(weight.sum((1, 2, 3), dtype=acc)), shift.unsqueeze(1).to(acc),
                   value=-1)
    # Under dropout a constant unit differs from its mean, unless it is 0.
    scale = moments.rstd if dropped else moments.rstd * moments.live
    scale = scale.unsqueeze(1).to(acc)
    y = z * scale if bias is None else torch.addcmul(_per_channel(bias.to(acc)), z, scale)
    return y.to(x.dtype), z.to(x.dtype), kernel


class _KNConv2d(torch.autograd.Function):
    """Closed-form gradients, with g = dL/dy and h = g * rstd:

        db    = sum g
        dW    = conv_weight_grad(x, h) - sum_{n, p} h_o * mean
        dmean = -sum_o h_o * sum(W)_o - 2 * mean * dvar
        dvar  = -rstd ** 2 / 2 * sum_o h_o * z_o

    and dx from conv_input_grad(W, h), dmean and dvar. z is saved rather than y, because an
    in-place activation may overwrite y.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, groups, dropout_p, training, eps):
        x, factor, dropped, moments = _statistics(x, geometry, dropout_p, training, eps)
        y, z, kernel = _normalized_conv(x, weight, bias, geometry, groups, moments, dropped)
        ctx.save_for_backward(x, weight, kernel, z, moments.mean, moments.rstd, moments.live,
                              None if dropped is None else dropped.index)
        ctx.geometry, ctx.groups = geometry, groups
        ctx.factor, ctx.scale = factor, dropped.scale if dropped else 1.0
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, kernel, z, mean, rstd, live, index = ctx.saved_tensors
        dropped = None if index is None else Dropped(index, ctx.scale)
        geometry, acc = ctx.geometry, _accumulate_dtype(x.dtype)
        grad = grad.to(acc)
        dbias = grad.sum((0, 2, 3)).to(ctx.bias_dtype) if ctx.bias_dtype else None
        h = grad * rstd.unsqueeze(1).to(acc)
        need_x, need_weight = ctx.needs_input_grad[:2]

        def conv_backward(h, need_x, need_weight):
            return torch.ops.aten.convolution_backward(
                h.to(x.dtype), x, kernel, None, geometry.stride, geometry.symmetric_padding,
                geometry.dilation, False, (0, 0), ctx.groups, (need_x, need_weight, False))[:2]

        h_weight = h
        if dropped or not need_weight or live.all():
            dx, dweight = conv_backward(h, need_x, need_weight)
        else:  # constant units add nothing to dW: leave their rounding, times 316, out
            h_weight = h * live.unsqueeze(1)
            dx = conv_backward(h, True, False)[0] if need_x else None
            dweight = conv_backward(h_weight, False, True)[1]
        if need_weight:
            of_mean = torch.einsum('nohw,nhw->o', h_weight, mean.to(acc))
            dweight = (dweight.to(acc) - _per_channel(of_mean).transpose(0, 1)).to(weight.dtype)
        if need_x:
            to_mean = torch.einsum('nohw,o->nhw', h, weight.sum((1, 2, 3), dtype=acc)).double()
            dvar = (h * z).sum(1).double() * rstd.square() * live * -0.5
            dx = _add_moment_grads(
                dx, x, geometry, dropped, -to_mean - 2 * mean * dvar, ctx.factor * dvar,
                to_mean if ctx.groups == 1 else None)
        return dx, dweight, dbias, None, None, None, None, None


class _UnitMoments(torch.autograd.Function):
    """x (N, C, H, W) -> mean, rstd of its units, each (N, Ho, Wo) in float64."""

    @staticmethod
    def forward(ctx, x, geometry, dropout_p, training, eps):
        x, factor, dropped, moments = _statistics(x, geometry, dropout_p, training, eps)
        ctx.save_for_backward(x, moments.mean, moments.rstd, moments.live,
                              None if dropped is None else dropped.index)
        ctx.geometry, ctx.factor = geometry, factor
        ctx.scale = dropped.scale if dropped else 1.0
        return moments.mean, moments.rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_rstd):
        x, mean, rstd, live, index = ctx.saved_tensors
        dropped = None if index is None else Dropped(index, ctx.scale)
        dvar = grad_rstd * rstd**3 * live * -0.5
        dx = _add_moment_grads(
            torch.zeros_like(x), x, ctx.geometry, dropped,
            grad_mean - 2 * mean * dvar, ctx.factor * dvar, None)
        return dx, None, None, None, None


def _statistics(x: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                eps: float) -> tuple[Tensor, float, Dropped | None, Moments]:
    """Dense x, and its moments under dropout: drawn in training, expected in evaluation."""
    x, factor, dropped = _dense(x), 1.0, None
    if dropout_p and training:
        dropped = Dropped.draw(x, dropout_p)
    elif dropout_p:
        kh, kw = geometry.kernel
        factor = expected_moments_factor(dropout_p, x.size(1) * kh * kw)
    return x, factor, dropped, unit_moments(x, geometry, dropped, factor, eps)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether to go through autograd; else the ops are open to FLOP counters and exporters."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing() and any(
        t is not None and t.requires_grad for t in tensors)


def kn_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
              groups: int, dropout_p: float, training: bool, eps: float) -> Tensor:
    """:func:`mmseg_kn.ops.kn_conv2d` in closed form."""
    if geometry.symmetric_padding is None:
        input, geometry = pad(input, geometry), geometry._replace(padding=(0, 0, 0, 0))
    if _differentiates(input, weight, bias):
        return _KNConv2d.apply(input, weight, bias, geometry, groups, dropout_p, training, eps)
    x, _, dropped, moments = _statistics(input, geometry, dropout_p, training, eps)
    return _normalized_conv(x, weight, bias, geometry, groups, moments, dropped)[0]


def kernel_norm2d(input: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                  eps: float) -> Tensor:
    """:func:`mmseg_kn.ops.kernel_norm2d`; only the output itself has the size of the units."""
    input, geometry = pad(input, geometry), geometry._replace(padding=(0, 0, 0, 0))
    if _differentiates(input):
        mean, rstd = _UnitMoments.apply(input, geometry, dropout_p, training, eps)
    else:
        mean, rstd = _statistics(input, geometry, dropout_p, training, eps)[3][:2]
    acc = _accumulate_dtype(input.dtype)
    mean, rstd = mean.to(acc), rstd.to(acc)
    (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
    units = input.unfold(2, kh, sh).unfold(3, kw, sw)
    units = (units - mean[:, None, :, :, None, None]) * rstd[:, None, :, :, None, None]
    units = units.to(input.dtype).transpose(3, 4)
    n, c, ho, _, wo, _ = units.shape
    return units.reshape(n, c, ho * kh, wo * kw)
