"""Kernel normalization in closed form: units are never built.

With s1, s2 the sums over channels of the (dropped) input and of its square, mean and second
moment of every unit are box sums of these one-channel maps, and

    y = z * rstd + b,   z = conv(x, W) - mean * sum(W),   rstd = (var + eps) ** -0.5

so a KNConv is one convolution, one read of its input and one pass over its output. The
convolutions stay torch's. Gradients are closed form as well, with g = dL/dy and h = g * rstd:

    db    = sum g
    dW    = conv_weight_grad(x, h) - sum_{n, p} h_o * mean
    dmean = -sum_o h_o * sum(W)_o - 2 * mean * dvar
    dvar  = -rstd ** 2 / 2 * sum_o h_o * z_o
    dx    = conv_input_grad(W, h) + m * (box^T(dmean) + 2 m x * box^T(dvar)) / K

where m is the dropout mask times 1 / (1 - p).

For groups == 1 the weight is centred, except in training where dropout noise bounds
abs(mean) * rstd: mean = conv(x, 1 / K), hence

    conv(x, W) - mean * sum(W) = conv(x, W - W.mean())

A constant unit (variance 0) has z = 0 by definition, rather than rounding times 316.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, pad
from .memory_format import dense_like
from .passes import Kept, MomentGrads, Moments, Passes, Shift
from .precision import Setting, accumulate_dtype


class Options(NamedTuple):
    """What a call is given beside tensors."""

    geometry: Geometry
    groups: int
    dropout_p: float
    training: bool
    rectify: bool = False  # the input goes through a relu first

    @property
    def has_dropout(self) -> bool:
        return self.training and self.dropout_p > 0

    def setting(self, x: Tensor) -> Setting:
        return Setting(x, self.geometry, self.dropout_p, self.training, self.groups)


class Output(NamedTuple):
    """Of :func:`forward`; z is still without its shifts, and overwritten unless it is kept."""

    y: Tensor  # (N, O, Ho, Wo)
    z: Tensor  # (N, O, Ho, Wo)
    moments: Moments


class Grads(NamedTuple):
    """Of :func:`backward`, None where not wanted."""

    x: Tensor | None  # (N, C, H, W)
    weight: Tensor | None  # (O, C / groups, kh, kw)
    bias: Tensor  # (O,)


class _Kernel(NamedTuple):
    """The weight as the convolution takes it, and the sums that correct for it, (O,) each."""

    weight: Tensor
    weight_sum: Tensor
    rounded_sum: Tensor | None  # of ``weight`` as rounded to half precision

    def shifts(self, setting: Setting, mean: Tensor,
               undropped_mean: Tensor | None) -> list[Shift]:
        """What is still to subtract from the convolution's output to make it z.

        Not centred: (sum W, mean). Centred and without dropout: nothing, because the kernel
        already removed the mean. Centred, with dropout: the kernel removed the mean of x, so
        (sum W, mean - undropped mean) remains. In half precision the rounded kernel has a sum of
        its own, which adds (sum kernel, mean of x).
        """
        shifts = []
        if setting.is_half:
            of_x = mean if undropped_mean is None else undropped_mean
            shifts.append(Shift(self.rounded_sum, of_x))
        if undropped_mean is not None:
            shifts.append(Shift(self.weight_sum, mean - undropped_mean))
        elif not setting.is_centred and not setting.is_half:
            shifts.append(Shift(self.weight_sum, mean))
        return shifts


def _sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.sum((1, 2, 3), dtype=accumulate_dtype(dtype))


def _kernel(weight: Tensor, setting: Setting, dtype: torch.dtype) -> _Kernel:
    weight_sum = _sum(weight, dtype)
    if setting.is_centred:
        weight = weight - (weight_sum / weight[0].numel()).view(-1, 1, 1, 1)
    weight = weight.to(dtype)
    return _Kernel(weight, weight_sum, _sum(weight, dtype) if setting.is_half else None)


def _prepared(x: Tensor, options: Options) -> tuple[Tensor, Geometry]:
    """x as it is convolved, and the geometry of that: rectified, and padded if one-sided.

    Neither is kept for backward, which prepares x (N, C, H, W) again.
    """
    if options.rectify:
        x = x.relu()
    if options.geometry.symmetric_padding is None:
        return pad(x, options.geometry), options.geometry._replace(padding=(0, 0, 0, 0))
    return x, options.geometry


def forward(passes: Passes, x: Tensor, weight: Tensor, bias: Tensor | None,
            residual: Tensor | None, mask: Tensor | None, options: Options, eps: float,
            relu: bool, keep_z: bool) -> Output:
    """y from x (N, C, H, W) and weight (O, C / groups, kh, kw)."""
    setting = options.setting(x)
    x, geometry = _prepared(x, options)
    moments = passes.unit_moments(x, geometry, mask, options.dropout_p, setting.factor, eps,
                                  setting.exact, setting.needs_undropped_mean)
    kernel = _kernel(weight, setting, x.dtype)
    z = F.conv2d(x, kernel.weight, None, geometry.stride, geometry.symmetric_padding,
                 geometry.dilation, options.groups)
    # Under dropout a constant unit differs from its mean, unless the constant is 0.
    dead = setting.exact and not setting.has_dropout
    scale = moments.rstd * moments.live if dead else moments.rstd
    shifts = kernel.shifts(setting, moments.mean, moments.undropped_mean)
    y = passes.normalize(z, scale, bias, residual, shifts, relu, not keep_z)
    return Output(y, z, moments)


def backward(passes: Passes, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             mask: Tensor | None, moments: Moments, kept: Kept, options: Options, need_x: bool,
             need_weight: bool) -> Grads:
    """Gradients of :func:`forward` from ``grad`` = dL/dy (N, O, Ho, Wo)."""
    setting, (height, width) = options.setting(x), x.shape[2:]
    x, geometry = _prepared(x, options)
    mean, rstd, live, undropped_mean = moments
    kernel = _kernel(weight, setting, x.dtype)
    shifts = [] if kept.z is None else kernel.shifts(setting, mean, undropped_mean)
    # Without dropout a constant unit adds nothing to dW: leave its rounding, times 316, out.
    has_dead = not setting.has_dropout and not (x.device.type == 'cpu' and live.all())
    output = kept.y if kept.z is None else kept.z
    grad = grad.contiguous() if output is None else dense_like(grad, output)
    scaled = passes.scale_grad(grad, kept, mean * live if has_dead else mean, rstd,
                               kernel.weight_sum, bias, shifts, need_x)
    h = scaled.h

    def conv_backward(need_x, need_weight):
        return torch.ops.aten.convolution_backward(
            h, x, kernel.weight, None, geometry.stride, geometry.symmetric_padding,
            geometry.dilation, False, (0, 0), options.groups, (need_x, need_weight, False))[:2]

    if has_dead and need_weight:
        dx = conv_backward(True, False)[0] if need_x else None
        h.mul_(live.unsqueeze(1))
        dweight = conv_backward(False, True)[1]
    else:
        dx, dweight = conv_backward(need_x, need_weight)
    if need_weight:  # the sum is the same for every element of a filter
        dweight = dweight.to(scaled.of_mean.dtype).sub_(scaled.of_mean.view(-1, 1, 1, 1))
        dweight = dense_like(dweight.to(weight.dtype), weight)
    if need_x:
        dvar = scaled.to_var * rstd * live * -0.5
        q = 1 / (1 - options.dropout_p) if setting.has_dropout else 1.0
        by_mean = 2 * mean * dvar
        # A centred kernel takes the undropped mean away itself; without dropout it is the mean.
        if setting.has_dropout or not setting.is_centred:
            by_mean = by_mean + scaled.to_mean
        unmasked = scaled.to_mean if setting.has_dropout and setting.is_centred else None
        grads = MomentGrads(by_mean * -q, dvar * (2 * q * q * setting.factor), unmasked)
        dx = passes.add_moment_grads(dense_like(dx, x), x, geometry, mask, options.dropout_p,
                                     grads, options.rectify)
        if geometry is not options.geometry:  # what is padded here is cut off again
            left, _, top, _ = options.geometry.padding
            dx = dense_like(dx[..., top:top + height, left:left + width], x)
    return Grads(dx, dweight if need_weight else None, scaled.bias)


def pixel_norm(passes: Passes, x: Tensor, mask: Tensor | None, options: Options, eps: float,
               relu: bool) -> tuple[Tensor, Moments]:
    """(x - mean) * rstd of every pixel of x (N, C, H, W), through relu if asked for."""
    setting = options.setting(x)
    mean, rstd, live, _ = passes.unit_moments(
        x, options.geometry, mask, options.dropout_p, setting.factor, eps, setting.exact, False)
    acc = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(acc), rstd.to(acc)
    y = torch.sub(x, mean.unsqueeze(1)).mul_(rstd.unsqueeze(1))
    y = y.relu_() if relu else y
    return y.to(x.dtype), Moments(mean, rstd, live, None)


def pixel_norm_backward(passes: Passes, grad: Tensor, x: Tensor, mask: Tensor | None,
                        moments: Moments, y: Tensor | None, options: Options) -> Tensor:
    """dx of :func:`pixel_norm` from ``grad`` = dL/dy (N, C, H, W); y is given under a relu.

    It is a KNConv whose convolution passes x on: with ones for sum(W), and z = x - mean.
    """
    setting, (mean, rstd, live, _) = options.setting(x), moments
    grad = dense_like(grad, x)
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    z = torch.sub(x, mean.unsqueeze(1))
    scaled = passes.scale_grad(grad, Kept(z=z), mean, rstd, mean.new_ones(x.size(1)), None, [],
                               True)
    q = 1 / (1 - options.dropout_p) if setting.has_dropout else 1.0
    dvar = scaled.to_var * rstd * live * -0.5
    grads = MomentGrads((2 * mean * dvar + scaled.to_mean) * -q,
                        dvar * (2 * q * q * setting.factor), None)
    return passes.add_moment_grads(scaled.h, x, options.geometry, mask, options.dropout_p, grads,
                                   False)


def moments_backward(passes: Passes, grad_mean: Tensor, grad_rstd: Tensor, x: Tensor,
                     mask: Tensor | None, moments: Moments, options: Options) -> Tensor:
    """dx from the gradients of mean and rstd, (N, Ho, Wo) each, as :func:`forward` takes them."""
    setting = options.setting(x)
    q = 1 / (1 - options.dropout_p) if setting.has_dropout else 1.0
    dvar = grad_rstd * moments.rstd**3 * moments.live * -0.5
    grads = MomentGrads((grad_mean - 2 * moments.mean * dvar) * q,
                        dvar * (2 * q * q * setting.factor), None)
    return passes.add_moment_grads(torch.zeros_like(x), x, options.geometry, mask,
                                   options.dropout_p, grads, False)
