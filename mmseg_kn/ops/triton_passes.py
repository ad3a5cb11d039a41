"""The passes (:mod:`.passes`) as launches of the kernels in :mod:`.triton_kernels`."""
import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .geometry import Geometry
from .memory_format import dense_like, is_channels_last
from .passes import Kept, MomentGrads, Moments, ScaledGrad, Shift

PIXELS = 16  # of a program
CHANNELS = 32  # at most, of one of the four tiles that share a Philox call
OUTPUTS = 64  # channels of the output at once, at most; twice as many spill registers
TOO_OLD = tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3)  # knows no tuples
KERNELS = (kernels.channel_sums, kernels.moments, kernels.normalize, kernels.scale_grad,
           kernels.add_moment_grads)
INTERPRETED = not isinstance(kernels.moments, triton.JITFunction)


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


def draw_mask(x: Tensor, dropout_p: float) -> Tensor:
    """The seed of one dropout, (1,) int64, by torch's generator of ``x.device``."""
    return torch.randint(2**63 - 1, (1, ), device=x.device)


def unit_moments(x: Tensor, geometry: Geometry, mask: Tensor | None, dropout_p: float,
                 factor: float, eps: float, exact: bool, with_undropped_mean: bool) -> Moments:
    """See :meth:`.Passes.unit_moments`. It is always exact."""
    n, c, h, w = x.shape
    ho, wo = geometry.output_size(h, w)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    left, _, top, _ = geometry.padding
    pixels, units = n * h * w, n * ho * wo
    undropped = with_undropped_mean and mask is not None
    maps = x.new_empty((3, n, h, w), dtype=torch.float64)
    _launch(kernels.channel_sums, x, (triton.cdiv(pixels, PIXELS), ), x, maps, mask, pixels,
            h * w, c, *_strides(x), _threshold(dropout_p),
            1.0 if mask is None else 1 / (1 - dropout_p),
            DROPOUT=mask is not None, P=PIXELS, C4=_quarter(c))
    mean = x.new_empty((n, ho, wo), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    live = x.new_empty((n, ho, wo), dtype=torch.bool)
    undropped_mean = torch.empty_like(mean) if undropped else None
    _launch(kernels.moments, x, (triton.cdiv(units, 128), ), maps, mean, rstd,
            live.view(torch.int8), undropped_mean, pixels, h, w, units, ho, wo, kh, kw, sh, sw,
            left, top, dh, dw, c * kh * kw, factor - 1, eps, UNDROPPED=undropped, P=128)
    return Moments(mean, rstd, live, undropped_mean)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _two(shifts: list[Shift]) -> tuple[list[Tensor | None], dict]:
    flat = [t.contiguous() for pair in shifts for t in pair]
    return flat + [None] * (4 - len(flat)), dict(FIRST=len(shifts) > 0, SECOND=len(shifts) > 1)


def normalize(z: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
              shifts: list[Shift], relu: bool, inplace: bool) -> Tensor:
    """See :meth:`.Passes.normalize`."""
    n, o, h, w = z.shape
    y = z if inplace else torch.empty_like(z)
    if residual is not None:
        residual = dense_like(residual, z)
    shift_args, flags = _two(shifts)
    block = min(OUTPUTS, triton.next_power_of_2(o))
    _launch(kernels.normalize, z, (triton.cdiv(n * h * w, PIXELS), triton.cdiv(o, block)), z, y,
            residual, scale, _dense(bias), *shift_args, n * h * w, h * w, o, *_strides(z),
            BIAS=bias is not None, RESIDUAL=residual is not None, RELU=relu, P=PIXELS, B=block,
            **flags)
    return y


def scale_grad(grad: Tensor, kept: Kept, mean: Tensor, rstd: Tensor, weight_sum: Tensor,
               bias: Tensor | None, shifts: list[Shift], need_x: bool) -> ScaledGrad:
    """See :meth:`.Passes.scale_grad`. Nothing is gained by leaving ``need_x`` out."""
    n, o, h, w = grad.shape
    out = torch.empty_like(grad)
    to_mean, to_var = grad.new_empty((2, n, h, w), dtype=torch.float32)
    programs = triton.cdiv(n * h * w, PIXELS)
    partial = grad.new_empty((programs, 2, o), dtype=torch.float32)
    shift_args, flags = _two(shifts)
    has_y = kept.y is not None
    output = kept.y if has_y else grad if kept.z is None else kept.z  # grad: read in vain
    residual = None if kept.residual is None else dense_like(kept.residual, grad)
    _launch(kernels.scale_grad, grad, (programs, ), grad, output, residual,
            out, mean, rstd, weight_sum, _dense(bias), *shift_args, to_mean,
            to_var, partial, n * h * w, h * w, o, *_strides(grad), RELU=kept.relu, HAS_Y=has_y,
            RESIDUAL=residual is not None, BIAS=bias is not None, P=PIXELS,
            B=min(OUTPUTS, triton.next_power_of_2(o)), **flags)
    of_mean, dbias = partial.sum(0)
    return ScaledGrad(out, to_mean, to_var, of_mean, dbias.clone())


def add_moment_grads(dx: Tensor, x: Tensor, geometry: Geometry, mask: Tensor | None,
                     dropout_p: float, grads: MomentGrads, rectified: bool) -> Tensor:
    """See :meth:`.Passes.add_moment_grads`."""
    n, c, h, w = x.shape
    ho, wo = geometry.output_size(h, w)
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    left, _, top, _ = geometry.padding
    maps = torch.stack([m for m in grads if m is not None]).float()
    _launch(kernels.add_moment_grads, x, (triton.cdiv(n * h * w, PIXELS), ), dx, x, maps, mask,
            n * h * w, h, w, c, *_strides(x), n * ho * wo, ho, wo, kh, kw, sh, sw, left, top, dh,
            dw, 1 / (c * kh * kw), _threshold(dropout_p), DROPOUT=mask is not None,
            UNMASKED=grads.unmasked is not None, RECTIFIED=rectified, P=PIXELS, C4=_quarter(c))
    return dx
