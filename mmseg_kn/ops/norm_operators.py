"""The closed form of KernelNorm2d as operators, as :mod:`.operators` has it for KNConv."""
import torch
from torch import Tensor

from . import closed_form
from .autograd import without_autocast
from .closed_form import Options
from .dispatch import passes_of
from .memory_format import dense, is_channels_last
from .operators import grads_for, options_of, or_none
from .passes import Moments
from .precision import accumulate_dtype


def _window(kernel, stride, dropout_p, training) -> Options:
    """Options of :func:`unit_moments_op`, whose input is padded already."""
    return options_of(kernel, stride, (0, 0), (1, 1), 1, dropout_p, training)


@torch.library.custom_op('mmseg_kn::unit_moments', mutates_args=(), schema=(
    '(Tensor x, Tensor? mask, SymInt[] kernel, SymInt[] stride, float dropout_p, '
    'bool training, float eps, str impl) -> (Tensor, Tensor, Tensor)'))
def unit_moments_op(x: Tensor, mask: Tensor | None, kernel: list[int], stride: list[int],
                    dropout_p: float, training: bool, eps: float,
                    impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd and live of the units of x (N, C, H, W)."""
    options = _window(kernel, stride, dropout_p, training)
    setting = options.setting(x)
    return passes_of(impl).unit_moments(x, options.geometry, mask, dropout_p, setting.factor, eps,
                                        setting.exact, False)[:3]


@unit_moments_op.register_fake
def _(x, mask, kernel, stride, dropout_p, training, eps, impl):
    options = _window(kernel, stride, dropout_p, training)
    exact = options.setting(x).exact
    dtype = torch.float64 if exact and impl == 'fused' else accumulate_dtype(x.dtype)
    units = (x.size(0), *options.geometry.output_size(*x.shape[2:]))
    return (x.new_empty(units, dtype=dtype), x.new_empty(units, dtype=dtype),
            x.new_empty(units, dtype=torch.bool))


@torch.library.custom_op('mmseg_kn::unit_moments_backward', mutates_args=(), schema=(
    '(Tensor grad_mean, Tensor grad_rstd, Tensor x, Tensor? mask, Tensor mean, Tensor rstd, '
    'Tensor live, SymInt[] kernel, SymInt[] stride, float dropout_p, bool training, str impl) '
    '-> Tensor'))
def _unit_moments_backward(grad_mean: Tensor, grad_rstd: Tensor, x: Tensor, mask: Tensor | None,
                           mean: Tensor, rstd: Tensor, live: Tensor, kernel: list[int],
                           stride: list[int], dropout_p: float, training: bool,
                           impl: str) -> Tensor:
    return closed_form.moments_backward(passes_of(impl), grad_mean, grad_rstd, x, mask,
                                        Moments(mean, rstd, live, None),
                                        _window(kernel, stride, dropout_p, training))


@_unit_moments_backward.register_fake
def _(grad_mean, grad_rstd, x, *_):
    return torch.empty_like(x)


def _save_unit_moments(ctx, inputs, output):
    x, mask, *ctx.options, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.channels_last = is_channels_last(x)
    ctx.save_for_backward(x, mask, *output)


def _unit_moments_grads(ctx, grad_mean, grad_rstd, _):
    x, *kept = ctx.saved_tensors
    x = dense(x, ctx.channels_last)  # as in operators.py
    dx = _unit_moments_backward(grad_mean, grad_rstd, x, *kept, *ctx.options, ctx.impl)
    return grads_for(unit_moments_op, x=dx)


unit_moments_op.register_autograd(_unit_moments_grads, setup_context=_save_unit_moments)


def _pixel(dropout_p: float, training: bool) -> Options:
    return _window((1, 1), (1, 1), dropout_p, training)


@torch.library.custom_op('mmseg_kn::pixel_norm', mutates_args=(), schema=(
    '(Tensor x, Tensor? mask, float dropout_p, bool training, float eps, bool relu, str impl) '
    '-> (Tensor, Tensor, Tensor, Tensor)'))
def pixel_norm_op(x: Tensor, mask: Tensor | None, dropout_p: float, training: bool, eps: float,
                  relu: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of x (N, C, H, W), every pixel of which is a unit, with mean, rstd and live."""
    y, moments = closed_form.pixel_norm(passes_of(impl), x, mask, _pixel(dropout_p, training),
                                        eps, relu)
    return y, *moments[:3]


@pixel_norm_op.register_fake
def _(x, mask, dropout_p, training, eps, relu, impl):
    units, acc = (x.size(0), *x.shape[2:]), accumulate_dtype(x.dtype)
    return (torch.empty_like(x), x.new_empty(units, dtype=acc), x.new_empty(units, dtype=acc),
            x.new_empty(units, dtype=torch.bool))


@torch.library.custom_op('mmseg_kn::pixel_norm_backward', mutates_args=(), schema=(
    '(Tensor grad, Tensor x, Tensor? mask, Tensor mean, Tensor rstd, Tensor live, Tensor y, '
    'float dropout_p, bool training, str impl) -> Tensor'))
def _pixel_norm_backward(grad: Tensor, x: Tensor, mask: Tensor | None, mean: Tensor, rstd: Tensor,
                         live: Tensor, y: Tensor, dropout_p: float, training: bool,
                         impl: str) -> Tensor:
    return closed_form.pixel_norm_backward(
        passes_of(impl), grad, x, mask, Moments(mean, rstd, live, None), or_none(y),
        _pixel(dropout_p, training))


@_pixel_norm_backward.register_fake
def _(grad, x, *_):
    return torch.empty_like(x)


def _save_pixel_norm(ctx, inputs, output):
    x, mask, *ctx.options, _, relu, ctx.impl = inputs
    y, *moments = output
    ctx.mark_non_differentiable(*moments)
    ctx.set_materialize_grads(False)
    ctx.channels_last = is_channels_last(x)
    ctx.save_for_backward(x, mask, *moments, y if relu else x.new_empty(0))


def _pixel_norm_grads(ctx, grad, *_):
    dx = None
    if grad is not None:
        x, *kept = ctx.saved_tensors
        x = dense(x, ctx.channels_last)  # as in operators.py
        with without_autocast(x):
            dx = _pixel_norm_backward(grad, x, *kept, *ctx.options, ctx.impl)
    return grads_for(pixel_norm_op, x=dx)


pixel_norm_op.register_autograd(_pixel_norm_grads, setup_context=_save_pixel_norm)
