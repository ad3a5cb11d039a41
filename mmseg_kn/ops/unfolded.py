"""The closed form's two functions for tiny inputs: every unit is built, as in the definition.

There the calls of torch take longer than what they compute, and this needs fewer of them.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .closed_form import Grads, Options, Output, prepared, unpadded
from .cpu_chunks import is_eager_on_cpu
from .geometry import Geometry
from .memory_format import dense_like
from .passes import Kept, Moments, Passes
from .precision import LIVE_ROUNDINGS, Setting, accumulate_dtype

# Elements of all units, and of one weight for each sample, above which the closed form is faster.
LARGEST = 2**15


def serves(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Whether x (N, C, H, W) is tiny, lies on the CPU and is neither traced nor of few bits."""
    if not is_eager_on_cpu(x) or x.dtype != accumulate_dtype(x.dtype):
        return False
    (kh, kw), (ho, wo) = options.geometry.kernel, options.geometry.output_size(*x.shape[2:])
    units = x.size(0) * x.size(1) * kh * kw * ho * wo
    return 0 < units <= LARGEST and x.size(0) * weight.numel() <= LARGEST


def _units(x: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, H, W) to (N, K, L): K = C * kh * kw elements in each of L = Ho * Wo units."""
    return F.unfold(x, geometry.kernel, geometry.dilation, geometry.symmetric_padding,
                    geometry.stride)


def _dropped(values: Tensor, x: Tensor, mask: Tensor, q: float) -> Tensor:
    """q * values, 0 where dropped. The mask counts through x in memory, to one beyond its end."""
    flat = x.new_empty(x.numel() + 1)
    copy = flat.as_strided(x.shape, x.stride())
    torch.mul(values, q, out=copy)
    flat.index_fill_(0, mask.long(), 0)
    return copy


def _normalized(units: Tensor, moments: Moments, setting: Setting) -> Tensor:
    mean, rstd, live = (m.view(len(m), 1, -1).to(units.dtype) for m in moments[:3])
    dead = setting.exact and not setting.has_dropout  # as in the closed form
    return torch.sub(units, mean).mul_(rstd * live if dead else rstd)


def forward(passes: Passes, x: Tensor, weight: Tensor, bias: Tensor | None,
            residual: Tensor | None, mask: Tensor | None, options: Options, eps: float,
            relu: bool, keep_z: bool) -> Output:
    """See :func:`.closed_form.forward`; backward needs no z."""
    setting, groups, n = options.setting(x), options.groups, len(x)
    size = options.geometry.output_size(*x.shape[2:])
    x, geometry = prepared(x, options)
    units = counted = _units(x, geometry)
    if mask is not None:
        counted = _units(_dropped(x, x, mask, options.q), geometry)
    counted = counted.double() if setting.exact else counted
    mean = counted.mean(1)
    var = torch.sub(counted, mean.unsqueeze(1)).square_().mean(1)  # var_mean takes three times it
    second = torch.addcmul(var, mean, mean)
    if setting.factor != 1:  # factor * second - mean ** 2 would cancel
        var = var.add_(second, alpha=setting.factor - 1)
    info = torch.finfo(var.dtype)
    live = ~(var <= second.clamp(max=info.max).mul_(LIVE_ROUNDINGS * info.eps))
    rstd = (var * live).add_(eps).rsqrt_()
    moments = Moments(*(m.view(n, *size) for m in (mean, rstd, live)), None)
    columns = _normalized(units, moments, setting).view(n, groups, -1, var.size(1))
    y = x.new_empty(n, len(weight), *size)  # no view, which nothing could overwrite in place
    filters = weight.reshape(groups, len(weight) // groups, -1)
    torch.matmul(filters, columns, out=y.view(n, groups, -1, var.size(1)))
    for added in (None if bias is None else bias.view(-1, 1, 1), residual):
        y = y if added is None else y.add_(added)
    return Output(dense_like(y.relu_() if relu else y, x), None, moments)


def backward(passes: Passes, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
             mask: Tensor | None, moments: Moments, kept: Kept, options: Options, need_x: bool,
             need_weight: bool) -> Grads:
    """See :func:`.closed_form.backward`."""
    setting, size = options.setting(x), x.shape[2:]
    x, geometry = prepared(x, options)
    units = _units(x, geometry)
    n, k, count = units.shape
    if kept.relu:
        grad = torch.ops.aten.threshold_backward(grad, kept.y, 0)
    grad = grad.reshape(n, options.groups, -1, count)
    columns = _normalized(units, moments, setting)
    dx = dweight = None
    if need_weight:
        grouped = columns.view(n, options.groups, -1, count)
        dweight = (grad @ grouped.transpose(2, 3)).sum(0).view(weight.shape)
        dweight = dense_like(dweight, weight)
    if need_x:
        rows = weight.reshape(1, *grad.shape[1:3], -1).transpose(2, 3)
        dcolumns = (rows @ grad).view(n, k, count)
        mean, rstd, live = (m.view(n, 1, count) for m in moments[:3])
        dvar = (dcolumns * columns).sum(1, keepdim=True).mul_(rstd * rstd * live).mul_(-0.5 / k)
        dunits = dcolumns.mul_(rstd)
        dmean = dunits.sum(1, keepdim=True).div_(-k).sub_(2 * mean * dvar)
        dvar *= 2 * setting.factor
        if mask is None:
            dunits += dmean.addcmul(units, dvar)
        else:
            counted = _units(_dropped(x, x, mask, options.q), geometry)
            of_counted = _fold(dmean.addcmul(counted, dvar), x, geometry)
        dx = _fold(dunits, x, geometry)
        if mask is not None:
            dx = _dropped(of_counted, x, mask, options.q).add_(dx)
        if options.rectify:
            dx = torch.ops.aten.threshold_backward(dx, x, 0)
        dx = unpadded(dense_like(dx, x), options, size)
    return Grads(dx, dweight, grad.view(n, -1, count).sum((0, 2)))


def _fold(units: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Adjoint of :func:`_units`."""
    return F.fold(units, x.shape[2:], geometry.kernel, geometry.dilation,
                  geometry.symmetric_padding, geometry.stride)
