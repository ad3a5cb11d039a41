"""The passes of kernel normalization in torch ops, for any device that knows float64.

On the CPU they walk through the tensor in chunks that stay in the cache, because there a
full-size temporary costs ten times what is computed on it (its pages must first be mapped).
"""
import math
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry

_CHUNK = 2**20  # elements
_WIDE = 2**16  # elements of a sample that are worth a call of their own
_FIRST = 16  # channels whose mean sums are taken around


class Moments(NamedTuple):
    """Statistics of the units, each (N, Ho, Wo)."""

    mean: Tensor  # of the dropped input
    rstd: Tensor  # (var + eps) ** -0.5
    live: Tensor  # bool: the variance is above 0 and above its own rounding
    plain: Tensor | None  # mean of the input itself, where dropout is on and it was asked for


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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


def draw(x: Tensor, p: float) -> Tensor:
    """Positions of the elements that dropout takes out of the statistics, ascending.

    Each element is dropped with probability ``p``, from torch's generator of ``x.device``. At
    small p a list is 20 times shorter than a mask, and the gaps between dropped elements,
    floor(log(u) / log(1 - p)) + 1 with u uniform, need as many fewer random numbers. The
    length is fixed (8 sigma more than expected), so that it can be traced; entries that do not
    fit are ``x.numel()``. Positions count through the chunks of :func:`_chunks` in order.
    """
    numel = x.numel()
    count = int(numel * p + 8 * math.sqrt(numel * p)) + 32
    # float32 knows u to 2 ** -24, which must be small beside p.
    small = p < 1e-2
    u = torch.empty(count, dtype=torch.float64 if small else torch.float32, device=x.device)
    gaps = u.uniform_(2.0**-25, 1).log_().mul_(1 / math.log1p(-p)).add_(1)
    if small:
        gaps.clamp_(max=numel + 1)
    dtype = torch.int64 if small or numel >= 2**30 else torch.int32
    positions = gaps.to(dtype).cumsum(0, dtype=dtype).sub_(1).clamp_(max=numel)
    return positions.int() if numel < 2**31 else positions


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _eager(x: Tensor) -> bool:
    """On the CPU and neither traced nor faked: only then chunks and kept memory are for it."""
    return (x.device.type == 'cpu' and type(x) in (Tensor, torch.nn.Parameter)
            and not torch.jit.is_tracing() and not torch.compiler.is_compiling())


def _chunks(x: Tensor) -> list[tuple[slice, slice]]:
    """Samples and pixels (of H * W) of each chunk of (N, C, H, W)."""
    n, c, h, w = x.shape
    if not _eager(x) or x.numel() <= _CHUNK:
        return [(slice(None), slice(None))]
    if c * h * w <= _CHUNK:
        step = _CHUNK // (c * h * w)
        return [(slice(i, i + step), slice(None)) for i in range(0, n, step)]
    parts = round(c * h * w / _CHUNK)
    step = -(-h * w // (16 * parts)) * 16  # equal parts of whole cache lines
    return [(slice(i, i + 1), slice(p, p + step)) for i in range(n) for p in range(0, h * w, step)]


class _Scratch(threading.local):
    """One chunk of memory for each thread, kept: mapping its pages costs more than using them."""

    def __init__(self) -> None:
        self.stores = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        if dtype not in self.stores or self.stores[dtype].numel() < count:
            with torch.inference_mode(False):  # whose tensors later calls could not write to
                self.stores[dtype] = torch.empty(max(count, _CHUNK + 1), dtype=dtype,
                                                 device='cpu')  # whatever the default is
        return self.stores[dtype][:count]


_scratch = _Scratch()


def _dense_like(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the (n, C, P) ``chunk`` in its order: flat with one element to spare, and as it.

    Valid until the next call. Position ``chunk.numel()``, the spare one, may be written to.
    """
    dtype, (n, c, p) = accumulate_dtype(chunk.dtype), chunk.shape
    if _eager(chunk):
        flat = _scratch.take(chunk.numel() + 1, dtype)
    else:
        flat = chunk.new_empty(chunk.numel() + 1, dtype=dtype)
    if chunk.stride(1) == 1 and c > 1:
        return flat, flat[:-1].view(n, p, c).transpose(1, 2)
    return flat, flat[:-1].view(n, c, p)


def _by_chunk(x: Tensor, positions: Tensor | None):
    """Yields the index of each chunk, the (n, C, P) chunk and the dropped positions in it."""
    chunks, flat = _chunks(x), x.flatten(2)
    views = [flat[samples, :, pixels] for samples, pixels in chunks]
    if positions is None or len(chunks) == 1:
        dropped = [None if positions is None else positions.long()] * len(chunks)
    else:
        ends = torch.tensor([v.numel() for v in views], device='cpu').cumsum(0)
        bounds = [0, *torch.searchsorted(positions.long(), ends).tolist()]
        starts = [0, *ends.tolist()]
        dropped = [positions[a:b].long() - start
                   for a, b, start in zip(bounds, bounds[1:], starts, strict=False)]
    yield from zip(chunks, views, dropped, strict=True)


def _channel_sums(x: Tensor, positions: Tensor | None, exact: bool, plain: bool) -> Tensor:
    """Sums over C of the kept elements, of their squares, and (``plain``) of all, (.., N, H, W).

    ``exact`` guards against the cancellation of E2 - mean ** 2 where |mean| >> std (bright
    skies, constant borders): float32 sums are those of x minus the mean of the pixel's first
    channels, several of them lest one be an outlier, and the maps are float64. It is not needed
    where dropout, or its expectation, adds enough noise.
    """
    acc, (n, c, h, w) = accumulate_dtype(x.dtype), x.shape
    if _eager(x) and x.dtype == acc and positions is None and not exact and x.is_contiguous() and (
            n and c * h * w >= _WIDE):
        return _channel_sums_by_batch_norm(x)
    shift = exact and positions is None
    origin = None
    if shift:
        first = x[:, :_FIRST].to(acc)
        origin = (first / first.size(1)).sum(1, keepdim=True).flatten(2)  # the sum may overflow

    def sums(index, chunk, dropped):
        flat, memory = _dense_like(chunk) if dropped is not None or _eager(x) else (None, None)
        if dropped is not None:
            memory.copy_(chunk)
            total = [memory.sum(1)] if plain else []
            flat.index_fill_(0, dropped, 0)
            chunk = memory
        elif shift:
            chunk = torch.sub(chunk, origin[index[0], :, index[1]], out=memory)
            total = []
        else:
            chunk, total = chunk.to(acc), []
        return [chunk.sum(1), torch.mul(chunk, chunk, out=memory).sum(1), *total]

    parts = [(index, sums(index, chunk, dropped))
             for index, chunk, dropped in _by_chunk(x, positions)]
    if len(parts) == 1:
        maps = torch.stack(parts[0][1])
    else:
        maps = x.new_empty((3 if plain else 2, n, h * w), dtype=acc)
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


def unit_moments(x: Tensor, geometry: Geometry, positions: Tensor | None, dropout_p: float,
                 factor: float, eps: float, exact: bool, plain: bool) -> Moments:
    """Moments of every unit; var = max(``factor`` * E2 - mean ** 2, 0)."""
    kh, kw = geometry.kernel
    moments = box_sum(_channel_sums(x, positions, exact, plain and positions is not None),
                      geometry) / (x.size(1) * kh * kw)
    q = 1.0 if positions is None else 1 / (1 - dropout_p)
    mean, second = moments[0] * q, moments[1] * q**2
    # Squares may overflow; inf - inf is no number, and means a large variance.
    info = torch.finfo(moments.dtype)
    var = (factor * second - mean.square()).nan_to_num(info.max, info.max, info.max)
    live = ~(var <= 64 * info.eps * second.clamp(max=info.max))
    rstd = (var * live + eps).rsqrt()
    return Moments(mean, rstd, live, moments[2] if len(moments) == 3 else None)


def normalize(z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
              shifts: list[tuple[Tensor, Tensor]], relu: bool, inplace: bool) -> Tensor:
    """(z - sum of s * u over ``shifts``) * scale + bias, plus ``residual`` or through ``relu``.

    Args:
        z: (N, O, Ho, Wo), the convolution's.
        scale: (N, Ho, Wo).
        shifts: Pairs of s (O,) and u (N, Ho, Wo).
        inplace: z may be overwritten.
    """
    acc = accumulate_dtype(z.dtype)
    y = z if inplace else torch.empty_like(z)
    scale = scale.to(acc).flatten(1).unsqueeze(1)
    bias = z.new_zeros((), dtype=acc) if bias is None else bias.to(acc).view(1, -1, 1)
    shifts = [(s.to(acc).view(1, -1, 1), u.to(acc).flatten(1).unsqueeze(1) * scale)
              for s, u in shifts]
    out, added = y.flatten(2), residual.flatten(2) if residual is not None else None
    for index, chunk, _ in _by_chunk(z, None):
        samples, pixels = index
        target = out[samples, :, pixels]
        memory = None
        if _eager(z):
            direct = z.dtype == acc and not (inplace and shifts)
            memory = target if direct else _dense_like(chunk)[1]
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


class MomentGrads(NamedTuple):
    """What the units' moments send back to each x of theirs, summed by box^T and over K.

    dx += plain + m * (constant + slope * x), with m the dropout mask; (N, Ho, Wo) each.
    """

    constant: Tensor
    slope: Tensor
    plain: Tensor | None


def scale_grad(grad: Tensor, saved: Tensor, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[tuple[Tensor, Tensor]], relu: bool,
               need_x: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """h = grad * rstd and its reductions.

    Args:
        grad: (N, O, Ho, Wo), dL/dy.
        saved: z, or y where ``relu``: elsewhere than at y = 0, where the gradient is 0 too,
            z * rstd = y - b.
        shifts: As in :func:`normalize`.
        need_x: Whether the second and third result are wanted, which only dx needs; else None.

    Returns:
        h (as ``grad``); sum_o h * sum(W)_o, sum_o h * z * rstd, both (N, Ho, Wo);
        sum_{n, p} h * mean, sum_{n, p} grad, both (O,).
    """
    acc = accumulate_dtype(grad.dtype)
    n, o, ho, wo = grad.shape
    mean, rstd = mean.flatten(1), rstd.flatten(1)
    scale, mean = rstd.unsqueeze(1), mean.unsqueeze(2)
    rows = torch.stack([weight_sum.to(acc)] + (
        [bias.to(acc)] if relu and bias is not None else []))
    h = torch.empty_like(grad)
    to_mean, hz = grad.new_empty((2, n, ho * wo), dtype=acc)
    of_mean, dbias = grad.new_zeros((o, 1), dtype=acc), grad.new_zeros(o, dtype=acc)
    out, saved = h.flatten(2), saved.flatten(2)
    for index, chunk, _ in _by_chunk(grad, None):
        samples, pixels = index
        target, z = out[samples, :, pixels], saved[samples, :, pixels]
        hc = target if h.dtype == acc else torch.empty_like(chunk, dtype=acc)
        if relu:  # in the memory of h, where it stays in the cache
            chunk = torch.ops.aten.threshold_backward(chunk.to(acc), z.to(acc), 0, grad_input=hc)
        dbias += chunk.sum((0, 2), dtype=acc)
        torch.mul(chunk, scale[samples, :, pixels], out=hc)
        of_mean += (hc @ mean[samples, pixels]).sum(0)
        if need_x:
            sums = rows @ hc
            to_mean[index] = sums[:, 0]
            product = torch.mul(hc, z, out=_dense_like(chunk)[1]).sum(1)
            if relu and bias is not None:
                product -= sums[:, 1]
            hz[index] = product
        if hc is not target:
            target.copy_(hc)
    if not need_x:
        return h, None, None, of_mean[:, 0], dbias
    if not relu:
        hz *= rstd
    to_mean, hz = to_mean.view(n, ho, wo), hz.view(n, ho, wo)
    for s, u in shifts:
        along = to_mean if s is weight_sum else (s.to(acc) @ h.flatten(2).to(acc)).view(n, ho, wo)
        hz = hz - along * u * rstd.view(n, ho, wo)
    return h, to_mean, hz, of_mean[:, 0], dbias


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, positions: Tensor | None,
                     dropout_p: float, grads: MomentGrads) -> Tensor:
    """Adds to ``dx``, in place, what reaches x through the moments of its units."""
    acc, (c, h, w) = accumulate_dtype(x.dtype), x.shape[1:]
    kh, kw = geometry.kernel
    maps = torch.stack([m for m in grads if m is not None]) / (c * kh * kw)
    maps = box_sum_transpose(maps, geometry, h, w).to(acc).flatten(2).unsqueeze(2)
    into = dx.flatten(2)
    for index, chunk, dropped in _by_chunk(x, positions):
        samples, pixels = index
        constant, slope, *plain = maps[:, samples, :, pixels]
        flat, memory = _dense_like(chunk)
        torch.addcmul(constant, chunk.to(acc), slope, out=memory)
        if dropped is not None:
            flat.index_fill_(0, dropped, 0)
        if plain:
            memory.add_(plain[0])
        into[samples, :, pixels].add_(memory)
    return dx
