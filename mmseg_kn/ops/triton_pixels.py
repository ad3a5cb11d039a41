"""The Triton kernel of KernelNorm2d's backward pass; :mod:`.triton_passes` calls it.

Every pixel is a unit of its own, so its sums and what follows from them need one program: what it
reads a second time is still in the cache.
"""
import triton
import triton.language as tl

from .triton_blocks import element, full_sizes, own_block, pixel_start, random4, stays


@triton.jit
def _grad_and_input(grad_ptr, x_ptr, where, mask, mean, RELU: tl.constexpr):
    x = tl.load(x_ptr + where, mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + where, mask, other=0.0).to(tl.float32)
    if RELU:  # the output is above 0 where x is above its mean
        grad = tl.where(x > mean[:, None], grad, 0.0)
    return grad, x


@triton.jit(do_not_specialize=['pixels', 'c', 'area', 'threshold'])
def pixel_grad(dx_ptr, grad_ptr, x_ptr, mean_ptr, rstd_ptr, live_ptr, seed_ptr, pixels, c, area,
               of_constant, of_slope, threshold, DROPOUT: tl.constexpr, RELU: tl.constexpr,
               LAST: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
               C4: tl.constexpr):
    """dx = h + m * (constant + slope * x), h = grad * rstd, m the mask."""
    C, area = full_sizes(c, area, LAST, V)
    pixel = own_block(P, WIDE)
    inside = pixel < pixels
    start = pixel_start(pixel, C, area, LAST)
    mean = tl.load(mean_ptr + pixel, inside, other=0.0)
    rstd = tl.load(rstd_ptr + pixel, inside, other=1.0)
    live = tl.load(live_ptr + pixel, inside, other=0)
    lane = tl.arange(0, C4)
    of_mean = tl.zeros([P, C4], tl.float32)
    of_var = tl.zeros([P, C4], tl.float32)
    for first in range(0, C, C4):
        exists = (first + lane < C)[None, :]
        where = element(start, first + lane, area, LAST)
        grad, x = _grad_and_input(grad_ptr, x_ptr, where, inside[:, None] & exists, mean, RELU)
        of_mean += grad
        of_var += grad * tl.where(exists, x - mean[:, None], 0.0)
    to_mean = tl.sum(of_mean, 1) * rstd
    dvar = tl.where(live != 0, tl.sum(of_var, 1) * rstd * rstd * rstd * -0.5, 0.0)
    constant = (2 * mean * dvar + to_mean) * of_constant
    slope = dvar * of_slope
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
            grad, x = _grad_and_input(grad_ptr, x_ptr, where, mask, mean, RELU)
            through_moments = constant[:, None] + slope[:, None] * x
            if DROPOUT:
                through_moments = tl.where(stays(bits[j], threshold), through_moments, 0.0)
            dx = grad * rstd[:, None] + through_moments
            tl.store(dx_ptr + where, dx.to(dx_ptr.dtype.element_ty), mask)
