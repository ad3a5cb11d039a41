"""Max pooling that keeps two bytes for each maximum.

torch keeps its input, and the places of the maxima in int64, which is twice a map of float32. How
far a maximum lies from its window's first element says as much, and is a small number.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


class _MaxPool2d(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, *window) -> Tensor:
        y, places = _aten.max_pool2d_with_indices(x, *window)
        kernel, _, _, dilation, _ = window
        farthest = sum((k - 1) * d * step for k, d, step in zip(
            kernel, dilation, (x.size(3), 1), strict=True))
        small = torch.int16 if farthest <= torch.iinfo(torch.int16).max else torch.int32
        ctx.save_for_backward((places - _first_elements(x, y, *window)).to(small))
        ctx.window, ctx.shape = window, x.shape
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        distances, = ctx.saved_tensors
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        # Only the shape and the memory format of the input are read.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        places = _first_elements(x, distances, *ctx.window) + distances
        dx = _aten.max_pool2d_with_indices_backward(grad, x, *ctx.window, places)
        return dx, *[None] * 5


def _first_elements(x: Tensor, y: Tensor, kernel, stride, padding, dilation,
                    ceil_mode) -> Tensor:
    """Place in x of the first element of each window, as rows * W + columns: (Ho, Wo), int64.

    Where that element is padding, its row or column is negative.
    """
    rows, columns = (torch.arange(size, device=x.device) * s - p
                     for size, s, p in zip(y.shape[2:], stride, padding, strict=True))
    return rows[:, None] * x.size(3) + columns


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int = 0, dilation: int = 1,
               ceil_mode: bool = False) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of x (N, C, H, W), with its values and gradients."""
    if torch.is_grad_enabled() and x.requires_grad:
        window = [(k, k) for k in (kernel_size, stride, padding, dilation)]
        return _MaxPool2d.apply(x, *window, ceil_mode)
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
