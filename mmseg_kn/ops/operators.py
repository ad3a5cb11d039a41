"""The closed form as operators: what torch.compile and exporters see of it.

Forward and backward are custom operators, which a compiler takes as one step each. Without
gradients the fused passes are plain torch operations, open to exporters and FLOP counters. An
operator's outputs must be fresh tensors, never None, and of shapes that are known beforehand: what
a call does not keep is an empty tensor, or one whose values nobody reads.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import closed_form
from .autograd import KNConv2dFunction, PixelNormFunction, UnitMomentsFunction, without_autocast
from .closed_form import Options
from .dispatch import exports, form_of, passes_of
from .geometry import Geometry, pad
from .memory_format import dense, dense_like, is_channels_last
from .passes import Kept, Moments
from .precision import accumulate_dtype


def _options(kernel, stride, padding, dilation, groups, dropout_p, training,
             rectify=False) -> Options:
    h, w = padding
    geometry = Geometry(tuple(kernel), tuple(stride), (w, w, h, h), tuple(dilation))
    return Options(geometry, groups, dropout_p, training, rectify)


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


# Schemas are spelled out, because torch 2.6 infers none from list[int].
@torch.library.custom_op('mmseg_kn::kn_conv2d', mutates_args=(), schema=(
    '(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? mask, SymInt[] stride, '
    'SymInt[] padding, SymInt[] dilation, SymInt groups, float dropout_p, bool training, '
    'bool rectify, float eps, bool relu, bool keep_output, str impl) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'))
def _kn_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
               mask: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
               groups: int, dropout_p: float, training: bool, rectify: bool, eps: float,
               relu: bool, keep_output: bool,
               impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, mean, rstd and live; unless the output is kept, z and the undropped mean."""
    options = _options(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training,
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


@_kn_conv2d.register_fake
def _(x, weight, bias, residual, mask, stride, padding, dilation, groups, dropout_p, training,
      rectify, eps, relu, keep_output, impl):
    options = _options(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training)
    setting, weight = options.setting(x), weight.to(x.dtype)
    if impl == 'triton' and (setting.is_centred or setting.is_half):
        weight = dense_like(weight, x)  # as its prepare_weight lays a copy out
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
    options = _options(weight.shape[2:], stride, padding, dilation, groups, dropout_p, training,
                       rectify)
    moments = Moments(mean, rstd, live, _or_none(undropped_mean))
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


def _grads_for(operator, **grads: Tensor | None) -> tuple:
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
    return _grads_for(_kn_conv2d, x=dx if need_x else None,
                      weight=dweight if need_weight else None, bias=dbias if need_bias else None,
                      residual=grad if need_residual else None)


_kn_conv2d.register_autograd(_kn_conv2d_grads, setup_context=_save_kn_conv2d)


def _window(kernel, stride, dropout_p, training) -> Options:
    """Options of :func:`_unit_moments`, whose input is padded already."""
    return _options(kernel, stride, (0, 0), (1, 1), 1, dropout_p, training)


@torch.library.custom_op('mmseg_kn::unit_moments', mutates_args=(), schema=(
    '(Tensor x, Tensor? mask, SymInt[] kernel, SymInt[] stride, float dropout_p, '
    'bool training, float eps, str impl) -> (Tensor, Tensor, Tensor)'))
def _unit_moments(x: Tensor, mask: Tensor | None, kernel: list[int], stride: list[int],
                  dropout_p: float, training: bool, eps: float,
                  impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """mean, rstd and live of the units of x (N, C, H, W)."""
    options = _window(kernel, stride, dropout_p, training)
    setting = options.setting(x)
    return passes_of(impl).unit_moments(x, options.geometry, mask, dropout_p, setting.factor, eps,
                                        setting.exact, False)[:3]


@_unit_moments.register_fake
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
    x = dense(x, ctx.channels_last)  # as in _kn_conv2d_grads
    dx = _unit_moments_backward(grad_mean, grad_rstd, x, *kept, *ctx.options, ctx.impl)
    return _grads_for(_unit_moments, x=dx)


_unit_moments.register_autograd(_unit_moments_grads, setup_context=_save_unit_moments)


def _way(impl: str, *tensors: Tensor | None) -> str:
    """How to call: by ``'operators'`` under a compiler, by ``'autograd'``, or as ``'plain'``.

    A compiler cannot look into an autograd.Function, nor into the launch of a kernel, nor can fake
    tensors, which have no memory, be passed to one. Where no gradient is wanted the plain
    operations are taken, which exporters and FLOP counters can look into.
    """
    if impl == 'triton' and isinstance(tensors[0], FakeTensor):  # a kernel would read nowhere
        return 'operators'
    differentiates = torch.is_grad_enabled() and not exports() and any(
        t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling() and (differentiates or impl == 'triton'):
        return 'operators'
    return 'autograd' if differentiates else 'plain'


def kn_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
              options: Options, eps: float, relu: bool, keep_output: bool,
              impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmseg_kn.ops.kn_conv2d` in closed form, with mean and rstd (N, Ho, Wo)."""
    x, passes, geometry = dense_like(input, input), passes_of(impl), options.geometry
    way = _way(impl, x, weight, bias, residual)
    is_one_sided = geometry.symmetric_padding is None
    if is_one_sided and way == 'operators':
        x, geometry = pad(x, geometry), geometry._replace(padding=(0, 0, 0, 0))
        options, is_one_sided = options._replace(geometry=geometry), False
    mask = None
    if options.has_dropout:
        # Elements are counted in the padded input; for a draw only its size matters.
        counted = x.new_empty(geometry.padded_shape(x)) if is_one_sided else x
        mask = passes.draw_mask(counted, options.dropout_p)
    # Below float32, z * rstd would lose bits against a residual that is larger.
    keep_output = relu or keep_output and (
        residual is None or accumulate_dtype(x.dtype) == x.dtype)
    if way == 'operators':
        _, groups, *rest = options
        y, mean, rstd, live, *_ = _kn_conv2d(
            x, weight, bias, residual, mask, geometry.stride, geometry.symmetric_padding,
            geometry.dilation, groups, *rest, eps, relu, keep_output, impl)
    elif way == 'autograd':
        y, mean, rstd, live = KNConv2dFunction.apply(x, weight, bias, residual, mask, options,
                                                     eps, relu, keep_output, impl)
    else:
        y, _, (mean, rstd, live, *_), _ = form_of(x, weight, options, impl).forward(
            passes, x, weight, bias, residual, mask, options, eps, relu, keep_z=False)
    return y, mean, rstd if mask is not None else rstd * live


def kernel_norm2d(input: Tensor, geometry: Geometry, dropout_p: float, training: bool,
                  eps: float, relu: bool, impl: str) -> Tensor:
    """:func:`mmseg_kn.ops.kernel_norm2d`; only the output itself has the size of the units."""
    is_pixel = geometry[:3] == ((1, 1), (1, 1), (0, 0, 0, 0))
    input, geometry = pad(input, geometry), geometry._replace(padding=(0, 0, 0, 0))
    x, passes = dense_like(input, input), passes_of(impl)
    options = Options(geometry, 1, dropout_p, training)
    mask = passes.draw_mask(x, dropout_p) if options.has_dropout else None
    way = _way(impl, x)
    if is_pixel and way == 'autograd':
        return PixelNormFunction.apply(x, mask, options, eps, relu, impl)
    if is_pixel and way == 'plain' and impl == 'triton':
        return closed_form.pixel_norm(passes, x, mask, options, eps, relu)[0]
    if way == 'operators':
        mean, rstd, _ = _unit_moments(x, mask, geometry.kernel, geometry.stride, dropout_p,
                                      training, eps, impl)
    elif way == 'autograd':
        mean, rstd, _ = UnitMomentsFunction.apply(x, mask, options, eps, impl)
    else:
        setting = options.setting(x)
        mean, rstd = passes.unit_moments(x, geometry, mask, dropout_p, setting.factor, eps,
                                         setting.exact, False)[:2]
    acc = accumulate_dtype(x.dtype)
    mean, rstd = mean.to(acc).unsqueeze(1), rstd.to(acc).unsqueeze(1)
    (kh, kw), (sh, sw) = geometry.kernel, geometry.stride
    if is_pixel:
        y = ((x - mean) * rstd).to(x.dtype)
        return y.relu() if relu else y
    units = x.unfold(2, kh, sh).unfold(3, kw, sw)
    units = (units - mean[..., None, None]) * rstd[..., None, None]
    units = units.to(x.dtype).transpose(3, 4)
    n, c, ho, _, wo, _ = units.shape
    y = units.reshape(n, c, ho * kh, wo * kw)
    return y.relu() if relu else y
