"""Which implementation serves an input."""
import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import closed_form, fused, unfolded
from .geometry import make_geometry
from .passes import Passes

IMPLS = ('auto', 'triton', 'fused', 'reference')


def passes_of(impl: str) -> Passes:
    """The implementation of that name in closed form, a module."""
    if impl == 'fused':
        return fused
    from . import triton_passes  # here, so that importing mmseg_kn loads no triton
    return triton_passes


def form_of(x: Tensor, weight: Tensor, options: closed_form.Options, impl: str):
    """The module whose ``forward`` and ``backward`` serve x (N, C, H, W)."""
    return unfolded if impl == 'fused' and unfolded.serves(x, weight, options) else closed_form


def exports() -> bool:
    """Whether an exporter is at work. It sees through torch operations only."""
    # torch 2.6 has no is_exporting.
    return torch.jit.is_tracing() or getattr(torch.compiler, 'is_exporting', lambda: False)()


def chosen_impl(input: Tensor, impl: str = 'auto') -> str:
    """Which implementation serves ``input``: ``'triton'``, ``'fused'`` or ``'reference'``.

    ``'auto'`` is ``'triton'`` for float32, float16 and bfloat16 on a CUDA GPU of compute
    capability 8.0 or later where triton can be imported, else ``'fused'``.

    Raises:
        ValueError: ``impl`` is none of :data:`IMPLS`, or ``'triton'`` cannot serve ``input``.
    """
    if impl not in IMPLS:
        raise ValueError(f'impl must be one of {IMPLS}, got {impl!r}')
    if impl in ('fused', 'reference'):
        return impl
    if impl == 'auto' and (not input.is_cuda or exports()):
        return 'fused'
    obstacle = _triton_obstacle(input.device, input.dtype)
    if impl == 'triton' and obstacle:
        raise ValueError(f"impl='triton' cannot run here: {obstacle}; use impl='auto', which "
                         'falls back')
    return 'fused' if obstacle else 'triton'


class _PassingObstacle(Exception):
    """Holds for this call; the cache keeps no exceptions, and the next call tries again."""


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why triton cannot serve, None if it can."""
    try:
        return _find_triton_obstacle(device, dtype)
    except _PassingObstacle as obstacle:
        _warn(device, obstacle)
        return str(obstacle)


def _warn(device: torch.device, reason: Exception) -> None:
    warnings.warn(f"triton's kernels do not run on {device}, impl='auto' takes 'fused' instead: "
                  f'{reason}', stacklevel=3)


# torch.compiler.assume_constant_result would import dynamo, and that triton, here and now.
_triton_obstacle._dynamo_marked_constant = True


@lru_cache
def _find_triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'it computes in float32, float16 and bfloat16, got {dtype}'
    try:
        from . import triton_passes
    except ImportError as error:
        return f'triton cannot be imported ({error})'
    if triton_passes.TOO_OLD:
        return 'it needs triton 3.3'
    if triton_passes.INTERPRETED:
        return None
    if device.type != 'cuda' or torch.version.hip:
        return f'it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests), got {device}'
    with unset_fake_temporarily():  # fake tensors ask as well, and the answer is kept
        return _try_on(device, dtype)


def _try_on(device: torch.device, dtype: torch.dtype) -> str | None:
    from . import triton_passes
    try:
        capability = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # of a fake tensor, whose GPU is not here
        return f'there is no {device} ({error})'
    if capability < (8, 0):
        return f'it needs compute capability 8.0, got {capability[0]}.{capability[1]}'
    if torch.cuda.is_current_stream_capturing():  # which a trial launch could break
        raise _PassingObstacle('a CUDA graph is captured and the kernels were not tried before; '
                               'run one forward pass first')
    try:  # launching needs a C compiler and Python's headers, once
        triton_passes.unit_moments(torch.zeros(1, 1, 1, 1, device=device, dtype=dtype),
                                   make_geometry(1), None, 0.0, 1.0, 1e-5, True, False)
    except Exception as error:  # whatever is missing, torch ops can do without: slower
        if 'out of memory' in str(error):  # torch's and triton's
            raise _PassingObstacle(f'its kernels do not run now ({error})') from error
        _warn(device, error)
        return f'its kernels do not run ({error})'
    return None
