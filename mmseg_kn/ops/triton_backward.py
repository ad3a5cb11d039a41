"""Triton kernels of the backward pass; :mod:`.triton_passes` calls them.

As in :mod:`.triton_forward`, each reads or writes a full-size tensor once, and sizes are not
specialised.
"""
import triton
import triton.language as tl

from .triton_blocks import element, full_sizes, own_block, pixel_start, random4, stays
from .triton_forward import shifted


@triton.jit(do_not_specialize=['units', 'c', 'area'])
def scale_grad(grad_ptr, kept_ptr, residual_ptr, h_ptr, mean_ptr, rstd_ptr, live_ptr,
               weight_sum_ptr, bias_ptr, s_ptr, u_ptr, t_ptr, v_ptr, constant_ptr, slope_ptr,
               to_mean_ptr, partial_ptr, units, c, area, minus_q, of_dvar, NEED_X: tl.constexpr,
               MASKED: tl.constexpr, UNMASKED: tl.constexpr, RELU: tl.constexpr,
               HAS_Y: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
               FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr,
               WIDE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """h = grad * rstd with its sums over channels, and over this program's pixels.

    The sums over channels leave as the gradients of the moments. partial (programs, C, 2): sum
    h * mean, sum grad.
    """
    C, area = full_sizes(c, area, LAST, V)
    unit = own_block(P, WIDE)
    inside = unit < units
    start = pixel_start(unit, C, area, LAST)
    mean = tl.load(mean_ptr + unit, inside, other=0.0)
    rstd = tl.load(rstd_ptr + unit, inside, other=1.0)
    u = tl.zeros([P], tl.float32)
    v = tl.zeros([P], tl.float32)
    if FIRST:
        u = tl.load(u_ptr + unit, inside, other=0.0)
    if SECOND:
        v = tl.load(v_ptr + unit, inside, other=0.0)
    of_mean = tl.zeros([P, B], tl.float32)
    of_var = tl.zeros([P, B], tl.float32)
    partial_ptr += tl.program_id(0).to(tl.int64) * C * 2
    pair = tl.arange(0, 2)
    for block in range(0, C, B):
        channel = block + tl.arange(0, B)
        exists = channel < C
        mask = inside[:, None] & exists[None, :]
        where = element(start, channel, area, LAST)
        grad = tl.load(grad_ptr + where, mask, other=0.0).to(tl.float32)
        if RELU or NEED_X:
            z = tl.load(kept_ptr + where, mask, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(z > 0, grad, 0.0)
        h = grad * rstd[:, None]
        tl.store(h_ptr + where, h.to(h_ptr.dtype.element_ty), mask)
        both = tl.sum(tl.join(h * mean[:, None], grad), 0)  # one exchange between threads, not two
        tl.store(partial_ptr + channel[:, None] * 2 + pair[None, :], both, exists[:, None])
        if NEED_X:
            if HAS_Y:  # what was loaded is y, and becomes z * rstd
                if RESIDUAL:
                    z -= tl.load(residual_ptr + where, mask, other=0.0).to(tl.float32)
                if BIAS:
                    z -= tl.load(bias_ptr + channel, exists, other=0.0).to(tl.float32)[None, :]
            else:
                z = shifted(z, s_ptr, t_ptr, channel, exists, u, v, FIRST, SECOND)
            of_var += h * z
            if MASKED or UNMASKED:
                of_mean += h * tl.load(weight_sum_ptr + channel, exists, other=0.0)[None, :]
    if NEED_X:
        to_var = tl.sum(of_var, 1)
        if not HAS_Y:
            to_var *= rstd
        live = tl.load(live_ptr + unit, inside, other=0)
        dvar = tl.where(live != 0, to_var * rstd * -0.5, 0.0)
        constant = 2 * mean * dvar
        if MASKED or UNMASKED:
            to_mean = tl.sum(of_mean, 1)
            if MASKED:
                constant += to_mean
            if UNMASKED:
                tl.store(to_mean_ptr + unit, to_mean, inside)
        tl.store(constant_ptr + unit, constant * minus_q, inside)
        tl.store(slope_ptr + unit, dvar * of_dvar, inside)


@triton.jit(do_not_specialize=['units', 'c', 'area'])
def clear_dead(h_ptr, live_ptr, units, c, area, LAST: tl.constexpr, V: tl.constexpr,
               WIDE: tl.constexpr, P: tl.constexpr, B: tl.constexpr):
    """h = 0 where a unit is not live. Nothing else is touched, so nothing of h is read."""
    C, area = full_sizes(c, area, LAST, V)
    unit = own_block(P, WIDE)
    dead = tl.load(live_ptr + unit, unit < units, other=1) == 0
    channel = tl.program_id(1) * B + tl.arange(0, B)
    where = element(pixel_start(unit, C, area, LAST), channel, area, LAST)
    tl.store(h_ptr + where, tl.zeros([P, B], h_ptr.dtype.element_ty),
             dead[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=['programs', 'C'])
def add_partials(partial_ptr, of_mean_ptr, bias_ptr, programs, C, P: tl.constexpr,
                 B: tl.constexpr):
    """Sums partial (programs, C, 2) over programs, to two of (C,)."""
    column = tl.program_id(0) * B + tl.arange(0, B)
    exists = column < 2 * C
    total = tl.zeros([P, B], tl.float32)
    for start in range(0, programs, P):
        row = start + tl.arange(0, P)
        at = row.to(tl.int64)[:, None] * C * 2 + column[None, :]
        total += tl.load(partial_ptr + at, (row < programs)[:, None] & exists[None, :], other=0.0)
    whole = tl.sum(total, 0)
    tl.store(of_mean_ptr + column // 2, whole, exists & (column % 2 == 0))
    tl.store(bias_ptr + column // 2, whole, exists & (column % 2 == 1))


@triton.jit(do_not_specialize=['pixels', 'H', 'W', 'c', 'area', 'Ho', 'Wo', 'kh', 'kw', 'sh', 'sw',
                               'left', 'top', 'dh', 'dw', 'threshold'])
def add_moment_grads(dx_ptr, x_ptr, constant_ptr, slope_ptr, unmasked_ptr, seed_ptr, pixels, H, W,
                     c, area, Ho, Wo, kh, kw, sh, sw, left, top, dh, dw, inv_k, threshold,
                     DROPOUT: tl.constexpr, UNMASKED: tl.constexpr, RECTIFIED: tl.constexpr,
                     STRIDED: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr,
                     WIDE: tl.constexpr, P: tl.constexpr, C4: tl.constexpr):
    """dx += box^T(unmasked) + m * (box^T(constant) + box^T(slope) * x), m the mask.

    Where x is a relu's output (``RECTIFIED``), dx becomes 0 where x is 0.
    """
    C, area = full_sizes(c, area, LAST, V)
    pixel = own_block(P, WIDE)
    inside = pixel < pixels
    line = pixel // W
    sample = line // H
    row = (line - sample * H).to(tl.int32) + top
    column = (pixel - line * W).to(tl.int32) + left
    constant = tl.zeros([P], tl.float32)
    slope = tl.zeros([P], tl.float32)
    unmasked = tl.zeros([P], tl.float32)
    for i in range(kh):
        y = row - i * dh
        mask_y = inside & (y >= 0)
        if STRIDED:
            mask_y &= y % sh == 0
            y = y // sh
        mask_y &= y < Ho
        for j in range(kw):
            x = column - j * dw
            mask = mask_y & (x >= 0)
            if STRIDED:
                mask &= x % sw == 0
                x = x // sw
            mask &= x < Wo
            at = (sample * Ho + y) * Wo + x
            constant += tl.load(constant_ptr + at, mask, other=0.0)
            slope += tl.load(slope_ptr + at, mask, other=0.0)
            if UNMASKED:
                unmasked += tl.load(unmasked_ptr + at, mask, other=0.0)
    constant *= inv_k
    slope *= inv_k
    unmasked *= inv_k
    start = pixel_start(pixel, C, area, LAST)
    lane = tl.arange(0, C4)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        like = tl.load(x_ptr + element(start, lane, area, LAST),
                       inside[:, None] & (lane < C)[None, :], other=0.0)
    for block in range(0, C, 4 * C4):
        if DROPOUT:
            bits = random4(seed, pixel, block, C, like, C4)
        for j in tl.static_range(4):
            channel = block + j * C4 + lane
            mask = inside[:, None] & (channel < C)[None, :]
            where = element(start, channel, area, LAST)
            # dx first: in the other order registers spill on sm 90.
            dx = tl.load(dx_ptr + where, mask, other=0.0).to(tl.float32) + unmasked[:, None]
            value = tl.load(x_ptr + where, mask, other=0.0).to(tl.float32)
            grad = constant[:, None] + slope[:, None] * value
            if DROPOUT:
                grad = tl.where(stays(bits[j], threshold), grad, 0.0)
            dx += grad
            if RECTIFIED:
                dx = tl.where(value > 0, dx, 0.0)
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask)
