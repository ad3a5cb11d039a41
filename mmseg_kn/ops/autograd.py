"""The closed form under torch's eager autograd.

An ``autograd.Function`` costs the host a third of what a custom operator does. Compilers, which
cannot look into it, take those of :mod:`.operators` and :mod:`.norm_operators`.
"""
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import closed_form
from .closed_form import Options
from .dispatch import form_of, passes_of
from .memory_format import dense, is_channels_last
from .passes import Kept, Moments
from .precision import accumulate_dtype


def without_autocast(x: Tensor):
    """A context in which nothing is cast, as backward() may be called under autocast."""
    device = x.device.type  # entering torch.autocast costs the host as much as a kernel
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocasts else nullcontext()


class KNConv2dFunction(torch.autograd.Function):
    """y, mean and rstd of :func:`mmseg_kn.ops.kn_conv2d`; the moments have no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                mask: Tensor | None, options: Options, eps: float, relu: bool, keep_output: bool,
                impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.form = form_of(x, weight, options, impl)
        y, z, moments, weight_sum = ctx.form.forward(
            passes_of(impl), x, weight, bias, residual, mask, options, eps, relu,
            keep_z=not keep_output)
        acc = accumulate_dtype(x.dtype)
        mean, rstd, live = moments.mean.to(acc), moments.rstd.to(acc), moments.live
        undropped_mean, kept = None, (None, None, None)
        if keep_output:
            if relu or ctx.needs_input_grad[0]:
                kept = (None, y, None if relu else residual)
        elif ctx.needs_input_grad[0]:
            kept, undropped_mean = (z, None, None), moments.undropped_mean
        ctx.mark_non_differentiable(mean, rstd, live)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.relu, ctx.impl = options, relu, impl
        ctx.channels_last = is_channels_last(x)
        ctx.save_for_backward(x, weight, bias, mask, mean, rstd, live, undropped_mean, *kept,
                              weight_sum)
        return y, mean, rstd, live

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, *_):
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        dx = dweight = dbias = None
        if grad is not None and (need_x or need_weight or need_bias):
            (x, weight, bias, mask, mean, rstd, live, undropped_mean, z, y, residual,
             weight_sum) = ctx.saved_tensors
            # Saved-tensor hooks may return another memory format, and the mask counts in this one.
            x = dense(x, ctx.channels_last)
            with without_autocast(x):
                dx, dweight, dbias = ctx.form.backward(
                    passes_of(ctx.impl), grad, x, weight, bias, mask,
                    Moments(mean, rstd, live, undropped_mean),
                    Kept(z, y, residual, ctx.relu, weight_sum), ctx.options, need_x, need_weight)
            dbias = dbias.to(bias.dtype) if need_bias else None
        return dx, dweight, dbias, grad if need_residual else None, *[None] * 6


class UnitMomentsFunction(torch.autograd.Function):
    """mean and rstd of the units of x (N, C, H, W), (N, Ho, Wo) each, and which are live."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None, options: Options, eps: float,
                impl: str) -> tuple[Tensor, Tensor, Tensor]:
        setting = options.setting(x)
        mean, rstd, live = passes_of(impl).unit_moments(
            x, options.geometry, mask, options.dropout_p, setting.factor, eps, setting.exact,
            False)[:3]
        ctx.mark_non_differentiable(live)
        ctx.options, ctx.impl, ctx.channels_last = options, impl, is_channels_last(x)
        ctx.save_for_backward(x, mask, mean, rstd, live)
        return mean, rstd, live

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_rstd: Tensor, _):
        x, mask, mean, rstd, live = ctx.saved_tensors
        x = dense(x, ctx.channels_last)  # as above
        dx = closed_form.moments_backward(passes_of(ctx.impl), grad_mean, grad_rstd, x, mask,
                                          Moments(mean, rstd, live, None), ctx.options)
        return dx, *[None] * 4


class PixelNormFunction(torch.autograd.Function):
    """:func:`mmseg_kn.ops.kernel_norm2d` with kernel 1, and its relu: every pixel is a unit."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None, options: Options, eps: float, relu: bool,
                impl: str) -> Tensor:
        y, moments = closed_form.pixel_norm(passes_of(impl), x, mask, options, eps, relu)
        ctx.options, ctx.impl, ctx.channels_last = options, impl, is_channels_last(x)
        ctx.save_for_backward(x, mask, *moments[:3], y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, mask, mean, rstd, live, y = ctx.saved_tensors
        x = dense(x, ctx.channels_last)  # as above
        dx = closed_form.pixel_norm_backward(passes_of(ctx.impl), grad, x, mask,
                                             Moments(mean, rstd, live, None), y, ctx.options)
        return dx, *[None] * 5
