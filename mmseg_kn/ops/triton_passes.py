"""The passes (:mod:`.passes`) as launches of Triton kernels."""
import math

import torch
import triton
from torch import Tensor

from . import triton_backward, triton_forward, triton_pixels, triton_weights
from .geometry import Geometry
from .memory_format import dense_like, is_channels_last
from .passes import Kept, MomentGrads, Moments, MomentTerms, ScaledGrad, Shift
from .precision import LIVE_ROUNDINGS, ORIGIN_CHANNELS, accumulate_dtype

CHANNELS = 32  # at most, of one of the four tiles that share a Philox call
TILE = 512  # elements of such a tile: four for each thread
BLOCK = (1024, 64)  # elements of a block of `normalize` and `clear_dead`, and channels at most
# ... of `scale_grad`; half of that where each element has an address of its own, in registers
GRAD_BLOCK = (2048, 64)
WEIGHTS = (4, 512)  # filters of a program, and their elements at once
VECTOR = 8  # elements that a thread loads at once at most: 128 bits of half precision
KERNELS = (triton_forward.channel_sums, triton_forward.moments, triton_forward.normalize,
           triton_backward.scale_grad, triton_backward.add_partials, triton_backward.clear_dead,
           triton_backward.add_moment_grads, triton_pixels.pixel_grad,
           triton_weights.prepare_weight, triton_weights.finish_weight_grad)
TOO_OLD = tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)  # knows no tuples
INTERPRETED = not isinstance(triton_forward.moments, triton.JITFunction)


def _launch(kernel, tensor: Tensor, grid: tuple, *args, **constants) -> None:
    if grid[0] == 0 or grid[-1] == 0:
        return
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):  # triton launches on the current one
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _layout(x: Tensor) -> tuple[int, int, bool, int]:
    """Channels and pixels of a sample of dense (N, C, H, W); whether channels lie side by side.

    That number of the two that lies side by side is divided by the last that is returned, by which
    the kernels multiply it again.
    """
    c, area = x.size(1), x.size(2) * x.size(3)
    last = is_channels_last(x)
    vector = math.gcd(c if last else area, VECTOR)
    return (c // vector, area, last, vector) if last else (c, area // vector, last, vector)


def _quarter(channels: int) -> int:
    return min(CHANNELS, _power_of_2(-(-channels // 4)))


def _is_wide(*pixels: int) -> bool:
    return max(pixels) >= 2**30


def _threshold(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1)


def draw_mask(x: Tensor, dropout_p: float) -> Tensor:
    """The seed of one dropout, (1,) int64, by torch's generator of ``x.device``."""
    return torch.randint(2**63 - 1, (1, ), device=x.device)


def _window(geometry: Geometry) -> tuple[int, ...]:
    left, _, top, _ = geometry.padding
    return *geometry.kernel, *geometry.stride, left, top, *geometry.dilation


def unit_moments(x: Tensor, geometry: Geometry, mask: Tensor | None, dropout_p: float,
                 factor: float, eps: float, exact: bool, with_undropped_mean: bool) -> Moments:
    """See :meth:`.Passes.unit_moments`. It is always exact."""
    n, c, h, w = x.shape
    ho, wo = geometry.output_size(h, w)
    pixels, units = n * h * w, n * ho * wo
    undropped = with_undropped_mean and mask is not None
    maps = x.new_empty((3, n, h, w), dtype=torch.float64)
    channels, area, last, vector = _layout(x)
    quarter = _quarter(c)
    block = TILE // quarter
    _launch(triton_forward.channel_sums, x, (-(-pixels // block), ), x, maps, mask, pixels,
            channels, area, _threshold(dropout_p), 1.0 if mask is None else 1 / (1 - dropout_p),
            mask is not None, last, vector, _is_wide(pixels), block, quarter,
            min(quarter, ORIGIN_CHANNELS))
    mean = x.new_empty((n, ho, wo), dtype=torch.float32)
    rstd, live = torch.empty_like(mean), x.new_empty((n, ho, wo), dtype=torch.bool)
    undropped_mean = torch.empty_like(mean) if undropped else None
    drift = torch.empty_like(mean) if undropped else None
    kh, kw = geometry.kernel
    _launch(triton_forward.moments, x, (-(-units // 128), ), maps, mean, rstd,
            live.view(torch.int8), undropped_mean, drift, pixels, h, w, units, ho, wo,
            *_window(geometry), c * kh * kw, factor - 1, eps, undropped, _is_wide(pixels, units),
            128, LIVE_ROUNDINGS * torch.finfo(torch.float64).eps)
    return Moments(mean, rstd, live, undropped_mean, drift)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _two(shifts: list[Shift]) -> list[Tensor | None]:
    flat = [_dense(t) for pair in shifts for t in pair]
    return flat + [None] * (4 - len(flat))


def normalize(z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
              shifts: list[Shift], relu: bool, inplace: bool) -> Tensor:
    """See :meth:`.Passes.normalize`."""
    n, o, h, w = z.shape
    y = z if inplace else torch.empty_like(z)
    if residual is not None:
        residual = dense_like(residual, z)
    size, most = BLOCK
    block = min(most, _power_of_2(o))
    units, many = n * h * w, size // block
    channels, area, last, vector = _layout(z)
    _launch(triton_forward.normalize, z, (-(-units // many), -(-o // block)), z, y, residual,
            scale, _dense(bias), *_two(shifts), units, channels, area, bias is not None,
            residual is not None, relu, len(shifts) > 0, len(shifts) > 1, last, vector,
            _is_wide(units), many, block)
    return y


def scale_grad(grad: Tensor, kept: Kept, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[Shift], terms: MomentTerms | None) -> ScaledGrad:
    """See :meth:`.Passes.scale_grad`."""
    n, o, h, w = grad.shape
    out = torch.empty_like(grad)
    need_x, has_y = terms is not None, kept.y is not None
    constant = slope = unmasked = live = None
    if need_x:
        constant = torch.empty_like(mean, dtype=torch.float32)
        slope, live = torch.empty_like(constant), terms.live.view(torch.int8)
        unmasked = torch.empty_like(constant) if terms.unmasked else None
    channels, area, last, vector = _layout(grad)
    size, most = GRAD_BLOCK if vector > 1 else (GRAD_BLOCK[0] // 2, GRAD_BLOCK[1])
    block = min(most, _power_of_2(o))
    units, many = n * h * w, size // block
    programs = -(-units // many)
    partial = grad.new_empty((programs, o, 2), dtype=torch.float32)
    residual = None if kept.residual is None else dense_like(kept.residual, grad)
    _launch(triton_backward.scale_grad, grad, (programs, ), grad, kept.y if has_y else kept.z,
            residual, out, mean, rstd, live, weight_sum, _dense(bias), *_two(shifts), constant,
            slope, unmasked, partial, units, channels, area,
            *((-terms.q, terms.of_dvar, True, terms.masked, terms.unmasked) if need_x
              else (0.0, 0.0, False, False, False)), kept.relu, has_y, residual is not None,
            bias is not None, len(shifts) > 0, len(shifts) > 1, last, vector, _is_wide(units),
            many, block)
    of_mean = mean.new_empty(o, dtype=torch.float32)
    dbias = torch.empty_like(of_mean)
    _launch(triton_backward.add_partials, grad, (-(-o // 4), ), partial, of_mean, dbias, programs,
            o, 256, 8)
    return ScaledGrad(out, MomentGrads(constant, slope, unmasked) if need_x else None, of_mean,
                      dbias)


def clear_dead(h: Tensor, live: Tensor) -> None:
    """See :meth:`.Passes.clear_dead`."""
    n, o, height, width = h.shape
    size, most = BLOCK
    block = min(most, _power_of_2(o))
    units, many = n * height * width, size // block
    channels, area, last, vector = _layout(h)
    _launch(triton_backward.clear_dead, h, (-(-units // many), -(-o // block)), h,
            live.view(torch.int8), units, channels, area, last, vector, _is_wide(units), many,
            block)


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, mask: Tensor | None,
                     dropout_p: float, grads: MomentGrads, rectified: bool) -> Tensor:
    """See :meth:`.Passes.add_moment_grads`."""
    n, c, h, w = x.shape
    kh, kw = geometry.kernel
    pixels = n * h * w
    channels, area, last, vector = _layout(x)
    quarter = _quarter(c)
    block = TILE // quarter
    constant, slope, unmasked = (None if m is None else m.float().contiguous() for m in grads)
    _launch(triton_backward.add_moment_grads, x, (-(-pixels // block), ), dx, x, constant, slope,
            unmasked, mask, pixels, h, w, channels, area, *geometry.output_size(h, w),
            *_window(geometry), 1 / (c * kh * kw), _threshold(dropout_p), mask is not None,
            unmasked is not None, rectified, geometry.stride != (1, 1), last, vector,
            _is_wide(pixels, constant.numel()), block, quarter)
    return dx


def normalize_pixels(x: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> Tensor:
    """See :meth:`.Passes.normalize_pixels`."""
    return normalize(x, rstd, None, None, [Shift(None, mean)], relu, False)


def normalize_pixels_backward(grad: Tensor, x: Tensor, mask: Tensor | None, dropout_p: float,
                              mean: Tensor, rstd: Tensor, terms: MomentTerms,
                              y: Tensor | None) -> Tensor:
    """See :meth:`.Passes.normalize_pixels_backward`."""
    n, c, h, w = x.shape
    dx, pixels, quarter = torch.empty_like(x), n * h * w, _quarter(c)
    channels, area, last, vector = _layout(x)
    # At 810 channels, loaded by two, the registers of a whole tile would not fit on sm 90.
    block = (TILE // 2 if vector == 2 else TILE) // quarter
    _launch(triton_pixels.pixel_grad, x, (-(-pixels // block), ), dx, grad, x, mean, rstd,
            terms.live.view(torch.int8), mask, pixels, channels, area, -terms.q / c,
            terms.of_dvar / c, _threshold(dropout_p), mask is not None, y is not None, last,
            vector, _is_wide(pixels), block, quarter)
    return dx


def _swap(source: Tensor, target: Tensor) -> tuple[int, int, int, int, bool, int]:
    """Filters of ``target`` (O, C, kh, kw), their size and its two factors, inner first.

    Last, whether ``source`` has these swapped, and by what the size was divided.
    """
    o, c, kh, kw = target.shape
    last = is_channels_last(target)
    factors = (c, kh * kw) if last else (kh * kw, c)
    swapped = is_channels_last(source) != last
    vector = VECTOR if c * kh * kw % VECTOR == 0 and not swapped else 1
    return o, c * kh * kw // vector, *factors, swapped, vector


def prepare_weight(weight: Tensor, x: Tensor, centred: bool) -> tuple[Tensor, Tensor,
                                                                     Tensor | None]:
    """See :meth:`.Passes.prepare_weight`. A copy has the memory format of ``x``."""
    is_half = accumulate_dtype(x.dtype) != x.dtype
    weight, out = dense_like(weight, weight), None
    if centred or is_half:
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        out = torch.empty_like(weight, dtype=x.dtype, memory_format=layout)
    *sizes, swap, vector = _swap(weight, weight if out is None else out)
    whole = weight.new_empty(sizes[0], dtype=torch.float32)
    rounded = torch.empty_like(whole) if is_half else None
    filters, block = WEIGHTS
    _launch(triton_weights.prepare_weight, x, (-(-sizes[0] // filters), ), weight, out, whole,
            rounded, *sizes, out is not None, centred, is_half, swap, vector, filters,
            block)
    return weight if out is None else out, whole, rounded


def finish_weight_grad(grad: Tensor, of_mean: Tensor, weight: Tensor) -> Tensor:
    """See :meth:`.Passes.finish_weight_grad`."""
    grad, out = dense_like(grad, grad), torch.empty_like(dense_like(weight, weight))
    *sizes, swap, vector = _swap(grad, out)
    filters, block = WEIGHTS
    blocks = -(-sizes[0] // filters), -(-sizes[1] * vector // block)
    _launch(triton_weights.finish_weight_grad, grad, blocks, grad, of_mean, out, *sizes, swap,
            vector, filters, block)
    return out
