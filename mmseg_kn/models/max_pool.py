"""Max pooling that keeps one byte for each maximum.

torch keeps its input, and the places of the maxima in int64, which is twice a map of float32.
The place within its window is enough to find each maximum again.
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
        rows, columns = _first_elements(x, y, *window)
        kernel, _, _, (dh, dw), _ = window
        width = x.size(3)
        row, column = places // width - rows, places % width - columns
        ctx.save_for_backward((row // dh * kernel[1] + column // dw).to(torch.uint8))
        ctx.window, ctx.shape = window, x.shape
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        within, = ctx.saved_tensors
        kernel, _, _, (dh, dw), _ = ctx.window
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        # Only the shape and the memory format of the input are read.
        x = grad.new_empty(ctx.shape).contiguous(memory_format=layout)
        rows, columns = _first_elements(x, within, *ctx.window)
        within = within.long()
        row, column = within // kernel[1] * dh + rows, within % kernel[1] * dw + columns
        dx = _aten.max_pool2d_with_indices_backward(grad, x, *ctx.window,
                                                    row * x.size(3) + column)
        return dx, *[None] * 5


def _first_elements(x: Tensor, y: Tensor, kernel, stride, padding, dilation,
                    ceil_mode) -> tuple[Tensor, Tensor]:
    """Row (Ho, 1) and column (Wo,) in x of the first element of each window; may lie outside."""
    rows, columns = (torch.arange(size, device=x.device) * s - p
                     for size, s, p in zip(y.shape[2:], stride, padding, strict=True))
    return rows[:, None], columns


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int = 0, dilation: int = 1,
               ceil_mode: bool = False) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of x (N, C, H, W), with its values and gradients.

    Args:
        kernel_size: At most 16, so that a place within the window fits a byte.
        stride, padding, dilation, ceil_mode: As torch's.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        window = [(k, k) for k in (kernel_size, stride, padding, dilation)]
        return _MaxPool2d.apply(x, *window, ceil_mode)
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
