"""Triton kernels: each reads or writes a full-size tensor once; :mod:`.triton_passes` calls them.

A program owns a block of pixels and walks through all channels, so every reduction over
channels stays in its registers and nothing is atomic: results do not depend on scheduling.
Sums are float32; what combines the sums of a whole unit is float64, on one-channel maps.

Dropout keeps no mask. Its random bits are Philox4x32 of (seed, element), drawn again wherever
the mask is needed, so that they are the same for every layout, dtype and block size.
"""
import sys

import triton
import triton.language as tl

from .precision import LIVE_ROUNDINGS, ORIGIN_CHANNELS

ORIGIN = tl.constexpr(ORIGIN_CHANNELS)  # 8 and 32 spill registers
LIVE = tl.constexpr(LIVE_ROUNDINGS * sys.float_info.epsilon)
HUGE = tl.constexpr(1e300)  # stands for a variance that has overflowed


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
def channel_sums(x_ptr, maps_ptr, seed_ptr, pixels, area, C, stride_n, stride_c, stride_p,
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
def moments(maps_ptr, mean_ptr, rstd_ptr, live_ptr, undropped_ptr, pixels, H, W, units, Ho, Wo,
            kh, kw, sh, sw, left, top, dh, dw, K, excess, eps, UNDROPPED: tl.constexpr,
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
            if UNDROPPED:
                s3 += tl.load(at + pixels + pixels, mask, other=0.0)
    mean = s1 / K  # a float32 1 / K would bring back the cancellation
    second = s2 / K
    var = second - mean * mean + second * excess
    # squares may overflow; inf - inf is a large variance
    var = tl.where((var - var) == 0, var, HUGE)
    live = var > LIVE * tl.minimum(second, HUGE)
    var = tl.where(live, var, 0.0)
    tl.store(mean_ptr + unit, mean.to(tl.float32), inside)
    tl.store(rstd_ptr + unit, (1 / tl.sqrt(var + eps)).to(tl.float32), inside)
    tl.store(live_ptr + unit, live.to(tl.int8), inside)
    if UNDROPPED:
        tl.store(undropped_ptr + unit, (s3 / K).to(tl.float32), inside)


@triton.jit
def _shifted(z, s_ptr, t_ptr, channel, mask, u, v, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """z - s * u - t * v, each where it is given."""
    if FIRST:
        z -= tl.load(s_ptr + channel, mask, other=0.0)[None, :] * u[:, None]
    if SECOND:
        z -= tl.load(t_ptr + channel, mask, other=0.0)[None, :] * v[:, None]
    return z


@triton.jit
def normalize(z_ptr, y_ptr, residual_ptr, scale_ptr, bias_ptr, s_ptr, u_ptr, t_ptr, v_ptr, units,
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
def scale_grad(grad_ptr, kept_ptr, residual_ptr, h_ptr, mean_ptr, rstd_ptr, weight_sum_ptr,
               bias_ptr, s_ptr, u_ptr, t_ptr, v_ptr, to_mean_ptr, to_var_ptr, partial_ptr, units,
               area, CO, stride_n, stride_c, stride_p, RELU: tl.constexpr, HAS_Y: tl.constexpr,
               RESIDUAL: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr,
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
    to_var = tl.zeros([P], tl.float32)
    for start in range(0, CO, B):
        channel = start + tl.arange(0, B)
        exists = channel < CO
        mask = inside[:, None] & exists[None, :]
        where = offset[:, None] + channel.to(tl.int64)[None, :] * stride_c
        grad = tl.load(grad_ptr + where, mask, other=0.0).to(tl.float32)
        z = tl.load(kept_ptr + where, mask, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(z > 0, grad, 0.0)
        if HAS_Y:  # what was loaded is y, and becomes z * rstd
            if RESIDUAL:
                z -= tl.load(residual_ptr + where, mask, other=0.0).to(tl.float32)
            if BIAS:
                z -= tl.load(bias_ptr + channel, exists, other=0.0).to(tl.float32)[None, :]
        else:
            z = _shifted(z, s_ptr, t_ptr, channel, exists, u, v, FIRST, SECOND)
        h = grad * rstd[:, None]
        tl.store(h_ptr + where, h.to(h_ptr.dtype.element_ty), mask)
        to_mean += tl.sum(h * tl.load(weight_sum_ptr + channel, exists, other=0.0)[None, :], 1)
        to_var += tl.sum(h * z, 1)
        partial = partial_ptr + program * 2 * CO + channel
        tl.store(partial, tl.sum(h * mean[:, None], 0), exists)
        tl.store(partial + CO, tl.sum(grad, 0), exists)
    if not HAS_Y:
        to_var *= rstd
    tl.store(to_mean_ptr + unit, to_mean, inside)
    tl.store(to_var_ptr + unit, to_var, inside)


@triton.jit
def add_moment_grads(dx_ptr, x_ptr, maps_ptr, seed_ptr, pixels, H, W, C, stride_n, stride_c,
                     stride_p, units, Ho, Wo, kh, kw, sh, sw, left, top, dh, dw, inv_k,
                     threshold, DROPOUT: tl.constexpr, UNMASKED: tl.constexpr,
                     RECTIFIED: tl.constexpr, P: tl.constexpr, C4: tl.constexpr):
    """dx += box^T(unmasked) + m * (box^T(constant) + box^T(slope) * x), m the mask.

    Where x is a relu's output (``RECTIFIED``), dx becomes 0 where x is 0.
    """
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = pixel < pixels
    line = pixel // W
    sample = line // H
    row = line % H + top
    column = pixel % W + left
    constant = tl.zeros([P], tl.float32)
    slope = tl.zeros([P], tl.float32)
    unmasked = tl.zeros([P], tl.float32)
    for i in range(kh):
        y = row - i * dh
        for j in range(kw):
            x = column - j * dw
            mask = (inside & (y >= 0) & (y % sh == 0) & (y // sh < Ho)
                    & (x >= 0) & (x % sw == 0) & (x // sw < Wo))
            at = maps_ptr + sample * Ho * Wo + y // sh * Wo + x // sw
            constant += tl.load(at, mask, other=0.0)
            slope += tl.load(at + units, mask, other=0.0)
            if UNMASKED:
                unmasked += tl.load(at + units + units, mask, other=0.0)
    constant *= inv_k
    slope *= inv_k
    unmasked *= inv_k
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
            # dx first: in the other order registers spill on sm 90.
            dx = tl.load(dx_ptr + where, mask, other=0.0).to(tl.float32) + unmasked[:, None]
            element = tl.load(x_ptr + where, mask, other=0.0)
            value = constant[:, None] + slope[:, None] * element.to(tl.float32)
            if DROPOUT:
                value *= _kept(bits[j], threshold)
            dx += value
            if RECTIFIED:
                dx = tl.where(element > 0, dx, 0.0)
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask)
