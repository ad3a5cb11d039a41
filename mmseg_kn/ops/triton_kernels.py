"""The passes of :mod:`.fused` as Triton kernels: each reads or writes a full-size tensor once.

A program owns a block of pixels and walks through all channels, so every reduction over
channels stays in its registers and nothing is atomic: results do not depend on scheduling.
Sums are float32; what combines the sums of a whole unit is float64, on one-channel maps.

Dropout keeps no mask. Its random bits are Philox4x32 of (seed, element), drawn again wherever
the mask is needed, so that they are the same for every layout, dtype and block size.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import MomentGrads, Moments, is_channels_last
from .geometry import Geometry

PIXELS = 16  # a program's
CHANNELS = 32  # at most, of one of the four tiles that share a Philox call
ORIGIN = tl.constexpr(16)  # channels whose mean sums are taken around; 8 and 32 spill registers
OUTPUTS = 64  # channels of the output at once, at most; twice as many spill registers


@triton.jit
def _pixel_offsets(pixel, area, stride_n, stride_p):
    """Offset of (n, 0, p) for pixel = n * area + p, in int64: tensors may pass 2 ** 31."""
    sample = pixel // area
    return sample * stride_n + (pixel - sample * area) * stride_p


@triton.jit
def _random4(seed, pixel, first, C, C4: tl.constexpr):
    """Four tiles (pixels, C4) of uniform uint32, for channels first + C4 * (0, 1, 2, 3) + lane.

    ``first`` is a multiple of 4 * C4; the counter is the element's place among all quadruples.
    """
    per_pixel = tl.cdiv(C, 4 * C4) * C4
    counter = pixel[:, None] * per_pixel + (first // 4 + tl.arange(0, C4))[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def _kept(bits, threshold):
    """1.0 where an element stays: its uniform number is at least p * 2 ** 32."""
    return (bits.to(tl.int64) >= threshold).to(tl.float32)


@triton.jit
def _channel_sums(x_ptr, maps_ptr, seed_ptr, pixels, area, C, stride_n, stride_c, stride_p,
                  threshold, q, DROPOUT: tl.constexpr, P: tl.constexpr, C4: tl.constexpr):
    """maps (3, pixels), float64: sums of the dropped x and of its square, sum of x.

    Sums are of x - origin, the mean of the pixel's first channels, of which one may be an outlier:
    where |mean| >> std, E2 - mean ** 2 would cancel.
    """
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = pixel < pixels
    offset = _pixel_offsets(pixel, area, stride_n, stride_p)
    F: tl.constexpr = min(C4, ORIGIN)  # at most C
    first = tl.load(x_ptr + offset[:, None] + tl.arange(0, F).to(tl.int64)[None, :] * stride_c,
                    inside[:, None], other=0.0).to(tl.float32)
    origin = tl.sum(first * (1 / F), 1)
    total = tl.zeros([P], tl.float32)
    count = tl.zeros([P], tl.float32)
    kept_sum = tl.zeros([P], tl.float32)
    kept_square = tl.zeros([P], tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(0, C, 4 * C4):
        if DROPOUT:
            bits = _random4(seed, pixel, start, C, C4)
        for j in tl.static_range(4):
            channel = start + j * C4 + tl.arange(0, C4)
            mask = inside[:, None] & (channel < C)[None, :]
            where = offset[:, None] + channel.to(tl.int64)[None, :] * stride_c
            value = tl.load(x_ptr + where, mask, other=0.0).to(tl.float32)
            value = tl.where(mask, value - origin[:, None], 0.0)
            if DROPOUT:
                kept = tl.where(mask, _kept(bits[j], threshold), 0.0)
                total += tl.sum(value, 1)
                count += tl.sum(kept, 1)
                value *= kept
            kept_sum += tl.sum(value, 1)
            kept_square += tl.sum(value * value, 1)
    origin = origin.to(tl.float64)
    s1 = kept_sum.to(tl.float64)
    s2 = kept_square.to(tl.float64)
    if DROPOUT:
        n = count.to(tl.float64)
        tl.store(maps_ptr + pixel + pixels + pixels, total.to(tl.float64) + C * origin, inside)
    else:
        n = C + tl.zeros([P], tl.float64)
    tl.store(maps_ptr + pixel, (s1 + n * origin) * q, inside)
    tl.store(maps_ptr + pixel + pixels, (s2 + origin * (2 * s1 + n * origin)) * q * q, inside)


@triton.jit
def _moments(maps_ptr, mean_ptr, rstd_ptr, live_ptr, plain_ptr, pixels, H, W, units, Ho, Wo, kh,
             kw, sh, sw, left, top, dh, dw, K, excess, eps, PLAIN: tl.constexpr,
             P: tl.constexpr):
    """Box sums of ``maps`` and from them the moments of each unit.

    ``excess`` is factor - 1: floats arrive as float32, which knows 1 + p to 6e-8 only.
    """
    unit = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = unit < units
    line = unit // Wo  # no products of sizes: they are int32
    sample = line // Ho
    row = line % Ho * sh - top
    column = unit % Wo * sw - left
    s1 = tl.zeros([P], tl.float64)
    s2 = tl.zeros([P], tl.float64)
    s3 = tl.zeros([P], tl.float64)
    for i in range(kh):
        y = row + i * dh
        for j in range(kw):
            x = column + j * dw
            mask = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = maps_ptr + sample * H * W + y * W + x
            s1 += tl.load(at, mask, other=0.0)
            s2 += tl.load(at + pixels, mask, other=0.0)
            if PLAIN:
                s3 += tl.load(at + pixels + pixels, mask, other=0.0)
    mean = s1 / K  # a float32 1 / K would bring back the cancellation
    second = s2 / K
    var = second - mean * mean + second * excess
    # squares may overflow; inf - inf is a large variance
    var = tl.where((var - var) == 0, var, 1e300)
    live = var > 1.4e-14 * tl.minimum(second, 1e300)
    var = tl.where(live, var, 0.0)
    tl.store(mean_ptr + unit, mean.to(tl.float32), inside)
    tl.store(rstd_ptr + unit, (1 / tl.sqrt(var + eps)).to(tl.float32), inside)
    tl.store(live_ptr + unit, live.to(tl.int8), inside)
    if PLAIN:
        tl.store(plain_ptr + unit, (s3 / K).to(tl.float32), inside)


@triton.jit
def _shifted(z, s_ptr, t_ptr, channel, mask, u, v, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """z - s * u - t * v, each where it is given."""
    if FIRST:
        z -= tl.load(s_ptr + channel, mask, other=0.0)[None, :] * u[:, None]
    if SECOND:
        z -= tl.load(t_ptr + channel, mask, other=0.0)[None, :] * v[:, None]
    return z


@triton.jit
def _normalize(z_ptr, y_ptr, residual_ptr, scale_ptr, bias_ptr, s_ptr, u_ptr, t_ptr, v_ptr, units,
               area, CO, stride_n, stride_c, stride_p, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
               RELU: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, P: tl.constexpr,
               B: tl.constexpr):
    """y = (z - s * u - t * v) * scale + bias, plus the residual or through relu."""
    unit = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = unit < units
    offset = _pixel_offsets(unit, area, stride_n, stride_p)
    channel = tl.program_id(1) * B + tl.arange(0, B)
    exists = channel < CO
    mask = inside[:, None] & exists[None, :]
    where = offset[:, None] + channel.to(tl.int64)[None, :] * stride_c
    z = tl.load(z_ptr + where, mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + unit, inside, other=0.0)
    u = tl.zeros([P], tl.float32)
    v = tl.zeros([P], tl.float32)
    if FIRST:
        u = tl.load(u_ptr + unit, inside, other=0.0)
    if SECOND:
        v = tl.load(v_ptr + unit, inside, other=0.0)
    y = _shifted(z, s_ptr, t_ptr, channel, exists, u, v, FIRST, SECOND) * scale[:, None]
    if BIAS:
        y += tl.load(bias_ptr + channel, exists, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + where, mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y > 0, y, tl.where(y != y, y, 0.0))
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _scale_grad(grad_ptr, saved_ptr, h_ptr, mean_ptr, rstd_ptr, weight_sum_ptr, bias_ptr, s_ptr,
                u_ptr, t_ptr, v_ptr, to_mean_ptr, hz_ptr, partial_ptr, units, area, CO, stride_n,
                stride_c, stride_p, RELU: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr,
                SECOND: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """h = grad * rstd with its sums over channels, and over this program's pixels.

    partial (programs, 2, CO): sum h * mean, sum grad.
    """
    program = tl.program_id(0).to(tl.int64)
    unit = program * P + tl.arange(0, P)
    inside = unit < units
    offset = _pixel_offsets(unit, area, stride_n, stride_p)
    mean = tl.load(mean_ptr + unit, inside, other=0.0)
    rstd = tl.load(rstd_ptr + unit, inside, other=1.0)
    u = tl.zeros([P], tl.float32)
    v = tl.zeros([P], tl.float32)
    if FIRST:
        u = tl.load(u_ptr + unit, inside, other=0.0)
    if SECOND:
        v = tl.load(v_ptr + unit, inside, other=0.0)
    to_mean = tl.zeros([P], tl.float32)
    hz = tl.zeros([P], tl.float32)
    for start in range(0, CO, B):
        channel = start + tl.arange(0, B)
        exists = channel < CO
        mask = inside[:, None] & exists[None, :]
        where = offset[:, None] + channel.to(tl.int64)[None, :] * stride_c
        grad = tl.load(grad_ptr + where, mask, other=0.0).to(tl.float32)
        z = tl.load(saved_ptr + where, mask, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(z > 0, grad, 0.0)
            if BIAS:
                z -= tl.load(bias_ptr + channel, exists, other=0.0).to(tl.float32)[None, :]
        else:
            z = _shifted(z, s_ptr, t_ptr, channel, exists, u, v, FIRST, SECOND)
        h = grad * rstd[:, None]
        tl.store(h_ptr + where, h.to(h_ptr.dtype.element_ty), mask)
        to_mean += tl.sum(h * tl.load(weight_sum_ptr + channel, exists, other=0.0)[None, :], 1)
        hz += tl.sum(h * z, 1)
        partial = partial_ptr + program * 2 * CO + channel
        tl.store(partial, tl.sum(h * mean[:, None], 0), exists)
        tl.store(partial + CO, tl.sum(grad, 0), exists)
    if not RELU:
        hz *= rstd
    tl.store(to_mean_ptr + unit, to_mean, inside)
    tl.store(hz_ptr + unit, hz, inside)


@triton.jit
def _add_moment_grads(dx_ptr, x_ptr, maps_ptr, seed_ptr, pixels, H, W, C, stride_n, stride_c,
                      stride_p, units, Ho, Wo, kh, kw, sh, sw, left, top, dh, dw, inv_k,
                      threshold, DROPOUT: tl.constexpr, PLAIN: tl.constexpr, P: tl.constexpr,
                      C4: tl.constexpr):
    """dx += box^T(plain) + m * (box^T(constant) + box^T(slope) * x), m the mask."""
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = pixel < pixels
    line = pixel // W
    sample = line // H
    row = line % H + top
    column = pixel % W + left
    constant = tl.zeros([P], tl.float32)
    slope = tl.zeros([P], tl.float32)
    plain = tl.zeros([P], tl.float32)
    for i in range(kh):
        y = row - i * dh
        for j in range(kw):
            x = column - j * dw
            mask = (inside & (y >= 0) & (y % sh == 0) & (y // sh < Ho)
                    & (x >= 0) & (x % sw == 0) & (x // sw < Wo))
            at = maps_ptr + sample * Ho * Wo + y // sh * Wo + x // sw
            constant += tl.load(at, mask, other=0.0)
            slope += tl.load(at + units, mask, other=0.0)
            if PLAIN:
                plain += tl.load(at + units + units, mask, other=0.0)
    constant *= inv_k
    slope *= inv_k
    plain *= inv_k
    offset = sample * stride_n + (pixel - sample * H * W) * stride_p
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(0, C, 4 * C4):
        if DROPOUT:
            bits = _random4(seed, pixel, start, C, C4)
        for j in tl.static_range(4):
            channel = start + j * C4 + tl.arange(0, C4)
            mask = inside[:, None] & (channel < C)[None, :]
            where = offset[:, None] + channel.to(tl.int64)[None, :] * stride_c
            value = tl.load(x_ptr + where, mask, other=0.0).to(tl.float32)
            value = constant[:, None] + slope[:, None] * value
            if DROPOUT:
                value *= _kept(bits[j], threshold)
            dx = tl.load(dx_ptr + where, mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + where, (dx + value + plain[:, None]).to(dx_ptr.dtype.element_ty),
                     mask)


TOO_OLD = tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)  # knows no tuples
INTERPRETED = not isinstance(_moments, triton.JITFunction)


def _launch(kernel, tensor: Tensor, grid: tuple, *args, **constants) -> None:
    if grid[0] == 0 or grid[-1] == 0:
        return
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):  # triton launches on the current one
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of dense (N, C, H, W) along samples, channels and pixels."""
    n, c, h, w = x.shape
    return (c * h * w, 1, c) if is_channels_last(x) else (c * h * w, h * w, 1)


def _quarter(channels: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(triton.cdiv(channels, 4)))


def _threshold(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1)


def draw(x: Tensor, p: float) -> Tensor:
    """The seed of one dropout, (1,) int64, from torch's generator of ``x.device``."""
    return torch.randint(2**63 - 1, (1, ), device=x.device)


def unit_moments(x: Tensor, geometry: Geometry, seed: Tensor | None, dropout_p: float,
                 factor: float, eps: float, exact: bool, plain: bool) -> Moments:
    """As :func:`.fused.unit_moments`; it is always exact."""
    n, c, h, w = x.shape
    ho, wo = geometry.output_size(h, w)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    left, _, top, _ = geometry.padding
    pixels, units = n * h * w, n * ho * wo
    plain = plain and seed is not None
    maps = x.new_empty((3, n, h, w), dtype=torch.float64)
    _launch(_channel_sums, x, (triton.cdiv(pixels, PIXELS), ), x, maps, seed, pixels, h * w, c,
            *_strides(x), _threshold(dropout_p), 1.0 if seed is None else 1 / (1 - dropout_p),
            DROPOUT=seed is not None, P=PIXELS, C4=_quarter(c))
    mean = x.new_empty((n, ho, wo), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    live = x.new_empty((n, ho, wo), dtype=torch.bool)
    plain_mean = torch.empty_like(mean) if plain else None
    _launch(_moments, x, (triton.cdiv(units, 128), ), maps, mean, rstd, live.view(torch.int8),
            plain_mean, pixels, h, w, units, ho, wo, kh, kw, sh, sw, left, top, dh, dw,
            c * kh * kw, factor - 1, eps, PLAIN=plain, P=128)
    return Moments(mean, rstd, live, plain_mean)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _two(shifts: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor | None], dict]:
    flat = [t.contiguous() for pair in shifts for t in pair]
    return flat + [None] * (4 - len(flat)), dict(FIRST=len(shifts) > 0, SECOND=len(shifts) > 1)


def normalize(z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
              shifts: list[tuple[Tensor, Tensor]], relu: bool, inplace: bool) -> Tensor:
    """As :func:`.fused.normalize`."""
    n, o, h, w = z.shape
    y = z if inplace else torch.empty_like(z)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if is_channels_last(z)
                                       else torch.contiguous_format)
    shift_args, flags = _two(shifts)
    block = min(OUTPUTS, triton.next_power_of_2(o))
    _launch(_normalize, z, (triton.cdiv(n * h * w, PIXELS), triton.cdiv(o, block)), z, y,
            residual, scale, _dense(bias), *shift_args, n * h * w, h * w, o, *_strides(z),
            BIAS=bias is not None, RESIDUAL=residual is not None, RELU=relu, P=PIXELS, B=block,
            **flags)
    return y


def scale_grad(grad: Tensor, saved: Tensor, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[tuple[Tensor, Tensor]], relu: bool,
               need_x: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.fused.scale_grad`; nothing is gained by leaving ``need_x`` out."""
    n, o, h, w = grad.shape
    out = torch.empty_like(grad)
    to_mean, hz = grad.new_empty((2, n, h, w), dtype=torch.float32)
    programs = triton.cdiv(n * h * w, PIXELS)
    partial = grad.new_empty((programs, 2, o), dtype=torch.float32)
    shift_args, flags = _two(shifts)
    _launch(_scale_grad, grad, (programs, ), grad, saved, out, mean, rstd, weight_sum,
            _dense(bias), *shift_args, to_mean, hz, partial, n * h * w, h * w, o,
            *_strides(grad), RELU=relu, BIAS=bias is not None, P=PIXELS,
            B=min(OUTPUTS, triton.next_power_of_2(o)), **flags)
    of_mean, dbias = partial.sum(0)
    return out, to_mean, hz, of_mean, dbias.clone()  # an operator's outputs are no views


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, seed: Tensor | None,
                     dropout_p: float, grads: MomentGrads) -> Tensor:
    """As :func:`.fused.add_moment_grads`."""
    n, c, h, w = x.shape
    ho, wo = geometry.output_size(h, w)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    left, _, top, _ = geometry.padding
    maps = torch.stack([m for m in grads if m is not None]).float()
    _launch(_add_moment_grads, x, (triton.cdiv(n * h * w, PIXELS), ), dx, x, maps, seed,
            n * h * w, h, w, c, *_strides(x), n * ho * wo, ho, wo, kh, kw, sh, sw, left, top, dh,
            dw, 1 / (c * kh * kw), _threshold(dropout_p), DROPOUT=seed is not None,
            PLAIN=grads.plain is not None, P=PIXELS, C4=_quarter(c))
    return dx
