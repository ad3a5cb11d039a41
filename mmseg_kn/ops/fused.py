"""The passes (:mod:`.passes`) in torch operations, for any device that knows float64.

On the CPU they walk through a tensor in the chunks of :mod:`.cpu_chunks`.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_chunks import by_chunk, is_eager_on_cpu, scratch_like
from .geometry import Geometry
from .memory_format import is_channels_last
from .passes import Kept, MomentGrads, Moments, ScaledGrad, Shift
from .precision import LIVE_ROUNDINGS, ORIGIN_CHANNELS, SMALL_DROPOUT, accumulate_dtype

_WIDE = 2**16  # elements of a sample that are worth a call of their own


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


def draw_mask(x: Tensor, dropout_p: float) -> Tensor:
    """Positions of the elements that dropout takes out of the statistics, ascending.

    Each element is dropped with probability p = ``dropout_p``, by torch's generator of
    ``x.device``. At small p a list is 20 times shorter than a mask, and the gaps between dropped
    elements, floor(log(u) / log(1 - p)) + 1 with u uniform, need as many fewer random numbers.
    The list's length is fixed (8 sigma more than expected), so that it can be traced; entries
    that are too many are ``x.numel()``. Positions count through the chunks of
    :mod:`.cpu_chunks` in order.
    """
    numel = x.numel()
    count = int(numel * dropout_p + 8 * math.sqrt(numel * dropout_p)) + 32
    small = dropout_p < SMALL_DROPOUT
    u = torch.empty(count, dtype=torch.float64 if small else torch.float32, device=x.device)
    gaps = u.uniform_(2.0**-25, 1).log_().mul_(1 / math.log1p(-dropout_p)).add_(1)
    if small:
        gaps.clamp_(max=numel + 1)
    dtype = torch.int64 if small or numel >= 2**30 else torch.int32
    positions = gaps.to(dtype).cumsum(0, dtype=dtype).sub_(1).clamp_(max=numel)
    return positions.int() if numel < 2**31 else positions


def _channel_sums(x: Tensor, positions: Tensor | None, exact: bool,
                  with_undropped: bool) -> Tensor:
    """Sums over C of the kept elements and of their squares, (2, N, H, W).

    With ``with_undropped`` a third row, (3, N, H, W), sums all elements. ``exact`` guards against
    the cancellation of E2 - mean ** 2 where abs(mean) is much larger than the deviation (bright
    skies, constant borders): float32 sums are those of x minus an origin, the mean of the pixel's
    first channels, and the maps are float64. It is not needed where dropout, or its expectation,
    adds enough noise.
    """
    acc, (n, c, h, w) = accumulate_dtype(x.dtype), x.shape
    eager, is_wide = is_eager_on_cpu(x), n and c * h * w >= _WIDE
    if eager and is_wide and x.dtype == acc and positions is None and not exact and (
            x.is_contiguous()):
        return _channel_sums_by_batch_norm(x)
    shift = exact and positions is None
    origin = None
    if shift:
        first = x[:, :ORIGIN_CHANNELS].to(acc)
        origin = (first / first.size(1)).sum(1, keepdim=True).flatten(2)  # the sum may overflow

    def sums(index, chunk, dropped):
        flat, memory = scratch_like(chunk) if dropped is not None or eager else (None, None)
        if dropped is not None:
            memory.copy_(chunk)
            total = [memory.sum(1)] if with_undropped else []
            flat.index_fill_(0, dropped, 0)
            chunk = memory
        elif shift:
            chunk = torch.sub(chunk, origin[index[0], :, index[1]], out=memory)
            total = []
        else:
            chunk, total = chunk.to(acc), []
        return [chunk.sum(1), torch.mul(chunk, chunk, out=memory).sum(1), *total]

    parts = [(index, sums(index, chunk, dropped))
             for index, chunk, dropped in by_chunk(x, positions)]
    if len(parts) == 1:
        maps = torch.stack(parts[0][1])
    else:
        maps = x.new_empty((3 if with_undropped else 2, n, h * w), dtype=acc)
        for index, values in parts:
            for row, value in zip(maps, values, strict=True):
                row[index] = value
    if exact:
        maps = maps.double()
    if shift:
        origin = origin.squeeze(1).double()
        total = torch.add(maps[0], origin, alpha=c)
        maps = torch.stack([total, maps[1] + origin * (maps[0] + total)])
    return maps.view(len(maps), n, h, w)


def _channel_sums_by_batch_norm(x: Tensor) -> Tensor:
    """Sums over C of x and of its square, (2, N, H, W), for NCHW on the CPU.

    The kernel that gathers BatchNorm's statistics, with the pixels of a sample as its channels:
    twice as fast as what can be said in sums and products, which must write x ** 2 somewhere.
    """
    n, c, h, w = x.shape
    pixels_last = x.view(n, c, h * w, 1).transpose(1, 2)
    mean, var = zip(*(torch.batch_norm_update_stats(sample[None], None, None, 0.0)
                      for sample in pixels_last), strict=True)
    mean, var = torch.stack(mean), torch.stack(var)
    return torch.stack([mean, mean.square() + var]).mul_(c).view(2, n, h, w)


def unit_moments(x: Tensor, geometry: Geometry, mask: Tensor | None, dropout_p: float,
                 factor: float, eps: float, exact: bool,
                 with_undropped_mean: bool) -> Moments:
    """See :meth:`.Passes.unit_moments`."""
    kh, kw = geometry.kernel
    maps = _channel_sums(x, mask, exact, with_undropped_mean and mask is not None)
    moments = box_sum(maps, geometry) / (x.size(1) * kh * kw)
    q = 1.0 if mask is None else 1 / (1 - dropout_p)
    mean, second = moments[0] * q, moments[1] * q**2
    # Squares may overflow. inf - inf is not a number, and stands for a large variance.
    info = torch.finfo(moments.dtype)
    var = (factor * second - mean.square()).nan_to_num(info.max, info.max, info.max)
    live = ~(var <= LIVE_ROUNDINGS * info.eps * second.clamp(max=info.max))
    rstd = (var * live + eps).rsqrt()
    return Moments(mean, rstd, live, moments[2] if len(moments) == 3 else None)


def normalize(z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
              shifts: list[Shift], relu: bool, inplace: bool) -> Tensor:
    """See :meth:`.Passes.normalize`."""
    acc = accumulate_dtype(z.dtype)
    y = z if inplace else torch.empty_like(z)
    scale = scale.to(acc).flatten(1).unsqueeze(1)
    bias = z.new_zeros((), dtype=acc) if bias is None else bias.to(acc).view(1, -1, 1)
    shifts = [(s.to(acc).view(1, -1, 1), u.to(acc).flatten(1).unsqueeze(1) * scale)
              for s, u in shifts]
    out, added = y.flatten(2), residual.flatten(2) if residual is not None else None
    for index, chunk, _ in by_chunk(z, None):
        samples, pixels = index
        target = out[samples, :, pixels]
        memory = None
        if is_eager_on_cpu(z):
            direct = z.dtype == acc and not (inplace and shifts)
            memory = target if direct else scratch_like(chunk)[1]
        offset = bias
        for s, u in shifts:
            offset = torch.addcmul(offset, s, u[samples, :, pixels], value=-1, out=memory)
        value = torch.addcmul(offset, chunk.to(acc), scale[samples, :, pixels], out=memory)
        if added is not None:
            value = torch.add(value, added[samples, :, pixels], out=memory)
        if relu:
            value = value.relu_()
        if memory is None:
            layout = torch.channels_last if is_channels_last(z) else torch.contiguous_format
            return value.to(z.dtype).view(z.shape).contiguous(memory_format=layout)
        if value is not target:
            target.copy_(value)
    return y


def scale_grad(grad: Tensor, kept: Kept, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[Shift], need_x: bool) -> ScaledGrad:
    """See :meth:`.Passes.scale_grad`."""
    has_y = kept.y is not None
    acc = accumulate_dtype(grad.dtype)
    n, o, ho, wo = grad.shape
    mean, rstd = mean.flatten(1), rstd.flatten(1)
    scale, mean = rstd.unsqueeze(1), mean.unsqueeze(2)
    rows = torch.stack([weight_sum.to(acc)] + (
        [bias.to(acc)] if has_y and bias is not None else []))
    h = torch.empty_like(grad)
    to_mean, to_var = grad.new_empty((2, n, ho * wo), dtype=acc)
    of_mean, dbias = grad.new_zeros((o, 1), dtype=acc), grad.new_zeros(o, dtype=acc)
    out, output = h.flatten(2), (kept.y if has_y else kept.z).flatten(2)
    residual = None if kept.residual is None else kept.residual.flatten(2)
    for index, chunk, _ in by_chunk(grad, None):
        samples, pixels = index
        target, output_chunk = out[samples, :, pixels], output[samples, :, pixels]
        hc = target if h.dtype == acc else torch.empty_like(chunk, dtype=acc)
        if kept.relu:  # in the memory of h, where it stays in the cache
            chunk = torch.ops.aten.threshold_backward(chunk.to(acc), output_chunk.to(acc), 0,
                                                      grad_input=hc)
        dbias += chunk.sum((0, 2), dtype=acc)
        torch.mul(chunk, scale[samples, :, pixels], out=hc)
        of_mean += (hc @ mean[samples, pixels]).sum(0)
        if need_x:
            sums = rows @ hc
            to_mean[index] = sums[:, 0]
            memory = scratch_like(chunk)[1]
            if residual is not None:
                output_chunk = torch.sub(output_chunk.to(acc), residual[samples, :, pixels],
                                         out=memory)
            product = torch.mul(hc, output_chunk, out=memory).sum(1)
            if has_y and bias is not None:
                product -= sums[:, 1]
            to_var[index] = product
        if hc is not target:
            target.copy_(hc)
    if not need_x:
        return ScaledGrad(h, None, None, of_mean[:, 0], dbias)
    if not has_y:
        to_var *= rstd
    to_mean, to_var = to_mean.view(n, ho, wo), to_var.view(n, ho, wo)
    for s, u in shifts:
        along = to_mean if s is weight_sum else (s.to(acc) @ h.flatten(2).to(acc)).view(n, ho, wo)
        to_var = to_var - along * u * rstd.view(n, ho, wo)
    return ScaledGrad(h, to_mean, to_var, of_mean[:, 0], dbias)


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, mask: Tensor | None,
                     dropout_p: float, grads: MomentGrads, rectified: bool) -> Tensor:
    """See :meth:`.Passes.add_moment_grads`."""
    acc, (c, h, w) = accumulate_dtype(x.dtype), x.shape[1:]
    kh, kw = geometry.kernel
    maps = torch.stack([m for m in grads if m is not None]) / (c * kh * kw)
    maps = box_sum_transpose(maps, geometry, h, w).to(acc).flatten(2).unsqueeze(2)
    into = dx.flatten(2)
    for index, chunk, dropped in by_chunk(x, mask):
        samples, pixels = index
        constant, slope, *unmasked = maps[:, samples, :, pixels]
        flat, memory = scratch_like(chunk)
        torch.addcmul(constant, chunk.to(acc), slope, out=memory)
        if dropped is not None:
            flat.index_fill_(0, dropped, 0)
        if unmasked:
            memory.add_(unmasked[0])
        target = into[samples, :, pixels]
        if rectified:
            torch.ops.aten.threshold_backward(target.add_(memory), chunk, 0, grad_input=target)
        else:
            target.add_(memory)
    return dx
