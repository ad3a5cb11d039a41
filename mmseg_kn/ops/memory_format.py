"""torch's two memory formats of (N, C, H, W)."""
import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is dense in channels_last, and not in the usual format as well."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` itself if it is dense in the format that is asked for, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last if channels_last
                        else torch.contiguous_format)


def dense_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` dense in the memory format of ``other``."""
    return dense(x, is_channels_last(other))
