"""The passes (:mod:`.passes`) in torch operations, for any device that knows float64.

On the CPU they walk through a tensor in the chunks of :mod:`.cpu_chunks`.
"""
import math
from functools import reduce
from operator import add

import torch
from torch import Tensor

from .box_means import box_mean, box_mean_transpose
from .cpu_chunks import by_chunk, is_eager_on_cpu, scratch_like
from .geometry import Geometry, make_geometry
from .memory_format import dense_like, is_channels_last
from .passes import Kept, MomentGrads, Moments, MomentTerms, ScaledGrad, Shift
from .precision import LIVE_ROUNDINGS, ORIGIN_CHANNELS, SMALL_DROPOUT, accumulate_dtype

_WIDE = 2**16  # elements of a sample that are worth a call of their own


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

    def sums(part, chunk, dropped):
        flat, memory = scratch_like(chunk) if dropped is not None or eager else (None, None)
        if dropped is not None:
            memory.copy_(chunk)
            total = [memory.sum(1)] if with_undropped else []
            flat.index_fill_(0, dropped, 0)
            chunk = memory
        elif shift:
            chunk = torch.sub(chunk, part.of(origin), out=memory)
            total = []
        else:
            chunk, total = chunk.to(acc), []
        return [chunk.sum(1), torch.mul(chunk, chunk, out=memory).sum(1), *total]

    parts = [(part, sums(part, chunk, dropped))
             for part, chunk, dropped in by_chunk(x, positions)]
    if len(parts) == 1:
        maps = torch.stack(parts[0][1])
    else:
        maps = x.new_empty((3 if with_undropped else 2, n, h * w), dtype=acc)
        for part, values in parts:
            for row, value in zip(maps, values, strict=True):
                part.of(row).copy_(value)
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
    maps = _channel_sums(x, mask, exact, with_undropped_mean and mask is not None)
    mean, second, *undropped_mean = (box_mean(maps, geometry) / x.size(1)).unbind()
    if mask is not None:
        q = 1 / (1 - dropout_p)
        mean, second = mean * q, second * q**2
    # Squares may overflow. inf - inf is not a number, and stands for a large variance.
    info = torch.finfo(mean.dtype)
    var = torch.addcmul(second if factor == 1 else factor * second, mean, mean, value=-1)
    var = var.nan_to_num_(info.max, info.max, info.max)
    # Not var > ...: what is no number counts as live.
    live = ~(var <= second.clamp(max=info.max).mul_(LIVE_ROUNDINGS * info.eps))
    rstd = (var * live).add_(eps).rsqrt_()
    return Moments(mean, rstd, live, undropped_mean[0] if undropped_mean else None)


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
    for part, chunk, _ in by_chunk(z, None):
        target = part.of(out)
        memory = None
        if is_eager_on_cpu(z):
            memory = target if z.dtype == acc else scratch_like(chunk)[1]
        value = torch.addcmul(bias, chunk.to(acc), part.of(scale), out=memory)
        for s, u in shifts:
            value = torch.addcmul(value, s, part.of(u), value=-1, out=memory)
        if added is not None:
            value = torch.add(value, part.of(added), out=memory)
        if relu:
            value = value.relu_()
        if memory is None:
            layout = torch.channels_last if is_channels_last(z) else torch.contiguous_format
            return value.to(z.dtype).view(z.shape).contiguous(memory_format=layout)
        if value is not target:
            target.copy_(value)
    return y


def scale_grad(grad: Tensor, kept: Kept, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[Shift], terms: MomentTerms | None) -> ScaledGrad:
    """See :meth:`.Passes.scale_grad`."""
    has_y = kept.y is not None
    acc = accumulate_dtype(grad.dtype)
    n, _, ho, wo = grad.shape
    mean, rstd = mean.flatten(1), rstd.flatten(1)
    scale = rstd.unsqueeze(1)
    rows = torch.stack([weight_sum.to(acc)] + (
        [bias.to(acc)] if has_y and bias is not None else []))
    h = torch.empty_like(grad)
    to_mean, to_var = grad.new_empty((2, n, ho * wo), dtype=acc)
    of_means, biases = [], []
    out, output = h.flatten(2), kept.y if has_y else kept.z
    output = None if output is None else output.flatten(2)
    residual = None if kept.residual is None else kept.residual.flatten(2)
    for part, chunk, _ in by_chunk(grad, None):
        target, output_chunk = part.of(out), None if output is None else part.of(output)
        hc = target if h.dtype == acc else torch.empty_like(chunk, dtype=acc)
        if kept.relu:  # in the memory of h, where it stays in the cache
            chunk = torch.ops.aten.threshold_backward(chunk.to(acc), output_chunk.to(acc), 0,
                                                      grad_input=hc)
        biases.append(chunk.sum((0, 2), dtype=acc))
        torch.mul(chunk, part.of(scale), out=hc)
        # A row times a matrix: torch takes ten times as long for the matrix times a column.
        of_means.append((part.of(mean).unsqueeze(1) @ hc.transpose(1, 2)).sum((0, 1)))
        if terms is not None:
            sums = rows @ hc
            part.of(to_mean).copy_(sums[:, 0])
            memory = scratch_like(chunk)[1]
            if residual is not None:
                output_chunk = torch.sub(output_chunk.to(acc), part.of(residual),
                                         out=memory)
            product = torch.mul(hc, output_chunk, out=memory).sum(1)
            if has_y and bias is not None:
                product -= sums[:, 1]
            part.of(to_var).copy_(product)
        if hc is not target:
            target.copy_(hc)
    of_mean, dbias = reduce(add, of_means), reduce(add, biases)
    if terms is None:
        return ScaledGrad(h, None, of_mean, dbias)
    if not has_y:
        to_var *= rstd
    to_mean, to_var = to_mean.view(n, ho, wo), to_var.view(n, ho, wo)
    for s, u in shifts:
        along = to_mean if s is weight_sum else (s.to(acc) @ h.flatten(2).to(acc)).view(n, ho, wo)
        to_var = to_var - along * u * rstd.view(n, ho, wo)
    mean, rstd = mean.view(n, ho, wo), rstd.view(n, ho, wo)
    return ScaledGrad(h, terms.grads(to_mean, to_var, mean, rstd), of_mean, dbias)


def clear_dead(h: Tensor, live: Tensor) -> None:
    """See :meth:`.Passes.clear_dead`."""
    h.mul_(live.unsqueeze(1))


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, mask: Tensor | None,
                     dropout_p: float, grads: MomentGrads, rectified: bool) -> Tensor:
    """See :meth:`.Passes.add_moment_grads`."""
    acc, (c, h, w) = accumulate_dtype(x.dtype), x.shape[1:]
    maps = torch.stack([m for m in grads if m is not None]).div_(c)
    maps = box_mean_transpose(maps, geometry, h, w).to(acc).flatten(2).unsqueeze(2).unbind()
    into = dx.flatten(2)
    for part, chunk, dropped in by_chunk(x, mask):
        constant, slope, *unmasked = (part.of(m) for m in maps)
        flat, memory = scratch_like(chunk)
        torch.addcmul(constant, chunk.to(acc), slope, out=memory)
        if dropped is not None:
            flat.index_fill_(0, dropped, 0)
        if unmasked:
            memory.add_(unmasked[0])
        target = part.of(into)
        if rectified:
            torch.ops.aten.threshold_backward(target.add_(memory), chunk, 0, grad_input=target)
        else:
            target.add_(memory)
    return dx


def normalize_pixels(x: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
    """See :meth:`.Passes.normalize_pixels`."""
    y = torch.sub(x, mean.unsqueeze(1)).mul_(rstd.unsqueeze(1))
    y = y.relu_() if relu else y
    return y.to(x.dtype)


def normalize_pixels_backward(grad: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float,
                              mean: Tensor, rstd: Tensor, terms: MomentTerms,
                              y: Tensor | None) -> Tensor:
    """See :meth:`.Passes.normalize_pixels_backward`."""
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    z = torch.sub(x, mean.unsqueeze(1))
    scaled = scale_grad(grad, Kept(z=z), mean, rstd, mean.new_ones(x.size(1)), None, [], terms)
    return add_moment_grads(scaled.h, x, make_geometry(1), mask, dropout_p, scaled.to_moments,
                            False)


def _sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.sum((1, 2, 3), dtype=accumulate_dtype(dtype))


def prepare_weight(weight: Tensor, x: Tensor, centred: bool) -> tuple[Tensor, Tensor,
                                                                     Tensor | None]:
    """See :meth:`.Passes.prepare_weight`."""
    weight_sum = _sum(weight, x.dtype)
    if centred:
        weight = weight - (weight_sum / weight[0].numel()).view(-1, 1, 1, 1)
    weight = weight.to(x.dtype)
    is_half = accumulate_dtype(x.dtype) != x.dtype
    return weight, weight_sum, _sum(weight, x.dtype) if is_half else None


def finish_weight_grad(grad: Tensor, of_mean: Tensor, weight: Tensor) -> Tensor:
    """See :meth:`.Passes.finish_weight_grad`."""
    grad = grad.to(of_mean.dtype).sub_(of_mean.view(-1, 1, 1, 1))
    return dense_like(grad.to(weight.dtype), weight)
