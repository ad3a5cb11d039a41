"""Kernel normalization in closed form: units are never built.

With s1, s2 the sums over channels of the (dropped) input and of its square, mean and second
moment of every unit are box sums of these one-channel maps, and

    y = z * rstd + b,   z = conv(x, W) - mean * sum(W),   rstd = (var + eps) ** -0.5

so a KNConv is one convolution, one read of its input and one pass over its output. The passes
are those of :mod:`.fused` or :mod:`.triton_kernels`; the convolutions stay torch's. Gradients
are closed form as well, with g = dL/dy and h = g * rstd:

    db    = sum g
    dW    = conv_weight_grad(x, h) - sum_{n, p} h_o * mean
    dmean = -sum_o h_o * sum(W)_o - 2 * mean * dvar
    dvar  = -rstd ** 2 / 2 * sum_o h_o * z_o
    dx    = conv_input_grad(W, h) + m * (box^T(dmean) + 2 m x * box^T(dvar)) / K

where m is the dropout mask times 1 / (1 - p). Both directions are custom operators, which
torch.compile and CUDA graphs take as one step each. Without gradients the fused passes are plain
torch ops, open to exporters and FLOP counters.

For groups == 1 the weight is centred, except in training where dropout noise bounds
|mean| * rstd: mean = conv(x, 1 / K), hence

    conv(x, W) - mean * sum(W) = conv(x, W - W.mean())

A constant unit (variance 0) has z = 0 by definition, rather than rounding times 316.
"""
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .fused import MomentGrads, accumulate_dtype, is_channels_last
from .geometry import Geometry, expected_moments_factor, pad


def _passes(impl: str) -> ModuleType:
    if impl == 'fused':
        return fused
    from . import triton_kernels
    return triton_kernels


class _Setting:
    """How one call computes: what follows from its arguments before any tensor is read."""

    def __init__(self, x: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                 groups: int = 1) -> None:
        kh, kw = geometry.kernel
        unit = x.size(1) * kh * kw
        self.dropped = training and dropout_p > 0
        self.factor = 1.0 if training else expected_moments_factor(dropout_p, unit)
        # E2 - mean ** 2 cancels unless dropout noise, or its expectation, keeps it up.
        noisy = (1 - dropout_p)**unit < 1e-5 if training else self.factor > 1.01
        self.exact = not noisy or x.dtype == torch.float64
        self.half = accumulate_dtype(x.dtype) != x.dtype
        # Dropout's noise bounds |mean| * rstd, about 1 / sqrt(p): float32 can do without.
        self.centred = groups == 1 and (self.half or not self.dropped or dropout_p < 0.01)
        self.plain = self.dropped and (self.half or self.centred)

    def kernel(self, weight: Tensor, weight_sum: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the convolution takes."""
        if self.centred:
            weight = weight - (weight_sum / weight[0].numel()).view(-1, 1, 1, 1)
        return weight.to(dtype)

    def shifts(self, weight_sum: Tensor, kernel_sum: Tensor | None, mean: Tensor,
               plain: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pairs (s, u): z is the convolution's output minus the sum of s * u.

        In half precision even a centred kernel has a sum, by rounding.
        """
        shifts = [(kernel_sum, mean if plain is None else plain)] if self.half else []
        if plain is not None:
            return [*shifts, (weight_sum, mean - plain)]
        return shifts if self.centred or self.half else [(weight_sum, mean)]


def _weight_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.sum((1, 2, 3), dtype=accumulate_dtype(dtype))


def _forward(passes, x, weight, bias, residual, dropped, geometry, groups, dropout_p, setting,
             eps, relu, keep_z):
    moments = passes.unit_moments(x, geometry, dropped, dropout_p, setting.factor, eps,
                                  setting.exact, setting.plain)
    weight_sum = _weight_sum(weight, x.dtype)
    kernel = setting.kernel(weight, weight_sum, x.dtype)
    kernel_sum = _weight_sum(kernel, x.dtype) if setting.half else None
    z = F.conv2d(x, kernel, None, geometry.stride, geometry.symmetric_padding, geometry.dilation,
                 groups)
    # Under dropout a constant unit differs from its mean, unless it is 0.
    dead = setting.exact and not setting.dropped
    scale = moments.rstd * moments.live if dead else moments.rstd
    y = passes.normalize(z, scale, bias, residual,
                         setting.shifts(weight_sum, kernel_sum, moments.mean, moments.plain),
                         relu, not keep_z)
    return y, z, moments


def _symmetric(weight: Tensor, stride, padding, dilation) -> Geometry:
    h, w = padding
    return Geometry(tuple(weight.shape[2:]), tuple(stride), (w, w, h, h), tuple(dilation))


# Schemas are spelled out: torch 2.6 infers none from list[int].
@torch.library.custom_op('mmseg_kn::kn_conv2d', mutates_args=(), schema=(
    '(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? dropped, SymInt[] stride, '
    'SymInt[] padding, SymInt[] dilation, SymInt groups, float dropout_p, bool training, '
    'float eps, bool relu, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'))
def _kn_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
               dropped: Tensor | None, stride: list[int], padding: list[int],
               dilation: list[int], groups: int, dropout_p: float, training: bool, eps: float,
               relu: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and what backward needs: mean, rstd, live and, unless ``relu``, z and plain mean."""
    geometry = _symmetric(weight, stride, padding, dilation)
    setting = _Setting(x, geometry, dropout_p, training, groups)
    y, z, moments = _forward(_passes(impl), x, weight, bias, residual, dropped, geometry, groups,
                             dropout_p, setting, eps, relu, keep_z=not relu)
    acc, none = accumulate_dtype(x.dtype), x.new_empty(0)
    # a clone: an operator's outputs are no views
    plain = none if relu or moments.plain is None else moments.plain.to(acc).clone()
    return (y, moments.mean.to(acc), moments.rstd.to(acc), moments.live,
            x.new_empty(0) if relu else z, plain)


@_kn_conv2d.register_fake
def _(x, weight, bias, residual, dropped, stride, padding, dilation, groups, dropout_p, training,
      eps, relu, impl):
    geometry = _symmetric(weight, stride, padding, dilation)
    plain = _Setting(x, geometry, dropout_p, training, groups).plain and not relu
    z = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)
    acc, units = accumulate_dtype(x.dtype), (z.size(0), *z.shape[2:])
    return (torch.empty_like(z), x.new_empty(units, dtype=acc), x.new_empty(units, dtype=acc),
            x.new_empty(units, dtype=torch.bool), x.new_empty(0) if relu else z,
            x.new_empty(units, dtype=acc) if plain else x.new_empty(0))


@torch.library.custom_op('mmseg_kn::kn_conv2d_backward', mutates_args=(), schema=(
    '(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? dropped, Tensor mean, '
    'Tensor rstd, Tensor live, Tensor saved, Tensor plain, SymInt[] stride, SymInt[] padding, '
    'SymInt[] dilation, SymInt groups, float dropout_p, bool training, bool relu, bool need_x, '
    'bool need_weight, str impl) -> (Tensor, Tensor, Tensor)'))
def _kn_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                        dropped: Tensor | None, mean: Tensor, rstd: Tensor, live: Tensor,
                        saved: Tensor, plain: Tensor, stride: list[int], padding: list[int],
                        dilation: list[int], groups: int, dropout_p: float, training: bool,
                        relu: bool, need_x: bool, need_weight: bool,
                        impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW (each empty if not needed) and db; ``saved`` is y where ``relu``, else z."""
    passes, geometry = _passes(impl), _symmetric(weight, stride, padding, dilation)
    setting = _Setting(x, geometry, dropout_p, training, groups)
    weight_sum = _weight_sum(weight, x.dtype)
    kernel = setting.kernel(weight, weight_sum, x.dtype)
    kernel_sum = _weight_sum(kernel, x.dtype) if setting.half else None
    shifts = [] if relu else setting.shifts(weight_sum, kernel_sum, mean,
                                            plain if plain.numel() else None)
    # Without dropout a constant unit adds nothing to dW: leave its rounding, times 316, out.
    masked = not setting.dropped and not (x.device.type == 'cpu' and live.all())
    h, to_mean, hz, of_mean, dbias = passes.scale_grad(
        _like(grad, saved), saved, mean * live if masked else mean, rstd, weight_sum, bias,
        shifts, relu, need_x)

    def conv_backward(need_x, need_weight):
        return torch.ops.aten.convolution_backward(
            h, x, kernel, None, stride, padding, dilation, False, (0, 0), groups,
            (need_x, need_weight, False))[:2]

    if masked and need_weight:
        dx = conv_backward(True, False)[0] if need_x else None
        h.mul_(live.unsqueeze(1))
        dweight = conv_backward(False, True)[1]
    else:
        dx, dweight = conv_backward(need_x, need_weight)
    if need_weight:  # broadcast over (in, kh, kw)
        dweight = dweight.to(of_mean.dtype).sub_(of_mean.view(-1, 1, 1, 1)).to(weight.dtype)
        dweight = _like(dweight, weight)
    if need_x:
        dvar = hz * rstd * live * -0.5
        q = 1 / (1 - dropout_p) if setting.dropped else 1.0
        # A centred kernel takes the plain mean away itself; without dropout it is the mean.
        by_mean = 2 * mean * dvar
        if setting.dropped or not setting.centred:
            by_mean = by_mean + to_mean
        constant, slope = by_mean * -q, dvar * (2 * q * q * setting.factor)
        through_kernel = to_mean if setting.dropped and setting.centred else None
        dx = passes.add_moment_grads(_like(dx, x), x, geometry, dropped, dropout_p,
                                     MomentGrads(constant, slope, through_kernel))
    none = x.new_empty(0)
    return (dx if need_x else none, dweight if need_weight else x.new_empty(0),
            dbias if bias is None else dbias.to(bias.dtype))


@_kn_conv2d_backward.register_fake
def _(grad, x, weight, bias, dropped, mean, rstd, live, saved, plain, stride, padding, dilation,
      groups, dropout_p, training, relu, need_x, need_weight, impl):
    dbias = mean.new_empty(weight.size(0)) if bias is None else torch.empty_like(bias)
    return (torch.empty_like(x) if need_x else x.new_empty(0),
            torch.empty_like(weight) if need_weight else x.new_empty(0), dbias)


def _save_kn_conv2d(ctx, inputs, output):
    x, weight, bias, _, dropped, *ctx.options, _, ctx.relu, ctx.impl = inputs
    y, mean, rstd, live, z, plain = output
    ctx.mark_non_differentiable(mean, rstd, live, z, plain)
    ctx.set_materialize_grads(False)
    ctx.channels_last = is_channels_last(x)
    ctx.save_for_backward(x, weight, bias, dropped, mean, rstd, live, y if ctx.relu else z, plain)


def _kn_conv2d_grads(ctx, grad, *_):
    if grad is None:
        return (None, ) * 14
    x, weight, bias, *saved = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    if not (need_x or need_weight or need_bias):
        return (*[None] * 3, grad, *[None] * 10)
    x = _dense(x, ctx.channels_last)  # hooks may lose it, and dropped positions count in it
    with torch.autocast(x.device.type, enabled=False):  # backward() may be called under it
        dx, dweight, dbias = _kn_conv2d_backward(grad, x, weight, bias, *saved, *ctx.options,
                                                 ctx.relu, need_x, need_weight, ctx.impl)
    return (dx if need_x else None, dweight if need_weight else None,
            dbias if need_bias else None, grad if need_residual else None, *[None] * 10)


_kn_conv2d.register_autograd(_kn_conv2d_grads, setup_context=_save_kn_conv2d)


@torch.library.custom_op('mmseg_kn::unit_moments', mutates_args=(), schema=(
    '(Tensor x, Tensor? dropped, SymInt[] kernel, SymInt[] stride, float dropout_p, '
    'bool training, float eps, str impl) -> (Tensor, Tensor, Tensor)'))
def _unit_moments(x: Tensor, dropped: Tensor | None, kernel: list[int], stride: list[int],
                  dropout_p: float, training: bool, eps: float,
                  impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd and live of the units of x (N, C, H, W), already padded."""
    geometry = Geometry(tuple(kernel), tuple(stride), (0, 0, 0, 0), (1, 1))
    setting = _Setting(x, geometry, dropout_p, training)
    return _passes(impl).unit_moments(x, geometry, dropped, dropout_p, setting.factor, eps,
                                      setting.exact, False)[:3]


@_unit_moments.register_fake
def _(x, dropped, kernel, stride, dropout_p, training, eps, impl):
    geometry = Geometry(tuple(kernel), tuple(stride), (0, 0, 0, 0), (1, 1))
    exact = _Setting(x, geometry, dropout_p, training).exact
    dtype = torch.float64 if exact and impl == 'fused' else accumulate_dtype(x.dtype)
    units = (x.size(0), *geometry.output_size(*x.shape[2:]))
    return (x.new_empty(units, dtype=dtype), x.new_empty(units, dtype=dtype),
            x.new_empty(units, dtype=torch.bool))


@torch.library.custom_op('mmseg_kn::unit_moments_backward', mutates_args=(), schema=(
    '(Tensor grad_mean, Tensor grad_rstd, Tensor x, Tensor? dropped, Tensor mean, Tensor rstd, '
    'Tensor live, SymInt[] kernel, SymInt[] stride, float dropout_p, bool training, str impl) '
    '-> Tensor'))
def _unit_moments_backward(grad_mean: Tensor, grad_rstd: Tensor, x: Tensor,
                           dropped: Tensor | None, mean: Tensor, rstd: Tensor, live: Tensor,
                           kernel: list[int], stride: list[int], dropout_p: float,
                           training: bool, impl: str) -> Tensor:
    geometry = Geometry(tuple(kernel), tuple(stride), (0, 0, 0, 0), (1, 1))
    setting = _Setting(x, geometry, dropout_p, training)
    q = 1 / (1 - dropout_p) if setting.dropped else 1.0
    dvar = grad_rstd * rstd**3 * live * -0.5
    grads = MomentGrads((grad_mean - 2 * mean * dvar) * q,
                        dvar * (2 * q * q * setting.factor), None)
    return _passes(impl).add_moment_grads(torch.zeros_like(x), x, geometry, dropped, dropout_p,
                                          grads)


@_unit_moments_backward.register_fake
def _(grad_mean, grad_rstd, x, *_):
    return torch.empty_like(x)


def _save_unit_moments(ctx, inputs, output):
    x, dropped, *ctx.options, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.channels_last = is_channels_last(x)
    ctx.save_for_backward(x, dropped, *output)


def _unit_moments_grads(ctx, grad_mean, grad_rstd, _):
    x, *saved = ctx.saved_tensors
    x = _dense(x, ctx.channels_last)  # hooks may lose it, and dropped positions count in it
    dx = _unit_moments_backward(grad_mean, grad_rstd, x, *saved, *ctx.options, ctx.impl)
    return dx, *[None] * 7


_unit_moments.register_autograd(_unit_moments_grads, setup_context=_save_unit_moments)


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last
                        else torch.contiguous_format)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` dense in the memory format of ``other``."""
    return _dense(x, is_channels_last(other))


def exports() -> bool:
    """Whether an exporter is at work: it sees through torch ops only."""
    # torch 2.6 has no is_exporting
    return torch.jit.is_tracing() or getattr(torch.compiler, 'is_exporting', lambda: False)()


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether to go through autograd; else the ops are open to FLOP counters and exporters."""
    return torch.is_grad_enabled() and not exports() and any(
        t is not None and t.requires_grad for t in tensors)


def _opaque(impl: str) -> bool:
    """Compilers see triton's launches as operators only."""
    return impl == 'triton' and torch.compiler.is_compiling()


def _draw(passes: ModuleType, x: Tensor, dropout_p: float, training: bool) -> Tensor | None:
    return passes.draw(x, dropout_p) if training and dropout_p else None


def kn_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry,
              groups: int, dropout_p: float, training: bool, eps: float, relu: bool,
              residual: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmseg_kn.ops.kn_conv2d` in closed form, with moments."""
    if geometry.symmetric_padding is None:
        input, geometry = pad(input, geometry), geometry._replace(padding=(0, 0, 0, 0))
    x, passes = _like(input, input), _passes(impl)
    dropped = _draw(passes, x, dropout_p, training)
    if _differentiates(x, weight, bias, residual) or _opaque(impl):
        y, mean, rstd, live, *_ = _kn_conv2d(x, weight, bias, residual, dropped, geometry.stride,
                                             geometry.symmetric_padding, geometry.dilation,
                                             groups, dropout_p, training, eps, relu, impl)
    else:
        setting = _Setting(x, geometry, dropout_p, training, groups)
        y, _, (mean, rstd, live, _) = _forward(passes, x, weight, bias, residual, dropped,
                                               geometry, groups, dropout_p, setting, eps, relu,
                                               keep_z=False)
    return y, mean, rstd if dropped is not None else rstd * live


def kernel_norm2d(input: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                  eps: float, impl: str) -> Tensor:
    """:func:`mmseg_kn.ops.kernel_norm2d`; only the output itself has the size of the units."""
    input, geometry = pad(input, geometry), geometry._replace(padding=(0, 0, 0, 0))
    x, passes = _like(input, input), _passes(impl)
    dropped = _draw(passes, x, dropout_p, training)
    if _differentiates(x) or _opaque(impl):
        mean, rstd, _ = _unit_moments(x, dropped, geometry.kernel, geometry.stride, dropout_p,
                                      training, eps, impl)
    else:
        setting = _Setting(x, geometry, dropout_p, training)
        mean, rstd = passes.unit_moments(x, geometry, dropped, dropout_p, setting.factor, eps,
                                         setting.exact, False)[:2]
    acc = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(acc).unsqueeze(1), rstd.to(acc).unsqueeze(1)
    (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
    if (kh, kw, sh, sw) == (1, 1, 1, 1):
        return ((x - mean) * rstd).to(x.dtype)
    units = x.unfold(2, kh, sh).unfold(3, kw, sw)
    units = (units - mean[..., None, None]) * rstd[..., None, None]
    units = units.to(x.dtype).transpose(3, 4)
    n, c, ho, _, wo, _ = units.shape
    return units.reshape(n, c, ho * kh, wo * kw)
