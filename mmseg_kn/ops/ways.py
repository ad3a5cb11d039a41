"""How a call of the closed form goes: plainly, under autograd, or by operators.

Without gradients the fused passes are plain torch operations, open to exporters and FLOP counters.
"""
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import closed_form
from .autograd import KNConv2dFunction, PixelNormFunction, UnitMomentsFunction
from .closed_form import Options
from .dispatch import exports, form_of, passes_of
from .geometry import Geometry, pad
from .memory_format import dense_like
from .norm_operators import pixel_norm_op, unit_moments_op
from .operators import kn_conv2d_op
from .precision import accumulate_dtype


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
        y, mean, rstd, live, *_ = kn_conv2d_op(
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
    if is_pixel and way == 'operators':
        return pixel_norm_op(x, mask, dropout_p, training, eps, relu, impl)[0]
    if is_pixel and way == 'plain' and impl == 'triton':
        return closed_form.pixel_norm(passes, x, mask, options, eps, relu)[0]
    if way == 'operators':
        mean, rstd, _ = unit_moments_op(x, mask, geometry.kernel, geometry.stride, dropout_p,
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
