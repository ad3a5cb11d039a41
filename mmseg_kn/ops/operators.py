"""The closed form of KNConv as operators: what torch.compile sees of it.

Forward and backward are custom operators, which a compiler takes as one step each. An operator's
outputs must be fresh tensors, never None, and of shapes and memory formats that are known
beforehand: what a call does not keep is an empty tensor, or one whose values nobody reads.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import without_autocast
from .closed_form import Options
from .dispatch import form_of, passes_of
from .geometry import Geometry
from .memory_format import dense, is_channels_last
from .passes import Kept, Moments
from .precision import accumulate_dtype


def options_of(kernel, stride, padding, dilation, groups, dropout_p, training,
               rectify=False) -> Options:
    """From an operator's arguments, which may be lists and numbers alone."""
    h, w = padding
    geometry = Geometry(tuple(kernel), tuple(stride), (w, w, h, h), tuple(dilation))
    return Options(geometry, groups, dropout_p, training, rectify)


def or_none(tensor: Tensor) -> Tensor | None:
    """None where a call kept nothing."""
    return tensor if tensor.numel() else None


# Schemas are spelled out, because torch 2.6 infers none from list[int].
@torch.library.custom_op('mmseg_kn::kn_conv2d', mutates_args=(), schema=(
    '(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? mask, SymInt[] stride, '
    'SymInt[] padding, SymInt[] dilation, SymInt groups, float dropout_p, bool training, '
    'bool rectify, float eps, bool relu, bool keep_output, str impl) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'))
def kn_conv2d_op(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                 mask: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
                 groups: int, dropout_p: float, training: bool, rectify: bool, eps: float,
                 relu: bool, keep_output: bool,
                 impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, mean, rstd and live; unless the output is kept, z and the undropped mean."""
    options = options_of(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training,
                         rectify)
    y, z, moments, _ = form_of(x, weight, options, impl).forward(
        passes_of(impl), x, weight, bias, residual, mask, options, eps, relu,
        keep_z=not keep_output)
    acc = accumulate_dtype(x.dtype)
    mean, rstd, undropped_mean = (None if m is None else m.to(acc) for m in (
        moments.mean, moments.rstd, moments.undropped_mean))
    z, undropped_mean = (torch.empty_like(like) if kept is None else kept
                         for kept, like in ((z, y), (undropped_mean, mean)))
    if keep_output or not options.setting(x).needs_undropped_mean:
        undropped_mean = x.new_empty(0)
    return (y, mean, rstd, moments.live, x.new_empty(0) if keep_output else z,
            undropped_mean.clone())  # it may be a view


@kn_conv2d_op.register_fake
def _(x, weight, bias, residual, mask, stride, padding, dilation, groups, dropout_p, training,
      rectify, eps, relu, keep_output, impl):
    options = options_of(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training)
    setting, weight = options.setting(x), weight.to(x.dtype)
    if impl == 'triton' and (setting.is_centred or setting.is_half):
        weight = torch.empty_like(weight, memory_format=(  # as its prepare_weight lays a copy out
            torch.channels_last if is_channels_last(x) else torch.contiguous_format))
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    acc, units = accumulate_dtype(x.dtype), (z.size(0), *z.shape[2:])
    has_undropped_mean = setting.needs_undropped_mean and not keep_output
    return (torch.empty_like(z), x.new_empty(units, dtype=acc), x.new_empty(units, dtype=acc),
            x.new_empty(units, dtype=torch.bool), x.new_empty(0) if keep_output else z,
            x.new_empty(units, dtype=acc) if has_undropped_mean else x.new_empty(0))


@torch.library.custom_op('mmseg_kn::kn_conv2d_backward', mutates_args=(), schema=(
    '(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor mean, '
    'Tensor rstd, Tensor live, Tensor undropped_mean, Tensor? z, Tensor? y, Tensor? residual, '
    'SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, float dropout_p, '
    'bool training, bool rectify, bool relu, bool need_x, bool need_weight, str impl) '
    '-> (Tensor, Tensor, Tensor)'))
def _kn_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                        mask: Tensor | None, mean: Tensor, rstd: Tensor, live: Tensor,
                        undropped_mean: Tensor, z: Tensor | None, y: Tensor | None,
                        residual: Tensor | None, stride: list[int], padding: list[int],
                        dilation: list[int], groups: int, dropout_p: float, training: bool,
                        rectify: bool, relu: bool, need_x: bool, need_weight: bool,
                        impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW and db."""
    options = options_of(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training,
                         rectify)
    moments = Moments(mean, rstd, live, or_none(undropped_mean))
    dx, dweight, dbias = form_of(x, weight, options, impl).backward(
        passes_of(impl), grad, x, weight, bias, mask, moments, Kept(z, y, residual, relu),
        options, need_x, need_weight)
    return (x.new_empty(0) if dx is None else dx,
            x.new_empty(0) if dweight is None else dweight,
            dbias if bias is None else dbias.to(bias.dtype))


@_kn_conv2d_backward.register_fake
def _(grad, x, weight, bias, mask, mean, rstd, live, undropped_mean, z, y, residual, stride,
      padding, dilation, groups, dropout_p, training, rectify, relu, need_x, need_weight, impl):
    dbias = mean.new_empty(weight.size(0)) if bias is None else torch.empty_like(bias)
    return (torch.empty_like(x) if need_x else x.new_empty(0),
            torch.empty_like(weight) if need_weight else x.new_empty(0), dbias)


def grads_for(operator, **grads: Tensor | None) -> tuple:
    """One gradient for each argument of an operator: those given by name, None for the others."""
    arguments = [argument.name for argument in operator._opoverload._schema.arguments]
    return tuple(grads.get(name) for name in arguments)


def _save_kn_conv2d(ctx, inputs, output):
    x, weight, bias, residual, mask, *ctx.options, _, relu, keep_output, ctx.impl = inputs
    y, mean, rstd, live, z, undropped_mean = output
    ctx.mark_non_differentiable(mean, rstd, live, z, undropped_mean)
    ctx.set_materialize_grads(False)
    ctx.channels_last = is_channels_last(x)
    ctx.relu = relu
    kept = (None, y, None if relu else residual) if keep_output else (z, None, None)
    ctx.save_for_backward(x, weight, bias, mask, mean, rstd, live, undropped_mean, *kept)


def _kn_conv2d_grads(ctx, grad, *_):
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    dx = dweight = dbias = None
    if grad is not None and (need_x or need_weight or need_bias):
        x, weight, bias, *kept = ctx.saved_tensors
        # Saved-tensor hooks may return another memory format, and the mask counts in this one.
        x = dense(x, ctx.channels_last)
        with without_autocast(x):
            dx, dweight, dbias = _kn_conv2d_backward(grad, x, weight, bias, *kept, *ctx.options,
                                                     ctx.relu, need_x, need_weight, ctx.impl)
    return grads_for(kn_conv2d_op, x=dx if need_x else None,
                     weight=dweight if need_weight else None, bias=dbias if need_bias else None,
                     residual=grad if need_residual else None)


kn_conv2d_op.register_autograd(_kn_conv2d_grads, setup_context=_save_kn_conv2d)
