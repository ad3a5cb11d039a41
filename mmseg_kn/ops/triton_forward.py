"""Triton kernels of the forward pass; :mod:`.triton_passes` calls them.

Each reads or writes a full-size tensor once. Sums are float32; what combines the sums of a whole
unit is float64, on one-channel maps. Sizes are not specialised: images of other sizes compile
nothing new.
"""
import triton
import triton.language as tl

from .triton_blocks import element, full_sizes, own_block, pixel_start, random4, stays


@triton.jit(do_not_specialize=['pixels', 'c', 'area', 'threshold'])
def channel_sums(x_ptr, maps_ptr, seed_ptr, pixels, c, area, threshold, q, DROPOUT: tl.constexpr,
                 LAST: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
                 C4: tl.constexpr, F: tl.constexpr):
    """maps (3, pixels), float64: sums of the dropped x and of its square, sum of x.

    Sums are of x - origin, the mean of the pixel's first F channels; one may be an outlier:
    where |mean| >> std, E2 - mean ** 2 would cancel.
    """
    C, area = full_sizes(c, area, LAST, V)
    pixel = own_block(P, WIDE)
    inside = pixel < pixels
    start = pixel_start(pixel, C, area, LAST)
    lane = tl.arange(0, C4)
    first = tl.load(x_ptr + element(start, lane, area, LAST),
                    inside[:, None] & (lane < F)[None, :], other=0.0)
    origin = tl.sum(first.to(tl.float32) * (1 / F), 1)
    total = tl.zeros([P, C4], tl.float32)
    count = tl.zeros([P, C4], tl.float32)
    kept_sum = tl.zeros([P, C4], tl.float32)
    square = tl.zeros([P, C4], tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for block in range(0, C, 4 * C4):
        if DROPOUT:
            bits = random4(seed, pixel, block, C, first, C4)
        for j in tl.static_range(4):
            channel = block + j * C4 + lane
            exists = (channel < C)[None, :]
            value = tl.load(x_ptr + element(start, channel, area, LAST), inside[:, None] & exists,
                            other=0.0).to(tl.float32)
            value = tl.where(exists, value - origin[:, None], 0.0)
            if DROPOUT:
                kept = stays(bits[j], threshold) & exists
                total += value
                count += tl.where(kept, 1.0, 0.0)
                value = tl.where(kept, value, 0.0)
            kept_sum += value
            square += value * value
    origin = origin.to(tl.float64)
    s1 = tl.sum(kept_sum, 1).to(tl.float64)
    s2 = tl.sum(square, 1).to(tl.float64)
    if DROPOUT:
        n = tl.sum(count, 1).to(tl.float64)
        tl.store(maps_ptr + pixel.to(tl.int64) + pixels + pixels,
                 tl.sum(total, 1).to(tl.float64) + C * origin, inside)
    else:
        n = C + tl.zeros([P], tl.float64)
    tl.store(maps_ptr + pixel, (s1 + n * origin) * q, inside)
    tl.store(maps_ptr + pixel.to(tl.int64) + pixels,
             (s2 + origin * (2 * s1 + n * origin)) * q * q, inside)


@triton.jit(do_not_specialize=['pixels', 'H', 'W', 'units', 'Ho', 'Wo', 'kh', 'kw', 'sh', 'sw',
                               'left', 'top', 'dh', 'dw', 'K'])
def moments(maps_ptr, mean_ptr, rstd_ptr, live_ptr, undropped_ptr, drift_ptr, pixels, H, W, units,
            Ho, Wo, kh, kw, sh, sw, left, top, dh, dw, K, excess, eps, UNDROPPED: tl.constexpr,
            WIDE: tl.constexpr, P: tl.constexpr, LIVE: tl.constexpr):
    """Box sums of ``maps`` and from them the moments of each unit.

    ``excess`` is factor - 1: floats arrive as float32, which knows 1 + p to 6e-8 only. A variance
    of at most ``LIVE`` times the second moment is its rounding.
    """
    HUGE: tl.constexpr = 1e300  # stands for a variance that has overflowed
    unit = own_block(P, WIDE)
    inside = unit < units
    line = unit // Wo
    sample = line // Ho
    row = (line - sample * Ho).to(tl.int32) * sh - top
    column = (unit - line * Wo).to(tl.int32) * sw - left
    s1 = tl.zeros([P], tl.float64)
    s2 = tl.zeros([P], tl.float64)
    s3 = tl.zeros([P], tl.float64)
    for i in range(kh):
        y = row + i * dh
        for j in range(kw):
            x = column + j * dw
            mask = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = maps_ptr + (sample * H + y) * W + x
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
        tl.store(drift_ptr + unit, ((s1 - s3) / K).to(tl.float32), inside)


@triton.jit
def shifted(z, s_ptr, t_ptr, channel, mask, u, v, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """z - s * u - t * v, each where it is given; without ``s_ptr`` s is 1."""
    if FIRST and s_ptr is None:
        z -= u[:, None]
    elif FIRST:
        z -= tl.load(s_ptr + channel, mask, other=0.0)[None, :] * u[:, None]
    if SECOND:
        z -= tl.load(t_ptr + channel, mask, other=0.0)[None, :] * v[:, None]
    return z


@triton.jit(do_not_specialize=['units', 'c', 'area'])
def normalize(z_ptr, y_ptr, residual_ptr, scale_ptr, bias_ptr, s_ptr, u_ptr, t_ptr, v_ptr, units,
              c, area, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
              FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr,
              WIDE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """y = (z - s * u - t * v) * scale + bias, plus the residual or through relu."""
    C, area = full_sizes(c, area, LAST, V)
    unit = own_block(P, WIDE)
    inside = unit < units
    channel = tl.program_id(1) * B + tl.arange(0, B)
    exists = channel < C
    mask = inside[:, None] & exists[None, :]
    where = element(pixel_start(unit, C, area, LAST), channel, area, LAST)
    z = tl.load(z_ptr + where, mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + unit, inside, other=0.0)
    u = tl.zeros([P], tl.float32)
    v = tl.zeros([P], tl.float32)
    if FIRST:
        u = tl.load(u_ptr + unit, inside, other=0.0)
    if SECOND:
        v = tl.load(v_ptr + unit, inside, other=0.0)
    y = shifted(z, s_ptr, t_ptr, channel, exists, u, v, FIRST, SECOND) * scale[:, None]
    if BIAS:
        y += tl.load(bias_ptr + channel, exists, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + where, mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y > 0, y, tl.where(y != y, y, 0.0))
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask)
