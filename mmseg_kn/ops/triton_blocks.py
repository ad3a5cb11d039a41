"""What the Triton kernels share: where an element lies, and which elements dropout takes.

A kernel's program owns a block of pixels and walks through all channels in blocks, so sums over
channels stay in its registers and nothing is atomic: results do not depend on scheduling.

Threads can load several elements at once only where the compiler knows that rows start at
multiples of so many. So the size of the inner dimension arrives divided by V, a power of two, and
is multiplied by the constant V here: C in channels_last (``LAST``), else the pixels of a sample.

Kernels read no globals: Triton would compare them at every launch.
"""
import triton
import triton.language as tl


@triton.jit
def full_sizes(c, area, LAST: tl.constexpr, V: tl.constexpr):
    """Channels and pixels of a sample, of which one came divided by V."""
    if LAST:
        c = c * V
    else:
        area = area * V
    return c, area


@triton.jit
def own_block(P: tl.constexpr, WIDE: tl.constexpr):
    """The P pixels of this program; in int64 where there are too many for int32."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * P + tl.arange(0, P)


@triton.jit
def pixel_start(pixel, C, area, LAST: tl.constexpr):
    """Offset of channel 0 of pixel n * area + p, in int64: tensors may pass 2 ** 31."""
    if LAST:
        start = pixel.to(tl.int64) * C
    else:  # n * C * area + p
        start = (pixel // area).to(tl.int64) * (C - 1) * area + pixel
    return start


@triton.jit
def element(start, channel, area, LAST: tl.constexpr):
    """Offsets (pixels, channels) of these channels of the pixels that begin at ``start``."""
    along = channel.to(tl.int64)
    if not LAST:
        along *= area
    return start[:, None] + along[None, :]


@triton.jit
def random4(seed, pixel, first, C, like, C4: tl.constexpr, ROUNDS: tl.constexpr = 7):
    """Four tiles (pixels, C4) of uniform uint32, for channels first + C4 * (0, 1, 2, 3) + lane.

    ``first`` is a multiple of 4 * C4. Philox4x32 of the element's place among all quadruples: the
    same for every layout, dtype and block size. As of Triton's own, but with products of 64 bits,
    which are one instruction where their two halves are two. No known test tells seven rounds
    from random numbers.

    ``like`` (pixels, C4) comes from a load, as what the tiles are for does. Threads own elements
    of a tile as they do in what it comes from: else every tile would go through shared memory.
    What is added of ``like`` is 0, and costs nothing in machine code.
    """
    per_pixel = tl.cdiv(C, 4 * C4) * C4
    counter = pixel.to(tl.int64)[:, None] * per_pixel + (first // 4 + tl.arange(0, C4))[None, :]
    counter += ((like != like) & (like == like)).to(tl.int64)
    a = (counter & 0xFFFFFFFF).to(tl.uint32)
    b = (counter >> 32).to(tl.uint32)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        of_a = a.to(tl.uint64) * 0xD2511F53
        of_c = c.to(tl.uint64) * 0xCD9E8D57
        a = (of_c >> 32).to(tl.uint32) ^ b ^ low
        c = (of_a >> 32).to(tl.uint32) ^ d ^ high
        b = of_c.to(tl.uint32)
        d = of_a.to(tl.uint32)
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d


@triton.jit
def stays(bits, threshold):
    """Whether dropout leaves an element: its uniform number is at least p * 2 ** 32."""
    return bits >= threshold.to(tl.uint32)
