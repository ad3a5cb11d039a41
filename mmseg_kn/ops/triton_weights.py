"""Triton kernels over weights (O, C / groups, kh, kw); :mod:`.triton_passes` calls them.

A filter's K elements lie together in either memory format; K arrives divided by V, as in
:mod:`.triton_blocks`. Where source and target differ in it
(``SWAP``), element k of the target is the source's (k % inner) * outer + k // inner. A program
owns F filters, and walks through their elements in blocks of B.
"""
import triton
import triton.language as tl


@triton.jit
def _places(filters, k, K, inner, outer, SWAP: tl.constexpr):
    """Offsets (F, B) of elements k of the target in its source."""
    if SWAP:
        k = k % inner * outer + k // inner
    return filters.to(tl.int64)[:, None] * K + k[None, :]


@triton.jit(do_not_specialize=['many', 'size', 'inner', 'outer'])
def prepare_weight(weight_ptr, out_ptr, sum_ptr, rounded_sum_ptr, many, size, inner, outer,
                   WRITE: tl.constexpr, CENTRE: tl.constexpr, ROUNDED: tl.constexpr,
                   SWAP: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
                   B: tl.constexpr):
    """The weight, less the mean of each filter where ``CENTRE``, in the dtype of ``out``.

    Beside it its sums; ``rounded_sum`` is of what was written.
    """
    K = size * V
    filters = tl.program_id(0) * F + tl.arange(0, F)
    exists = filters < many
    total = tl.zeros([F, B], tl.float32)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        mask = exists[:, None] & (k < K)[None, :]
        total += tl.load(weight_ptr + _places(filters, k, K, inner, outer, False), mask,
                         other=0.0).to(tl.float32)
    whole = tl.sum(total, 1)
    tl.store(sum_ptr + filters, whole, exists)
    if WRITE:
        mean = whole / K if CENTRE else tl.zeros([F], tl.float32)
        rounded = tl.zeros([F, B], tl.float32)
        for start in range(0, K, B):
            k = start + tl.arange(0, B)
            mask = exists[:, None] & (k < K)[None, :]
            value = tl.load(weight_ptr + _places(filters, k, K, inner, outer, SWAP), mask,
                            other=0.0).to(tl.float32)
            value = (value - mean[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + _places(filters, k, K, inner, outer, False), value, mask)
            rounded += tl.where(mask, value.to(tl.float32), 0.0)
        if ROUNDED:
            tl.store(rounded_sum_ptr + filters, tl.sum(rounded, 1), exists)


@triton.jit(do_not_specialize=['many', 'size', 'inner', 'outer'])
def finish_weight_grad(raw_ptr, of_mean_ptr, out_ptr, many, size, inner, outer,
                       SWAP: tl.constexpr, V: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    """raw - of_mean of the filter, in the dtype and memory format of ``out``."""
    K = size * V
    filters = tl.program_id(0) * F + tl.arange(0, F)
    exists = filters < many
    k = tl.program_id(1) * B + tl.arange(0, B)
    mask = exists[:, None] & (k < K)[None, :]
    grad = tl.load(raw_ptr + _places(filters, k, K, inner, outer, SWAP), mask, other=0.0)
    grad = grad.to(tl.float32) - tl.load(of_mean_ptr + filters, exists, other=0.0)[:, None]
    tl.store(out_ptr + _places(filters, k, K, inner, outer, False),
             grad.to(out_ptr.dtype.element_ty), mask)
