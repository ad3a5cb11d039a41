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
from .passes import Kept, MomentGrads, Moments, MomentTerms, Passes, Shift
from .precision import Setting, accumulate_dtype, unrounded_convolution


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

    @property
    def q(self) -> float:
        """What the elements that dropout leaves in the statistics are multiplied by."""
        return 1 / (1 - self.dropout_p) if self.has_dropout else 1.0

    def setting(self, x: Tensor) -> Setting:
        return Setting(x, self.geometry, self.dropout_p, self.training, self.groups)


class Output(NamedTuple):
    """Of :func:`forward`; z is still without its shifts, and overwritten unless it is kept.

    It is None where backward never reads it.
    """

    y: Tensor  # (N, O, Ho, Wo)
    z: Tensor | None  # (N, O, Ho, Wo)
    moments: Moments
    weight_sum: Tensor | None = None  # (O,), where backward need not prepare the weight again


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

    def shifts(self, setting: Setting, moments: Moments) -> list[Shift]:
        """What is still to subtract from the convolution's output to make it z.

        Not centred: (sum W, mean). Centred and without dropout: nothing, because the kernel
        already removed the mean. Centred, with dropout: the kernel removed the mean of x, so
        (sum W, mean - undropped mean) remains. In half precision the rounded kernel has a sum of
        its own, which adds (sum kernel, mean of x).
        """
        shifts, mean, undropped_mean = [], moments.mean, moments.undropped_mean
        if setting.is_half:
            of_x = mean if undropped_mean is None else undropped_mean
            shifts.append(Shift(self.rounded_sum, of_x))
        if undropped_mean is not None:
            drift = moments.drift
            shifts.append(Shift(self.weight_sum,
                                mean - undropped_mean if drift is None else drift))
        elif not setting.is_centred and not setting.is_half:
            shifts.append(Shift(self.weight_sum, mean))
        return shifts


def prepared(x: Tensor, options: Options) -> tuple[Tensor, Geometry]:
    """x as it is convolved, and the geometry of that: rectified, and padded if one-sided.

    Neither is kept for backward, which prepares x (N, C, H, W) again.
    """
    if options.rectify:
        x = x.relu()
    if options.geometry.symmetric_padding is None:
        return pad(x, options.geometry), options.geometry._replace(padding=(0, 0, 0, 0))
    return x, options.geometry


def unpadded(dx: Tensor, options: Options, size: torch.Size) -> Tensor:
    """dx of an input of ``size`` (H, W), from that of what :func:`prepared` made of it."""
    if options.geometry.symmetric_padding is not None:
        return dx
    left, _, top, _ = options.geometry.padding
    return dense_like(dx[..., top:top + size[0], left:left + size[1]], dx)


def forward(passes: Passes, x: Tensor, weight: Tensor, bias: Tensor | None,
            residual: Tensor | None, mask: Tensor | None, options: Options, eps: float,
            relu: bool, keep_z: bool) -> Output:
    """y from x (N, C, H, W) and weight (O, C / groups, kh, kw)."""
    setting = options.setting(x)
    x, geometry = prepared(x, options)
    moments = passes.unit_moments(x, geometry, mask, options.dropout_p, setting.factor, eps,
                                  setting.exact, setting.needs_undropped_mean)
    kernel = _Kernel(*passes.prepare_weight(weight, x, setting.is_centred))
    with unrounded_convolution(x, setting):
        z = F.conv2d(x, kernel.weight, None, geometry.stride, geometry.symmetric_padding,
                     geometry.dilation, options.groups)
    # Under dropout a constant unit differs from its mean, unless the constant is 0.
    dead = setting.exact and not setting.has_dropout
    scale = moments.rstd * moments.live if dead else moments.rstd
    shifts = kernel.shifts(setting, moments)
    y = passes.normalize(z, scale, bias, residual, shifts, relu, not keep_z)
    as_it_is = kernel.weight is weight and not setting.is_half  # else backward needs more of it
    return Output(y, z, moments, kernel.weight_sum if as_it_is else None)


def backward(passes: Passes, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             mask: Tensor | None, moments: Moments, kept: Kept, options: Options, need_x: bool,
             need_weight: bool) -> Grads:
    """Gradients of :func:`forward` from ``grad`` = dL/dy (N, O, Ho, Wo)."""
    setting, size = options.setting(x), x.shape[2:]
    x, geometry = prepared(x, options)
    mean, rstd, live = moments[:3]
    if kept.weight_sum is None:
        kernel = _Kernel(*passes.prepare_weight(weight, x, setting.is_centred))
    else:
        kernel = _Kernel(weight, kept.weight_sum, None)
    shifts = [] if kept.z is None else kernel.shifts(setting, moments)
    # Without dropout a constant unit adds nothing to dW: leave its rounding, times 316, out.
    has_dead = not setting.has_dropout and not (x.device.type == 'cpu' and live.all())
    output = kept.y if kept.z is None else kept.z
    grad = dense_like(grad, x if output is None else output)
    # A centred kernel takes the undropped mean away itself; without dropout it is the mean.
    terms = MomentTerms(live, options.q, setting.factor,
                        setting.has_dropout or not setting.is_centred,
                        setting.has_dropout and setting.is_centred) if need_x else None
    scaled = passes.scale_grad(grad, kept, mean * live if has_dead else mean, rstd,
                               kernel.weight_sum, bias, shifts, terms)
    h = scaled.h

    def conv_backward(need_x, need_weight):
        with unrounded_convolution(x, setting):
            return torch.ops.aten.convolution_backward(
                h, x, kernel.weight, None, geometry.stride, geometry.symmetric_padding,
                geometry.dilation, False, (0, 0), options.groups, (need_x, need_weight, False))[:2]

    if has_dead and need_weight:
        dx = conv_backward(True, False)[0] if need_x else None
        passes.clear_dead(h, live)
        dweight = conv_backward(False, True)[1]
    else:
        dx, dweight = conv_backward(need_x, need_weight)
    if need_weight:  # the sum is the same for every element of a filter
        dweight = passes.finish_weight_grad(dweight, scaled.of_mean, weight)
    if need_x:
        dx = passes.add_moment_grads(dense_like(dx, x), x, geometry, mask, options.dropout_p,
                                     scaled.to_moments, options.rectify)
        dx = unpadded(dx, options, size)
    return Grads(dx, dweight if need_weight else None, scaled.bias)


def pixel_norm(passes: Passes, x: Tensor, mask: Tensor | None, options: Options, eps: float,
               relu: bool) -> tuple[Tensor, Moments]:
    """(x - mean) * rstd of every pixel of x (N, C, H, W), through relu if asked for."""
    setting = options.setting(x)
    mean, rstd, live = passes.unit_moments(x, options.geometry, mask, options.dropout_p,
                                           setting.factor, eps, setting.exact, False)[:3]
    acc = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(acc), rstd.to(acc)
    return passes.normalize_pixels(x, mean, rstd, relu), Moments(mean, rstd, live, None)


def pixel_norm_backward(passes: Passes, grad: Tensor, x: Tensor, mask: Tensor | None,
                        moments: Moments, y: Tensor | None, options: Options) -> Tensor:
    """dx of :func:`pixel_norm` from ``grad`` = dL/dy (N, C, H, W); y is given under a relu.

    It is a KNConv whose convolution passes x on: with ones for sum(W), and z = x - mean.
    """
    setting, (mean, rstd, live) = options.setting(x), moments[:3]
    terms = MomentTerms(live, options.q, setting.factor, masked=True, unmasked=False)
    return passes.normalize_pixels_backward(dense_like(grad, x), x, mask, options.dropout_p, mean,
                                            rstd, terms, y)


def moments_backward(passes: Passes, grad_mean: Tensor, grad_rstd: Tensor, x: Tensor,
                     mask: Tensor | None, moments: Moments, options: Options) -> Tensor:
    """dx from the gradients of mean and rstd, (N, Ho, Wo) each, as :func:`forward` takes them."""
    setting = options.setting(x)
    q = options.q
    dvar = grad_rstd * moments.rstd**3 * moments.live * -0.5
    grads = MomentGrads((grad_mean - 2 * moments.mean * dvar) * q,
                        dvar * (2 * q * q * setting.factor), None)
    return passes.add_moment_grads(torch.zeros_like(x), x, options.geometry, mask,
                                   options.dropout_p, grads, False)
