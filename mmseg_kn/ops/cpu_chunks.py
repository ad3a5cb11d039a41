"""Cache tricks of a CPU: a tensor in chunks that stay in the cache, and memory that is kept.

A full-size temporary costs ten times what is computed on it there, because its pages must first be
mapped. Traced tensors and those of other devices pass through as one chunk.
"""
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import accumulate_dtype

CHUNK = 2**20  # elements


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` lies on the CPU and is neither traced nor faked: only such are cut up."""
    return (x.device.type == 'cpu' and type(x) in (Tensor, torch.nn.Parameter)
            and not torch.jit.is_tracing() and not torch.compiler.is_compiling())


class Part(NamedTuple):
    """Where a chunk lies: some samples, and some of the H * W pixels."""

    samples: slice
    pixels: slice

    def of(self, x: Tensor) -> Tensor:
        """View of x, (N, C, H * W) or (N, H * W). A part that is all costs no call of torch."""
        if self is WHOLE:
            return x
        return x[self.samples, :, self.pixels] if x.dim() == 3 else x[self]


WHOLE = Part(slice(None), slice(None))


def _parts(x: Tensor) -> list[Part]:
    """The parts of (N, C, H, W)."""
    n, c, h, w = x.shape
    if not is_eager_on_cpu(x) or x.numel() <= CHUNK:
        return [WHOLE]
    if c * h * w <= CHUNK:
        step = CHUNK // (c * h * w)
        return [Part(slice(i, i + step), slice(None)) for i in range(0, n, step)]
    count = round(c * h * w / CHUNK)
    step = -(-h * w // (16 * count)) * 16  # equal parts of whole cache lines
    return [Part(slice(i, i + 1), slice(p, p + step))
            for i in range(n) for p in range(0, h * w, step)]


class _Scratch(threading.local):
    """One chunk of memory for each thread, kept: mapping its pages costs more than using them."""

    def __init__(self) -> None:
        self.stores = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        if dtype not in self.stores or self.stores[dtype].numel() < count:
            # Later calls could not write to a tensor that inference mode has made.
            with torch.inference_mode(False):
                self.stores[dtype] = torch.empty(
                    max(count, CHUNK + 1), dtype=dtype, device='cpu')
        return self.stores[dtype][:count]


_scratch = _Scratch()


def scratch_like(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the chunk (n, C, P): flat, and in the chunk's shape and order.

    Valid until the next call. The flat one has one element more, at position ``chunk.numel()``,
    which may be written to.
    """
    dtype, (n, c, p) = accumulate_dtype(chunk.dtype), chunk.shape
    if is_eager_on_cpu(chunk):
        flat = _scratch.take(chunk.numel() + 1, dtype)
    else:
        flat = chunk.new_empty(chunk.numel() + 1, dtype=dtype)
    if chunk.stride(1) == 1 and c > 1:
        return flat, flat[:-1].view(n, p, c).transpose(1, 2)
    return flat, flat[:-1].view(n, c, p)


def by_chunk(x: Tensor,
             positions: Tensor | None) -> Iterator[tuple[Part, Tensor, Tensor | None]]:
    """Yields each part of x, its chunk (n, C, P) and the dropped positions in that."""
    parts, flat = _parts(x), x.flatten(2)
    views = [part.of(flat) for part in parts]
    if positions is None or len(parts) == 1:
        dropped = [None if positions is None else positions.long()] * len(parts)
    else:
        ends = torch.tensor([v.numel() for v in views], device='cpu').cumsum(0)
        bounds = [0, *torch.searchsorted(positions.long(), ends).tolist()]
        starts = [0, *ends.tolist()]
        dropped = [positions[a:b].long() - start
                   for a, b, start in zip(bounds, bounds[1:], starts, strict=False)]
    yield from zip(parts, views, dropped, strict=True)
